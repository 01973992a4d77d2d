"""Time: the only module in this package that reads a clock.

Deadlines are stored as epoch seconds so that they survive a restart. The wall clock may be set at any moment, by NTP
or by hand, and that must neither end nor prolong a reservation. The worker's time is therefore the wall clock at one
moment (the anchor) plus the monotonic time since. After a restart within the same boot, the stored anchor is used
again while something is held; an idle worker follows the wall clock.
"""

from __future__ import annotations

import functools
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, Protocol

#: Linux gives each boot an id; monotonic clocks can be compared only within one.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: A container has its own process 1, on the kernel of its host.
_FIRST_PROCESS = Path("/proc/1/stat")

#: Seconds from an arbitrary start, to measure durations.
stopwatch = time.perf_counter

#: Epoch seconds of the wall clock, which may jump; for log lines.
wall = time.time

#: Seconds between the wall clock and the worker's time above which the worker follows.
DRIFT_SECONDS = 1.0


class Anchor(NamedTuple):
    """The epoch seconds at which the monotonic clock was 0, and the id of the boot ("" if there is none)."""

    boot_id: str
    offset: float


class Clock(Protocol):
    """Who is asked for the time."""

    def now(self) -> float:
        """Epoch seconds; never goes back while something is held."""
        ...


class WorkerClock(Clock, Protocol):
    """What the service asks for the time, and tells when it may follow the wall clock."""

    def moved(self) -> Anchor | None:
        """The anchor of the wall clock, if that has moved away from `now`."""
        ...

    def follow(self, anchor: Anchor) -> None:
        """Take the wall clock again; call it only when nothing is held, and the anchor is stored."""
        ...


class SystemClock:
    """The real clock.

    Args:
        anchor: the stored one, to continue with after a restart; one of another boot is ignored.
        not_before: epoch seconds of the newest event of a live reservation. If the clock is behind it after a reboot,
            time continues from it: no deadline is further away than when it was set, and no duration is negative.
    """

    def __init__(self, anchor: Anchor | None = None, *, not_before: float = 0.0) -> None:
        self.boot_id = boot_id()
        if anchor is not None and self.boot_id and anchor.boot_id == self.boot_id:
            self._offset = anchor.offset
        else:
            self._offset = time.time() - time.monotonic()
        self._offset = max(self._offset, not_before - time.monotonic())

    @property
    def anchor(self) -> Anchor:
        """The anchor to store."""
        return Anchor(self.boot_id, self._offset)

    def now(self) -> float:
        """Epoch seconds, by the monotonic clock since the anchor."""
        return self._offset + time.monotonic()

    def moved(self) -> Anchor | None:
        """The wall clock's anchor, if that differs by more than DRIFT_SECONDS."""
        offset = time.time() - time.monotonic()
        return None if abs(offset - self._offset) <= DRIFT_SECONDS else Anchor(self.boot_id, offset)

    def follow(self, anchor: Anchor) -> None:
        """Take the wall clock again."""
        self._offset = anchor.offset


def wall_iso() -> str:
    """The wall clock as ISO 8601 to the second, for lock files and names of files, never for deadlines."""
    return iso(time.time())[:19] + "Z"


def to_ms(at: float) -> float:
    """Round epoch seconds to the millisecond, by the same formula as the log's views (eventlog/schema.py)."""
    return int(at * 1000 + 0.5) / 1000


def elapsed(start: float, end: float) -> float | int:
    """Seconds between two times, each rounded to the millisecond; an int if it is whole.

    Never negative: between two starts of a worker the clock may have been set back.
    """
    return tidy(max(to_ms(end) - to_ms(start), 0.0))


def tidy(seconds: float) -> float | int:
    """Round a duration to the millisecond; an int if it is whole."""
    rounded = round(seconds, 3)
    return int(rounded) if rounded.is_integer() else rounded


def iso(at: float) -> str:
    """Epoch seconds as ISO 8601 UTC with milliseconds: `2026-11-24T14:05:00.123Z`."""
    second, rest = divmod(int(at * 1000 + 0.5), 1000)
    return f"{_iso_second(second)}.{rest:03}Z"


@functools.lru_cache(maxsize=64)
def _iso_second(second: int) -> str:
    """A whole second; most times that are shown together are of a few seconds."""
    return datetime.fromtimestamp(second, tz=timezone.utc).isoformat()[:19]


def from_iso(text: str) -> float:
    """Epoch seconds of an ISO 8601 time, in UTC if it has no zone.

    Raises:
        ValueError: it is no ISO 8601 time.
    """
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def from_shown(text: str) -> float:
    """The earliest epoch seconds that are shown as this ISO 8601 time, to find events by the time shown.

    Raises:
        ValueError: it is no ISO 8601 time.
    """
    return from_iso(text) - 0.0005


def boot_id() -> str:
    """The id of this boot of the machine; "" where boots have none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def machine_life() -> str:
    """What stays the same until this machine or container starts anew: its boot, and the start of its process 1."""
    try:
        started = _FIRST_PROCESS.read_text().rpartition(")")[2].split()[19]  # proc(5): starttime, in clock ticks
    except (OSError, IndexError):
        started = ""
    return f"{boot_id()} {started}"
