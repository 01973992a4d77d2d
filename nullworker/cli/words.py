"""Terminal output for people: times, durations, names of reservations, and folding of lines.

The width is 80 columns if the terminal does not say otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

#: Columns of a terminal that does not say how wide it is.
WIDTH: Final = 80


def width() -> int:
    """Columns of the terminal: those of COLUMNS, else its own."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def job_name(metadata: Mapping[str, Any] | None) -> str:
    """The name of a reservation: its caller's metadata, as `job=42 user=ada`; empty without metadata.

    Control characters, which a terminal would execute, are replaced.
    """
    name = " ".join(f"{name}={_plain(value)}" for name, value in (metadata or {}).items())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def clock_time(iso: str) -> str:
    """A time of the log, to the second: `2026-11-26T21:35:02Z`. The commands take it as --since."""
    return f"{iso[:19]}Z"


def duration(seconds: float) -> str:
    """`3.2s`, `49m53s`, `26h05m` or `12d03h`: at most 7 columns below a century."""
    if seconds < 59.95:
        return f"{max(seconds, 0):.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 100 else f"{hours // 24}d{hours % 24:02d}h"


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character (Chinese, emoji), none for an accent."""
    return len(text) if text.isascii() else sum(map(_columns_of_character, text))


def _columns_of_character(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def fit(text: str, columns: int) -> str:
    """A text in so many columns, cut with an ellipsis."""
    if columns_of(text) <= columns:
        return text
    ends = itertools.accumulate(map(_columns_of_character, text))
    return text[: sum(end < columns for end in ends)] + "\N{HORIZONTAL ELLIPSIS}"


def padded(text: str, columns: int) -> str:
    """A text and as many spaces as it takes to fill so many columns."""
    return text + " " * (columns - columns_of(text))


def folded(text: str, indent: int) -> list[str]:
    """A text in lines for the width of the terminal less `indent` columns. Words, such as paths, are not broken.

    Output into a pipe is for a program, and stays one line.
    """
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return [text]
    room = max(width() - indent, WIDTH // 4)
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
