"""Finds the processes that a test has left: each inherits a mark in its environment, whoever started it."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

MARK = "TEST_MARK"
_psutil: Any = importlib.import_module("psutil")


def marked(mark: str, word: str = "") -> list[int]:
    """The processes with this mark that run, and whose last argument has that word in it."""
    found: list[int] = []
    for process in _psutil.process_iter():
        with contextlib.suppress(_psutil.Error, IndexError):
            if process.environ().get(MARK) == mark and word in process.cmdline()[-1]:
                found.append(process.pid)
    return found
