"""Logs a trouble once when it begins and once when it is over, however often it occurs."""

from __future__ import annotations

from typing import Any, Final

from nullworker.clock import stopwatch
from nullworker.logs import get_log

log = get_log(__name__)

#: Seconds until a trouble whose cause has changed is logged again.
QUIET_SECONDS: Final = 60.0


class Trouble:
    """One kind of trouble.

    Args:
        event: the word of its log line; `<event>_over` is that of its end.
        message: what it leads to, for that line.

    Attributes:
        why: its cause; None while there is none.
    """

    def __init__(self, event: str, message: str = "") -> None:
        self.why: str | None = None
        self._event = event
        self._message = message
        self._said = ""
        self._said_at = 0.0

    def met(self, why: str, **fields: Any) -> None:
        """The trouble has occurred. `fields` go into the log line; `message` replaces that of the constructor."""
        changed = why != self._said and stopwatch() - self._said_at >= QUIET_SECONDS
        if self.why is None or changed:
            self._said, self._said_at = why, stopwatch()
            log.warning(self._event, why=why, **{"message": self._message, **fields})
        self.why = why

    def over(self) -> None:
        """The trouble is over, or did not occur."""
        if self.why is not None:
            log.info(f"{self._event}_over")
        self.why = None
