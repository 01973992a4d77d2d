"""One command in a process group and session of its own, and the end of that group, whatever it takes.

A group is ended by SIGTERM, and by SIGKILL for what is left after a while: the command, its children, and children
that it has left behind. The lifeline kills the group when this process itself is killed. What it leaves out: a process
that starts a session of its own (setsid, a daemon) is not in the group any more, and lives for as long as it likes.

So that a group is seen to be empty in any container, also in one whose process 1 waits for nobody, who has lost its
parent becomes a child of this process. When it dies it would stay as a zombie: `reap` takes every child that has ended.
No exit code is taken from anybody: the command is a Popen that is asked first, since asyncio would wait by itself, and
nobody wants to know the code of the lifeline's shell.

The one rule: when `end` has returned, nothing of the group runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from nullworker.lifeline import Lifeline

#: Seconds between two looks at a group that has been told to end.
LOOK_SECONDS = 0.02
#: Seconds until the kernel has removed what was killed; a process that waits for a disk may take longer.
KILLED_SECONDS = 5.0
#: prctl(2): who has lost its parent becomes this process's child.
_PR_SET_CHILD_SUBREAPER = 36


class Group:
    """A running command, with this process's stdout and stderr, and no stdin.

    Attributes:
        pid: of the command, and of the group.
        ended: set when the command has ended; others of the group may still run.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], lifeline: Lifeline) -> None:
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(  # noqa: S603  # the command that the user gave
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self._process.pid
        self.ended = asyncio.Event()
        self._lifeline = lifeline
        lifeline.hold(self.pid)

    def reap(self) -> None:
        """Take every child of this process that has ended; to be called at SIGCHLD, also when `end` has returned."""
        if sys.platform == "linux":  # elsewhere no other's child comes here
            with contextlib.suppress(ChildProcessError):  # it has no child
                while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    self._process.poll()  # first: if this is the command, its exit code is kept
                    with contextlib.suppress(ChildProcessError):  # it was
                        os.waitpid(dead.si_pid, os.WNOHANG)
        if self._process.poll() is not None:
            self.ended.set()

    async def end(self, seconds: float, hurry: asyncio.Event) -> int:
        """SIGTERM; after `seconds` or at `hurry` SIGKILL. The exit code of the command, 128 + n for signal n."""
        if self._tell(signal.SIGTERM):
            self._tell(signal.SIGCONT)  # what is stopped would not hear it
        if not await self._is_empty(seconds, hurry):
            self._tell(signal.SIGKILL)
            await self._is_empty(KILLED_SECONDS, asyncio.Event())
        await self.ended.wait()
        self._lifeline.forget(self.pid)
        code = self._process.returncode
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
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody of it has become another user
            pass
        return True
