"""The timer that rings the service when time has brought something: an end of a hold, or of a wait.

The one rule: one timer, for the earliest deadline; a deadline that moves away is noticed when it rings.
"""

from __future__ import annotations

import asyncio

from nullworker.service import Commit, Service


class Alarm:
    """Rings the service when time has brought something. An observer: each commit may move the next deadline."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")

    def set(self, _: Commit | None = None) -> None:
        """Ring at the next deadline."""
        deadline = self._service.next_deadline()
        if deadline is None or deadline >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = deadline
        delay = max(deadline - self._service.now(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._due, self._timer = float("inf"), None
        try:
            self._service.tick()
        finally:
            self.set()

    def stop(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
