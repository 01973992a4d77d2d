"""A process with its output in a file, and the certainty that it does not outlive this one.

Each child is a process group of its own: Ctrl-C in a terminal reaches this process alone, which then stops the others
in order. The lifeline ends them when this process is killed before it could.

The one rule: what is started here is known to the lifeline until it has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from nullworker.lifeline import Lifeline


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
