"""Something that one task rings and another waits for, with a time limit.

It is here because asyncio.wait_for, before Python 3.12, loses a cancellation that comes with the result: a client that
hung up at that moment would be waited for, and a task that was told to end would go on.
"""

from __future__ import annotations

import asyncio


class Bell:
    """Rung by `ring`; silent again once a `wait` has heard it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self, *_: object) -> None:
        """Ring; the arguments are there so that this can be an observer."""
        self._rung.set()

    def silence(self) -> None:
        """Forget that it was rung."""
        self._rung.clear()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait for a ring, for so long at most. Whether there was one."""
        loop = asyncio.get_running_loop()
        timer = None if seconds is None else loop.call_later(seconds, self._rung.set)
        try:
            await self._rung.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._rung.clear()
        return timer is None or loop.time() < timer.when()
