"""The figures of a soak: samples of each worker process, their trends, and the bounds with their reasons. Pure.

A trend is the median of the slopes between all pairs of samples (Theil-Sen), so that one peak of load does not count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from nullworker.eventlog.opening import WAL_BYTES

#: The part of a life's samples that is not judged: imports, caches, the first of each kind of request.
WARM_UP = 0.2
#: Seconds from which on a life has a rate; a shorter one is judged by how much it has grown.
LONG_SECONDS = 600.0
#: Samples that a trend is made of at most: all pairs of them are looked at.
MOST_FITTED = 400
#: MB an hour, of a long life. What is kept of each claim would show: at 20,000 claims an hour, 200 bytes of each.
MEMORY_PER_HOUR = 4.0
#: MB in a short life: the allocator's arenas and SQLite's page cache (2 MB) still fill.
MEMORY_GROWTH = 6.0
#: Descriptors and threads an hour, and in a short life: the load's own connections come and go.
COUNT_PER_HOUR, COUNT_GROWTH = 6.0, 10.0
#: Bytes of the write-ahead log. SQLite starts it anew at a checkpoint, due at 1000 pages, which is WAL_BYTES; a reader
#: in another process (`nullworker history`) may put that off for as long as it reads.
MOST_WAL = 2 * WAL_BYTES
#: Descriptors above those of a worker that has just started, when the load has ended: the pools of its own callers
#: (autoscaler, callbacks, health) keep their connections for 15 s.
SPARE_FDS = 4


@dataclass
class Sample:
    """One look. `at` is epoch seconds; memory and files in MB; `backlog` are outcomes not yet acknowledged."""

    at: float
    rss: float
    uss: float
    fds: float
    threads: float
    wal: float
    log: float
    backlog: float
    queued: float


FIGURES = [each.name for each in fields(Sample) if each.name != "at"]
#: What may not grow: the bound an hour, the bound in a short life, and the unit.
JUDGED = {
    "rss": (MEMORY_PER_HOUR, MEMORY_GROWTH, "MB"),
    "uss": (MEMORY_PER_HOUR, MEMORY_GROWTH, "MB"),
    "fds": (COUNT_PER_HOUR, COUNT_GROWTH, "descriptors"),
    "threads": (COUNT_PER_HOUR, COUNT_GROWTH, "threads"),
}


@dataclass
class Life:
    """One life of the worker. Times in epoch seconds; `latencies` in seconds, by what they are of.

    `ready`: from when on it may leave nobody without an answer.
    """

    number: int
    begun: float
    over: float = 0.0
    ended_by: str = ""
    samples: list[Sample] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    ready: float = math.inf

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.over - self.begun

    def values(self, figure: str) -> list[float]:
        """All samples of one figure."""
        return [getattr(sample, figure) for sample in self.samples]

    def per_hour(self, figure: str) -> float:
        """The trend after the warm-up; 0 when there are too few samples for one."""
        warm = self._warm()
        return trend([(s.at, getattr(s, figure)) for s in warm]) * 3600

    def grown(self, figure: str) -> float:
        """By how much it has grown after the warm-up, if it went on as the trend."""
        warm = self._warm()
        return self.per_hour(figure) / 3600 * (warm[-1].at - warm[0].at) if warm else 0.0

    def _warm(self) -> list[Sample]:
        return self.samples[int(len(self.samples) * WARM_UP) :]


def trend(points: list[tuple[float, float]]) -> float:
    """The slope of points (x, y), by Theil and Sen; 0 for fewer than three."""
    points = points[:: -(-len(points) // MOST_FITTED) or 1]
    slopes = [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 > x1]
    return statistics.median(slopes) if len(points) > 2 and slopes else 0.0


def unexplained(lost: list[tuple[float, str]], lives: list[Life]) -> Iterator[str]:
    """What was lost, at its time, though the worker was neither starting nor ending, in sentences."""
    for at, what in lost:
        for life in lives:
            if life.ready <= at < life.over:
                yield f"{at - life.ready:.1f} s into life {life.number}, {life.over - at:.1f} s before its end: {what}"


def judge(lives: list[Life], idle_fds: float, last_fds: float) -> Iterator[str]:
    """What is wrong with the figures, in sentences."""
    for life in lives:
        name = f"life {life.number} ({life.seconds:.0f} s)"
        if len(life.samples) < 3:
            yield f"{name} has {len(life.samples)} samples, too few to judge it"
            continue
        for figure, (per_hour, growth, unit) in JUDGED.items():
            if life.seconds >= LONG_SECONDS and life.per_hour(figure) > per_hour:
                yield f"{name}: {figure} grows by {life.per_hour(figure):.1f} {unit} an hour, more than {per_hour:g}"
            elif life.seconds < LONG_SECONDS and life.grown(figure) > growth:
                yield f"{name}: {figure} has grown by {life.grown(figure):.1f} {unit}, more than {growth:g}"
        if max(life.values("wal")) > MOST_WAL / 1e6:
            yield f"{name}: the write-ahead log had {max(life.values('wal')):.1f} MB, more than {MOST_WAL / 1e6:.1f}"
    if last_fds > idle_fds + SPARE_FDS:
        yield f"{last_fds:g} descriptors are open after the load, where an idle worker has {idle_fds:g}"
