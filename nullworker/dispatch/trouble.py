"""Logs a repeated failure once, and again at intervals."""

from __future__ import annotations

from typing import Any, Final

from nullworker.logs import get_log

log = get_log(__name__)

#: Seconds for which the same trouble is not said again.
QUIET_SECONDS: Final = 60.0


class Trouble:
    """One kind of trouble, by the word of its log line.

    Attributes:
        why: what it is now; None while there is none.
    """

    def __init__(self, event: str) -> None:
        self.why: str | None = None
        self._event = event
        self._said_at = 0.0

    def met(self, why: str, now: float, **fields: Any) -> None:
        """It is there."""
        if self.why is None or now - self._said_at >= QUIET_SECONDS:
            self._said_at = now
            log.warning(self._event, why=why, **fields)
        self.why = why

    def over(self) -> None:
        """It is not there."""
        if self.why is not None:
            log.info(f"{self._event}_over")
        self.why = None
