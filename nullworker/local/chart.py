"""A bar chart and a table for the terminal. Pure. Falls back to ASCII where stdout cannot encode the characters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

COLUMNS: Final = 64  # of the time axis; 80 with the names


class Bar(NamedTuple):
    """The bar of one worker, in seconds since the start. `holds`: pairs of begin and end."""

    name: str
    started: float
    ready: float
    ended: float
    holds: list[tuple[float, float]]


def chart(bars: Iterable[Bar], seconds: float) -> str:
    """The bars over one time axis, and the number of workers in each column."""
    starting, idle, held = _glyphs()
    per_column = seconds / COLUMNS
    lines, alive = [], [0] * COLUMNS
    for bar in bars:
        cells = ""
        for column in range(COLUMNS):
            at = (column + 0.5) * per_column
            alive[column] += bar.started <= at < bar.ended
            if any(begin <= at < end for begin, end in bar.holds):
                cells += held
            elif bar.started <= at < bar.ended:
                cells += starting if at < bar.ready else idle
            else:
                cells += " "
        lines.append(f"{bar.name:<10} {cells}".rstrip())
    count = "".join(str(min(workers, 9)) for workers in alive)
    legend = f"{'':<10} {starting} starts   {idle} is ready, idle or stopping   {held} is reserved"
    return "\n".join([f"{'seconds':<10} {_axis(seconds)}", *lines, f"{'workers':<10} {count}", legend])


def _axis(seconds: float) -> str:
    """The labels of the time axis."""
    step = next((step for step in (1, 2, 5, 10, 20, 60) if seconds / step <= 8), 300)
    axis = ""
    for mark in range(0, int(seconds) + 1, step):
        axis = axis.ljust(int(mark / seconds * COLUMNS)) + str(mark)
    return axis


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with columns as wide as their contents; None is shown as `-`."""
    cells = [list(names), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _glyphs() -> tuple[str, str, str]:
    drawn = ("·", "░", "█")
    try:
        "".join(drawn).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return (".", "-", "#")
    return drawn
