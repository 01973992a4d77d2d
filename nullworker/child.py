"""A process with its output in a file, and the certainty that it does not outlive this one.

Each child is a process group of its own: Ctrl-C in a terminal reaches this process alone, which then stops the others
in order. The lifeline, a shell that does nothing but wait, ends them when this process is killed before it could.

The one rule: what is started here is known to the lifeline until it has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

#: Reads `+ group` and `- group`; when its input ends, this process is dead: what is left gets SIGTERM.
_GUARD: Final = """
while read -r op group; do
    case $op in
        +) all="$all $group " ;;
        -) all="${all%%" $group "*} ${all#*" $group "}" ;;
    esac
done
for group in $all; do kill -TERM "-$group"; done
"""


class Lifeline:
    """Ends the groups that it holds when this process dies, kill -9 included."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(  # noqa: S603  # a constant
            ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def hold(self, group: int) -> None:
        """From now on."""
        self._tell(f"+ {group}")

    def forget(self, group: int) -> None:
        """It has ended."""
        self._tell(f"- {group}")

    def close(self) -> None:
        """Nothing is left to hold."""
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()


class Child:
    """A running command; its output is appended to the file `out`.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: Path, lifeline: Lifeline
    ) -> None:
        self._lifeline = lifeline
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
        lifeline.hold(self.pid)

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._kill_at is not None

    def end(self, kill_at: float) -> None:
        """SIGTERM now, each time this is called; SIGKILL at the earliest `kill_at` (epoch seconds) of all calls."""
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # what is stopped would not hear it

    def poll(self, now: float) -> int | None:
        """The exit code, -n for signal n, once it has ended; then nothing of its group runs any more."""
        code = self._process.poll()
        if code is None:
            if self._kill_at is not None and now >= self._kill_at:
                self._signal(signal.SIGKILL)
            return None
        self._signal(signal.SIGKILL)  # what it has left behind
        self._lifeline.forget(self.pid)
        return code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def how_it_ended(code: int) -> str:
    """In words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
