"""Commands of `nullworker work` that run in simulated time, in the place of process groups."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence

COMMAND = ("render", "--all")
#: Seconds of a command that does not end by itself.
FOREVER = 1e6


class Commands:
    """Each run of CMD takes `seconds` and ends with `code`, the last of them again and again.

    Attributes:
        to_come: (seconds, code) of each, or why it cannot be started.
        times: when each was started.
        environments: of each.
        groups: those that could be started.
        last_words: seconds that a command takes to end after SIGTERM.
    """

    def __init__(self, *to_come: tuple[float, int] | OSError) -> None:
        self.to_come = list(to_come)
        self.times: list[float] = []
        self.environments: list[Mapping[str, str]] = []
        self.groups: list[Group] = []
        self.last_words = 0.0

    def start(self, command: Sequence[str], environment: Mapping[str, str], guard: Guard) -> Group:
        """In the place of ProcessGroup."""
        assert command == COMMAND
        assert not guard.closed
        self.times.append(asyncio.get_running_loop().time())
        self.environments.append(environment)
        following = self.to_come[0] if len(self.to_come) == 1 else self.to_come.pop(0)
        if isinstance(following, OSError):
            raise following
        self.groups.append(Group(*following, self.last_words))
        return self.groups[-1]


class Group:
    """A command that runs."""

    def __init__(self, seconds: float, code: int, last_words: float) -> None:
        self.pid = 4711
        self.ended = asyncio.Event()
        self.ended_at = 0.0
        self.reaped = 0
        self._code, self._last_words = code, last_words
        self._timer = asyncio.get_running_loop().call_later(seconds, self.ended.set)

    def reap(self) -> None:
        self.reaped += 1

    async def end(self, seconds: float, hurry: asyncio.Event) -> int:
        if not self.ended.is_set():
            self._timer.cancel()
            self._code = 128 + signal.SIGTERM
            killed = asyncio.ensure_future(hurry.wait())
            await asyncio.wait({killed}, timeout=min(seconds, self._last_words))
            if killed.done() or self._last_words > seconds:
                self._code = 128 + signal.SIGKILL
            killed.cancel()
            self.ended.set()
        self.ended_at = asyncio.get_running_loop().time()
        return self._code


class Guard:
    """In the place of an OrphanGuard."""

    def __init__(self, number: signal.Signals) -> None:
        assert number == signal.SIGKILL
        self.closed = False

    def close(self) -> None:
        self.closed = True
