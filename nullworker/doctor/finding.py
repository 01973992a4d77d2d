"""A finding of `nullworker doctor` and how it is printed.

A finding that is not ok says why that matters, and has the command or setting that fixes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the name of the check.
        what: what was found.
        why: why it matters; empty if it is ok.
        fix: the command or setting that fixes it; empty if it is ok.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""


def ok(check: str, what: str) -> Finding:
    """Nothing to change."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, *, why: str, fix: str) -> Finding:
    """It works, but costs money or may fail later."""
    return Finding(check, "warning", what, why, fix)


def failed(check: str, what: str, *, why: str, fix: str) -> Finding:
    """It does not work, or does not suit workers with one reservation."""
    return Finding(check, "error", what, why, fix)
