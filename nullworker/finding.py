"""What `nullworker doctor` has found out about one thing, and how it is said.

The one rule: what is not as it should be says why that matters, and the exact command or setting that mends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import click

Level = Literal["ok", "warning", "wrong"]

_COLOURS: Final = {"ok": "green", "warning": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Finding:
    """`what` is so; `why` it matters and how to `mend` it: nothing when all is well."""

    check: str
    level: Level
    what: str
    why: str = ""
    mend: str = ""


def ok(check: str, what: str) -> Finding:
    """As it should be."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, *, why: str, mend: str) -> Finding:
    """It works, and will cost or hurt one day."""
    return Finding(check, "warning", what, why, mend)


def wrong(check: str, what: str, *, why: str, mend: str) -> Finding:
    """It does not work, or not as one-reservation workers need it."""
    return Finding(check, "wrong", what, why, mend)


def show(findings: Iterable[Finding]) -> None:
    """A paragraph for each that needs one, a line for each that does not."""
    for each in findings:
        level = click.style(f"{each.level:<8}", fg=_COLOURS[each.level])
        click.echo(f"{level} {each.check:<18} {each.what}")
        if each.level != "ok":
            click.echo(f"{'':<9}{'why':<18} {each.why}\n{'':<9}{'mend':<18} {each.mend}")
