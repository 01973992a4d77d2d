"""Logs a trouble once when it begins and once when it is over, however often and in whatever words it is met."""

from __future__ import annotations

from typing import Any

from nullworker.logs import get_log

log = get_log(__name__)


class Trouble:
    """One kind of trouble.

    Args:
        event: the word of its log line; `<event>_over` is that of its end.
        message: what it leads to, for that line.

    Attributes:
        why: its cause, as it was met last; None while there is none.
    """

    def __init__(self, event: str, message: str = "") -> None:
        self.why: str | None = None
        self._event = event
        self._message = message

    def met(self, why: str, **fields: Any) -> None:
        """It is there. `fields` go into the log line; `message` replaces that of the constructor."""
        if self.why is None:
            log.warning(self._event, why=why, **{"message": self._message, **fields})
        self.why = why

    def over(self) -> None:
        """It is not there."""
        if self.why is not None:
            log.info(f"{self._event}_over")
        self.why = None
