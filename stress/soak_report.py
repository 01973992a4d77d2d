"""The report of a soak, for people and for scripts."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil

from stress.soak_figures import FIGURES, LONG_SECONDS, Life
from stress.soak_worker import EXPLAINED

LABELS = {
    "rss": "resident memory, MB",
    "uss": "its own memory, MB",
    "fds": "descriptors",
    "threads": "threads",
    "wal": "write-ahead log, MB",
    "log": "log, MB",
    "backlog": "outcomes owed",
    "queued": "in the queue",
}


@dataclass
class Result:
    """`fds`: of an idle worker, and after the load. `explained`: warnings and errors by event. `wrong`: sentences."""

    lives: list[Life]
    fds: tuple[float, float]
    counts: Counter[str]
    explained: Counter[str]
    wrong: list[str]


def as_text(result: Result) -> str:
    """The figures for people."""
    return "\n".join(_lines(result))


def _lines(result: Result) -> Iterator[str]:
    own = psutil.Process().memory_info().rss / 1e6
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    yield f"{machine}, Python {platform.python_version()}; the soak itself has {own:.0f} MB"
    yield from tables(result.lives)
    yield ""
    yield "  descriptors of an idle worker: {:g}; after the load: {:g}".format(*result.fds)
    yield ""
    for what, count in sorted(result.counts.items()):
        yield f"  {count:>8}  {what}"
    for event, count in sorted(result.explained.items()):
        yield f"  {count:>8}  log line {event}: {EXPLAINED[event]}"
    yield ""
    yield f"wrong {len(result.wrong)}"


def as_json(result: Result) -> str:
    """The figures for scripts."""
    lives = [
        {
            "seconds": life.seconds,
            "ended_by": life.ended_by,
            "per_hour": {figure: life.per_hour(figure) for figure in FIGURES},
            "samples": [asdict(sample) for sample in life.samples],
            "latency_seconds": {
                what: dict(zip(("p50", "p99", "worst"), quantiles(each), strict=True))
                for what, each in life.latencies.items()
            },
        }
        for life in result.lives
    ]
    fds = dict(zip(("idle", "after"), result.fds, strict=True))
    return json.dumps(
        {"lives": lives, "fds": fds, "counts": result.counts, "explained": result.explained, "wrong": result.wrong}
    )


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """p50, p99 and the worst."""
    ordered = sorted(seconds) or [float("nan")]
    return statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]


def tables(lives: list[Life]) -> Iterator[str]:
    """Lines for people: each life, then all of them."""
    for life in lives:
        yield ""
        yield f"life {life.number}, {life.seconds:.0f} s, {len(life.samples)} samples, ended by {life.ended_by}"
        yield from _table([life])
    if len(lives) > 1:
        yield ""
        yield f"all {len(lives)} lives"
        yield from _table(lives)


def _table(lives: list[Life]) -> Iterator[str]:
    """Of one life also the trend: per hour when it was long, else what it came to."""
    long = all(life.seconds >= LONG_SECONDS for life in lives)
    trend = "" if len(lives) > 1 else f"{'per hour' if long else 'grown':>12}"
    yield f"  {'':<22}{'min':>10}{'median':>10}{'max':>10}{trend}"
    for figure in FIGURES:
        values = [value for life in lives for value in life.values(figure)]
        if values:
            row = f"{min(values):>10.1f}{statistics.median(values):>10.1f}{max(values):>10.1f}"
            slope = lives[0].per_hour(figure) if long else lives[0].grown(figure)
            yield f"  {LABELS[figure]:<22}{row}" + (f"{slope:>+12.2f}" if trend else "")
    for what in sorted({what for life in lives for what in life.latencies}):
        p50, p99, worst = quantiles([each for life in lives for each in life.latencies.get(what, [])])
        yield f"  {what:<22}p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms"
