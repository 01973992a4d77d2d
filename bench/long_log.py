"""Measures a worker on a log of millions of events: its start, its memory, and the time of scrapes and queries.

    python -m bench.long_log [--events 10000000] [--keep FILE]

Alternates with the same on an empty log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from bench.peers import Peer
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held, Queued, to_row
from nullworker.testing import FakeAutoscaler

ASKED = ("/metrics", "/status", "/reservations?limit=50", "/reservations?limit=50&state=cancelled")


#: Of the first reservation of a long log, epoch seconds; one begins each minute.
FIRST_AT = 1_600_000_000.0
#: In place of a time and a number in the stored data, which is then made by SQLite for each reservation.
_MARK_AT, _MARK_IDX = 123456789.0, 987654321
_INSERT = """
WITH RECURSIVE numbers (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM numbers WHERE number + 1 < :reservations)
INSERT INTO events
SELECT 3 * number + step + 1,
       :first_at + 60 * number + iif(step = 2, 30, 0),
       printf('old%013d', number),
       CASE step WHEN 0 THEN 'queued' WHEN 1 THEN 'held' ELSE iif(number % 50, 'released', 'cancelled') END,
       iif(step = 2, iif(number % 50, 'explicit', 'client_disconnect'), NULL),
       CASE step
            WHEN 0 THEN replace(replace(:queued, :at, :first_at + 60 * number + 30), :idx, number)
            WHEN 1 THEN replace(:held, :at, :first_at + 60 * number + 3600)
            ELSE :ended END
  FROM numbers, (SELECT 0 AS step UNION ALL SELECT 1 UNION ALL SELECT 2)
"""


def make(path: Path, events: int) -> None:
    """A log with so many events, all acknowledged by the autoscaler. Keeps one that is there.

    Reservations of three events each, one in fifty cancelled. SQLite makes the rows itself, without triggers and index,
    which are put back: ten million take a minute, and not half an hour.
    """
    if path.exists():
        return
    open_log(path).close()
    auth = f"{_MARK_IDX:064}"  # unlike in a real log, no hash, but another one for each
    terms = Queued("request", 3600.0, _MARK_AT, request_idx=_MARK_IDX, auth_sha256=auth)
    samples = (
        Event(0.0, "", "queued", None, terms),
        Event(0.0, "", "held", None, Held(_MARK_AT)),
        Event(0.0, "", "released", "explicit", Ended()),
    )
    data = dict(zip(("queued", "held", "ended"), (to_row(each)[-1] for each in samples), strict=True))
    marks = {"at": str(_MARK_AT), "idx": str(_MARK_IDX)}
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        rules = "SELECT type, name, sql FROM sqlite_schema WHERE tbl_name = 'events' AND type IN ('trigger', 'index')"
        taken_out = [row for row in conn.execute(rules) if row[2]]
        conn.execute("PRAGMA journal_mode = OFF")
        conn.execute("PRAGMA synchronous = OFF")
        for kind, name, _ in taken_out:
            conn.execute(f"DROP {kind} {name}")
        conn.execute(_INSERT, {"reservations": max(1, events // 3), "first_at": FIRST_AT, **data, **marks})
        for _, _, sql in taken_out:
            conn.execute(sql)
    log = open_log(path)
    for name in ("worker_status", "delete_requests"):
        log.move_cursor(name, log.last_seq)
    log.close()


def read_once(path: Path) -> None:
    """Bring the file into the page cache, and to the disk: a start on one that was just written waits for both."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while file.read(2**24):
            pass


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
