"""Child processes, one process group each, and a guard that kills the groups when this process dies.

`ChildProcess` is polled (workers of a fleet), `ProcessGroup` is awaited (the command of `nullworker work`). Each group
is registered with an `OrphanGuard` from its start until all of its processes have ended. A process that starts a new
session (setsid, a daemon) leaves its group and is not ended.
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
from pathlib import Path
from typing import Final

#: Seconds between two checks of a group after SIGTERM.
LOOK_SECONDS: Final = 0.02
#: Seconds until a killed group has ended; a process that waits for a disk may take longer.
KILLED_SECONDS: Final = 5.0
#: prctl(2): orphaned descendants become children of this process.
_PR_SET_CHILD_SUBREAPER: Final = 36


#: Reads lines `+ group` and `- group` up to the end of its input; $1 is the number of the signal.
_SHELL: Final = """
while read -r op group; do
    case "$op$all" in
        +*" $group "*) ;;
        +*) all="$all $group " ;;
        -*" $group "*) all="${all%%" $group "*} ${all#*" $group "}" ;;
    esac
done
for group in $all; do kill "-$1" "-$group"; done
"""


class OrphanGuard:
    """Sends the signal `number` to registered process groups if this process dies, or at `close`.

    A shell reads a pipe whose other end is open only in this process, so the pipe ends with the process, also after
    SIGKILL. The shell has its own session, so that Ctrl-C in a terminal does not reach it.
    """

    def __init__(self, number: signal.Signals) -> None:
        self._shell = subprocess.Popen(  # noqa: S603  # a constant
            ["/bin/sh", "-c", _SHELL, "guard", str(int(number))],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # messages about groups that have just ended
            start_new_session=True,
        )

    def hold(self, group: int) -> None:
        """Register a group."""
        self._tell(f"+ {group}")

    def forget(self, group: int) -> None:
        """Unregister a group, after all of its processes have ended."""
        self._tell(f"- {group}")

    def close(self) -> None:
        """Signal the groups that are still registered, and wait for the shell."""
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()


class ChildProcess:
    """A command in its own process group, with its output appended to the file `out`.

    Ctrl-C in a terminal reaches only this process, which then ends its children in order.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: Path, guard: OrphanGuard
    ) -> None:
        self._guard = guard
        self._kill_at: float | None = None
        with out.open("ab") as file:
            self._process = subprocess.Popen(  # noqa: S603  # this program, or the command that the user gave
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self._process.pid
        guard.hold(self.pid)

    @property
    def ending(self) -> bool:
        """Whether `end` was called."""
        return self._kill_at is not None

    def end(self, kill_at: float) -> None:
        """Send SIGTERM, at each call; `poll` sends SIGKILL after the earliest `kill_at` (epoch s) of all calls."""
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a stopped process would not see SIGTERM

    def poll(self, now: float) -> int | None:
        """The exit code, -n for signal n, once the command has ended and its group was killed; else None."""
        code = self._process.poll()
        if code is None:
            if self._kill_at is not None and now >= self._kill_at:
                self._signal(signal.SIGKILL)
            return None
        self._signal(signal.SIGKILL)  # processes that it has left
        self._guard.forget(self.pid)
        return code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def how_it_ended(code: int) -> str:
    """The exit code of a process in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class ProcessGroup:
    """A command in its own process group, with the stdout and stderr of this process and no stdin.

    This process becomes the subreaper of its descendants and `reap` collects every child that has ended, so that an
    empty group can be recognized also in a container whose process 1 does not reap. The exit code of the command is
    read first, by Popen; asyncio's child watcher would take it.

    Attributes:
        pid: of the command, and of the group.
        ended: set when the command has ended; others of the group may still run.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], guard: OrphanGuard) -> None:
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(  # noqa: S603  # the command that the user gave
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self._process.pid
        self.ended = asyncio.Event()
        self._guard = guard
        guard.hold(self.pid)

    def reap(self) -> None:
        """Reap every child of this process that has ended; call it at SIGCHLD, also after `end` has returned."""
        if sys.platform == "linux":  # only Linux has subreapers
            with contextlib.suppress(ChildProcessError):  # it has no child
                while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    self._process.poll()  # if it is the command, this keeps its exit code
                    with contextlib.suppress(ChildProcessError):  # poll has reaped it
                        os.waitpid(dead.si_pid, os.WNOHANG)
        if self._process.poll() is not None:
            self.ended.set()

    async def end(self, seconds: float, hurry: asyncio.Event) -> int:
        """Send SIGTERM, and SIGKILL after `seconds` or at `hurry`. Returns the exit code, 128 + n after a signal n."""
        if self._tell(signal.SIGTERM):
            self._tell(signal.SIGCONT)  # a stopped process would not see SIGTERM
        if not await self._is_empty(seconds, hurry):
            self._tell(signal.SIGKILL)
            await self._is_empty(KILLED_SECONDS, asyncio.Event())
        await self.ended.wait()
        self._guard.forget(self.pid)
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
        """Signal the group. Returns whether it has any process."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # a process of the group has changed its user
            pass
        return True
