"""Wakes the service at its next deadline."""

from __future__ import annotations

import asyncio
from typing import Final

from nullworker.service import RETRY_SECONDS, Service

#: Seconds within which two timers are the same: the worker's time is rounded to the millisecond.
SAME_SECONDS: Final = 0.002


class DeadlineTimer:
    """Calls `tick` at the service's next deadline; the service calls `set` when that may have moved.

    Timers use the event loop's time, because the worker's time may jump (`WorkerClock.follow`).
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._timer: asyncio.TimerHandle | None = None
        service.on_deadline.append(self.set)

    def set(self, not_before: float = 0.0) -> None:
        """Set the timer to the next deadline, at least `not_before` seconds from now."""
        deadline = self._service.next_deadline()
        if deadline is None:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + max(deadline - self._service.now(), not_before)
        if self._timer is None or self._timer.when() >= due + SAME_SECONDS:
            self.stop()
            self._timer = loop.call_at(due, self._run)

    def _run(self) -> None:
        self._timer = None
        try:
            self._service.tick()
        except BaseException:
            self.stop()  # what it did set to a deadline that has passed
            self.set(RETRY_SECONDS)
            raise
        self.set()

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
