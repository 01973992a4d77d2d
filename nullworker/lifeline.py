"""The certainty that what this process has started does not outlive it: a shell that does nothing but wait.

Its input is a pipe whose other end only this process has. The pipe ends when this process does, kill -9 included, and
then the shell signals what it still holds. It leads a session of its own, so that Ctrl-C in a terminal spares it.

The one rule: a process group is held from its start until nothing of it runs; what is held at the end gets the signal.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import Final

#: Reads `+ group` and `- group`, to the end of its input; $1 is the number of the signal.
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


class Lifeline:
    """Sends `number` to the process groups that it holds when this process dies, or when it is closed."""

    def __init__(self, number: signal.Signals) -> None:
        self._shell = subprocess.Popen(  # noqa: S603  # a constant
            ["/bin/sh", "-c", _SHELL, "lifeline", str(int(number))],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a group that has just ended by itself
            start_new_session=True,
        )

    def hold(self, group: int) -> None:
        """From now on."""
        self._tell(f"+ {group}")

    def forget(self, group: int) -> None:
        """Nothing of it runs any more."""
        self._tell(f"- {group}")

    def close(self) -> None:
        """End what is still held, as if this process had died; and wait for the shell."""
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()
