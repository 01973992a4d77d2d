"""A finding of `nullworker doctor` and how it is printed.

A finding that is not ok says why that matters, and has the command or setting that fixes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """`what` is so; `why` it matters and how to `fix` it: nothing when all is well."""

    check: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""


def ok(check: str, what: str) -> Finding:
    """As it should be."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, *, why: str, fix: str) -> Finding:
    """It works, and will cost or hurt one day."""
    return Finding(check, "warning", what, why, fix)


def wrong(check: str, what: str, *, why: str, fix: str) -> Finding:
    """It does not work, or not as one-reservation workers need it."""
    return Finding(check, "wrong", what, why, fix)
