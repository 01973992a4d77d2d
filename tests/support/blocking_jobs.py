"""Functions that block, for processes and threads of a consumer: they must be importable there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def double(number: int) -> int:
    return 2 * number


def raise_value_error() -> None:
    raise ValueError("no such page")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def unpicklable() -> Any:
    return lambda: None


def hang(file: Path) -> None:
    """Writes its own pid and a child's, and goes on."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    file.write_text(f"{os.getpid()} {child.pid}")
    time.sleep(1000)


def ignore_sigterm(file: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(file)


def leave_a_child(file: Path) -> None:
    """Returns while a child of its group goes on, which ignores SIGTERM."""
    child = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; echo > \"$0\"; sleep 1000", str(file)])
    while not file.exists():
        time.sleep(0.01)
    child.returncode = 0  # nobody waits for it


def stand_still(file: Path) -> None:
    """Is stopped, as by Ctrl-Z; says so, and whether it has heard SIGTERM."""

    def told(*_: object) -> None:
        file.write_text("told")
        os._exit(0)

    signal.signal(signal.SIGTERM, told)
    file.write_text("stopped")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def until_file(file: Path) -> None:
    """Blocks until there is a file."""
    while not file.exists():
        time.sleep(0.01)
