"""One command in a process group and session of its own, and the end of that group, whatever it takes.

A group is ended by SIGTERM, and by SIGKILL for what is left after a while: the command, its children, and children
that it has left behind. The lifeline kills the group when this process itself is killed. What it leaves out: a process
that starts a session of its own (setsid, a daemon) is not in the group any more.

The one rule: when `end` has returned, nothing of the group runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence

from nullworker.lifeline import Lifeline

#: Seconds between two looks at a group that has been told to end.
LOOK_SECONDS = 0.02
#: Seconds until the kernel has removed what was killed; a process that waits for a disk may take longer.
KILLED_SECONDS = 5.0
#: prctl(2): who has lost its parent becomes this process's child, so that it can be waited for in any container.
_PR_SET_CHILD_SUBREAPER = 36


class Group:
    """A running command. Use `start`."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: Lifeline) -> None:
        self.process = process
        self._lifeline = lifeline

    @staticmethod
    async def start(command: Sequence[str], environment: Mapping[str, str], lifeline: Lifeline) -> Group:
        """Start it. It has this process's stdout and stderr, and no stdin.

        Raises:
            OSError: it cannot be started.
        """
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        lifeline.hold(process.pid)
        return Group(process, lifeline)

    async def end(self, seconds: float, hurry: asyncio.Event) -> int:
        """SIGTERM; after `seconds` or at `hurry` SIGKILL. The exit code of the command, 128 + n for signal n."""
        if self._tell(signal.SIGTERM):
            self._tell(signal.SIGCONT)  # what is stopped would not hear it
        if not await self._is_empty(seconds, hurry):
            self._tell(signal.SIGKILL)
            await self._is_empty(KILLED_SECONDS, asyncio.Event())
        code = await self.process.wait()
        self._lifeline.forget(self.process.pid)
        return code if code >= 0 else 128 - code

    async def _is_empty(self, seconds: float, hurry: asyncio.Event) -> bool:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._tell(0):
            if loop.time() >= until or hurry.is_set():
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    def _tell(self, number: int) -> bool:
        """Signal all of the group; False: nobody is in it."""
        if self.process.returncode is not None:
            with contextlib.suppress(ChildProcessError):  # orphans of the group that have ended, ours since the prctl
                while os.waitpid(-self.process.pid, os.WNOHANG) != (0, 0):
                    pass
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody of it has become another user
            pass
        return True
