"""Time: the only module in this package that reads a clock.

Deadlines are stored as epoch seconds so that they survive a restart. The wall clock may be set at any moment, by NTP
or by hand, and that must neither end nor prolong a reservation. The worker's time is therefore the wall clock at one
moment (the anchor) plus the monotonic time since. After a restart within the same boot, the stored anchor is used
again while something is held; an idle worker follows the wall clock.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, Protocol

#: Linux gives each boot an id; monotonic clocks can be compared only within one.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: Seconds from an arbitrary start, to measure how long something takes.
stopwatch = time.perf_counter

#: Epoch seconds as the machine has them, for log lines; they may jump.
wall = time.time

#: Seconds of difference between the wall clock and the worker's time that are worth a correction.
DRIFT_SECONDS = 1.0


class Anchor(NamedTuple):
    """Epoch seconds at monotonic zero, and the boot for which that holds ("" where boots have no id)."""

    boot_id: str
    offset: float


class Clock(Protocol):
    """What the service asks for the time."""

    def now(self) -> float:
        """Epoch seconds; never goes backwards while something is held."""
        ...

    def settle(self) -> Anchor | None:
        """Take the wall clock again, if it has moved away; call it only when nothing is held.

        Returns the new anchor when there is one, to be stored.
        """
        ...


class SystemClock:
    """The real clock. `anchor` is a stored one, to go on with after a restart; one of another boot is ignored."""

    def __init__(self, anchor: Anchor | None = None) -> None:
        self.boot_id = _read_boot_id()
        if anchor is not None and self.boot_id and anchor.boot_id == self.boot_id:
            self._offset = anchor.offset
        else:
            self._offset = time.time() - time.monotonic()

    @property
    def anchor(self) -> Anchor:
        """What to store."""
        return Anchor(self.boot_id, self._offset)

    def now(self) -> float:
        """Epoch seconds, as counted since the anchor."""
        return self._offset + time.monotonic()

    def settle(self) -> Anchor | None:
        """Take the wall clock again if it differs by more than DRIFT_SECONDS."""
        offset = time.time() - time.monotonic()
        if abs(offset - self._offset) <= DRIFT_SECONDS:
            return None
        self._offset = offset
        return self.anchor


def wall_iso() -> str:
    """The wall clock as it is now, to the second: for lock files and names of files, never for deadlines."""
    return iso(time.time())[:19] + "Z"


def to_ms(at: float) -> float:
    """Epoch seconds to the millisecond, rounded by the very sum that the log's views make (schema.py).

    They do not leave it to strftime, which rounds by a sum of its own, and before SQLite 3.38 cuts off.
    """
    return int(at * 1000 + 0.5) / 1000


def elapsed(start: float, end: float) -> float | int:
    """Seconds between two times as they are shown, to the millisecond; a whole number where it is one.

    Never negative: between two starts of a worker the clock may have been set back.
    """
    return tidy(max(to_ms(end) - to_ms(start), 0.0))


def tidy(seconds: float) -> float | int:
    """A span of seconds to the millisecond, and as a whole number where it is one."""
    rounded = round(seconds, 3)
    return int(rounded) if rounded.is_integer() else rounded


def iso(at: float) -> str:
    """Epoch seconds as ISO 8601 UTC with milliseconds: `2026-11-24T14:05:00.123Z`."""
    moment = datetime.fromtimestamp(to_ms(at), tz=timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_iso(text: str) -> float:
    """Epoch seconds of an ISO 8601 time; one without a zone is taken as UTC.

    Raises:
        ValueError: it is no such time.
    """
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def from_shown(text: str) -> float:
    """The first moment that is shown as this ISO 8601 time: an event of a log of version 1 is finer than it is shown.

    Raises:
        ValueError: it is no such time.
    """
    return from_iso(text) - 0.0005


def _read_boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
