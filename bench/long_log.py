"""Measures a worker on a log of millions of events: its start, its memory, and the time of scrapes and queries.

    python -m bench.long_log [--events 10000000] [--keep FILE]

Alternates with the same on an empty log.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from bench.peers import Peer
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held, Queued, to_row
from nullworker.testing import FakeAutoscaler

ASKED = ("/metrics", "/status", "/reservations?limit=50", "/reservations?limit=50&state=cancelled")


def histories(events: int) -> Iterator[list[tuple[object, ...]]]:
    """Batches of rows: reservations of three events each, one in fifty cancelled, a minute apart."""
    batch: list[tuple[object, ...]] = []
    for number in range(events // 3):
        at, name = 1_600_000_000.0 + 60 * number, f"old{number:013}"
        seq = 3 * number + 1
        end = ("cancelled", "client_disconnect") if number % 50 == 0 else ("released", "explicit")
        terms = Queued(kind="request", duration_cap=3600.0, give_up_at=at + 30, request_idx=number)
        for offset, event in enumerate(
            (
                Event(at, name, "queued", None, terms),
                Event(at, name, "held", None, Held(at + 3600)),
                Event(at + 30, name, *end, Ended()),  # type: ignore[arg-type]
            )
        ):
            batch.append((seq + offset, *to_row(event)))
        if len(batch) >= 30_000:
            yield batch
            batch = []
    if batch:
        yield batch


def make(path: Path, events: int) -> None:
    """A log with so many events, all acknowledged by the autoscaler. Keeps one that is there."""
    if path.exists():
        return
    log = open_log(path)
    log.conn.execute("PRAGMA synchronous = OFF")
    for batch in histories(events):
        log.conn.execute("BEGIN")
        log.conn.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", batch)
        log.conn.execute("COMMIT")
        print(f"  {batch[-1][0]:>10} events", end="\r", flush=True)
    log.last_seq = log.conn.execute("SELECT max(seq) FROM events").fetchone()[0]
    for name in ("worker_status", "delete_requests"):
        log.move_cursor(name, log.last_seq)
    log.close()
    print()


async def measure(vast: FakeAutoscaler, path: Path, folder: Path, asks: int) -> dict[str, float]:
    """One start on that log, and each question some times."""
    async with Peer("nullworker", vast, folder, NULL_EVENT_LOG=str(path)) as peer:
        figures = {
            "spawn -> port open, s": peer.seconds_to_port,
            "spawn -> ready reported, s": peer.seconds_to_ready,
            "memory when ready, MB": peer.memory(),
        }
        for route in ASKED:
            times = []
            for _ in range(asks):
                started = time.perf_counter()
                async with peer.http.get(peer.control + route, timeout=aiohttp.ClientTimeout(total=60)) as answer:
                    await answer.read()
                times.append((time.perf_counter() - started) * 1e3)
            figures[f"GET {route}, p50, ms"] = statistics.median(times)
            figures[f"GET {route}, p99, ms"] = statistics.quantiles(times, n=100)[98]
        return figures


async def run(events: int, keep: Path | None, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        long_log = keep or folder / "long.db"
        make(long_log, events)
        table: dict[str, dict[str, list[float]]] = {}
        async with FakeAutoscaler() as vast:
            for number in range(rounds):
                for label, path in (("long", long_log), ("empty", folder / f"empty{number}.db")):
                    make(path, 3)
                    for figure, value in (await measure(vast, path, folder, 200)).items():
                        table.setdefault(figure, {"long": [], "empty": []})[label].append(value)
        print(f"{events} events, {long_log.stat().st_size / 1e9:.2f} GB\n")
        print("| figure | long : empty | long | empty |\n|---|---|---|---|")
        for figure, values in table.items():
            long, empty = (statistics.median(values[label]) for label in ("long", "empty"))
            print(f"| {figure} | {long / empty:.2f} | {long:.3g} | {empty:.3g} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.long_log", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="a file for the long log, made if it is not there")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(run(options.events, options.keep, options.rounds))


if __name__ == "__main__":
    main()
