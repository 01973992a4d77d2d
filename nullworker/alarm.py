"""The timer that rings the service when time has brought something: an end of a hold, or of a wait.

The one rule: one timer, for the earliest deadline; a deadline that moves away is noticed when it rings. Timers are
compared by the loop's time: the worker's own may jump to the wall clock's while a timer runs (clock.py, `settle`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from nullworker.service import Commit, Service

#: Seconds by which the same deadline may come out differently: the worker's time is told to the millisecond.
SAME_SECONDS: Final = 0.002


class Alarm:
    """Rings the service when time has brought something. An observer: each commit may move the next deadline."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._timer: asyncio.TimerHandle | None = None

    def set(self, _: Commit | None = None) -> None:
        """Ring at the next deadline."""
        deadline = self._service.next_deadline()
        if deadline is None:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + max(deadline - self._service.now(), 0.0)
        if self._timer is not None:
            if self._timer.when() < due + SAME_SECONDS:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        try:
            self._service.tick()
        finally:
            self.set()

    def stop(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
