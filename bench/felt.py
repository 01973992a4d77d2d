"""Latency as users notice it: how long until each side knows of an event. Real processes with default settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.children import PATIENCE, ROOT, Child, running, until
from bench.figures import Figures
from bench.peers import Peer
from nullworker.testing import FakeAutoscaler

#: Times that each is measured in one round: after a quiet second, and within a second of the report before.
TIMES = 8
QUIET_SECONDS, BUSY_SECONDS = (1.2, 2.2), (0.0, 0.8)
#: Jobs on a warm fleet in one round, and the pauses before each, in no step with the polls and longer than one,
#: since a dispatcher that has not seen what a short job has changed waits for one poll more.
WARM_JOBS, WARM_SECONDS = 2, (5.5, 8.5)
#: Defaults of `nullworker dispatch` and `nullworker dev`, which the names of the figures tell.
POLL, IDLE = "--interval 5", "--inactivity-timeout 10"


async def told(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """From a claim to its consumer and to the autoscaler, and from the release to the autoscaler."""
    if name not in ("nullworker", "SDK"):
        return {}
    rng = random.Random(7)
    consumer, seen = list[float](), dict[str, list[float]]()

    async def once(peer: Peer, when: str, pause: tuple[float, float]) -> None:
        await asyncio.sleep(rng.uniform(*pause))
        poll = asyncio.ensure_future(_held(peer)) if name == "nullworker" else None
        await asyncio.sleep(0.05)  # the consumer waits for it
        began = time.perf_counter()
        waiting = asyncio.ensure_future(peer.reserve(peer.body()))
        if poll is not None:
            consumer.append(await poll - began)
        await vast.wait_for(lambda: peer.statuses[-1]["cur_load"] > 0, PATIENCE)
        seen.setdefault(f"reserve -> autoscaler knows, {when}", []).append(time.perf_counter() - began)
        await asyncio.sleep(rng.uniform(*pause))
        outcomes = peer.outcomes
        began = time.perf_counter()
        assert await peer.release()
        await vast.wait_for(lambda: peer.outcomes > outcomes, PATIENCE)
        seen.setdefault(f"release -> autoscaler knows, {when}", []).append(time.perf_counter() - began)
        await waiting

    async with Peer(name, vast, folder) as peer:
        for when, pause in (("after a quiet second", QUIET_SECONDS), ("in a busy second", BUSY_SECONDS)):
            for _ in range(TIMES):
                await once(peer, when, pause)
    figures = {"reserve -> consumer knows, ms": statistics.median(consumer) * 1e3} if consumer else {}
    return figures | {f"{what}, ms": statistics.median(took) * 1e3 for what, took in sorted(seen.items())}


async def _held(peer: Peer) -> float:
    """When the consumer's long poll has told it that something is held."""
    async with peer.http.get(f"{peer.control}/reservation?wait={PATIENCE:g}") as answer:
        await answer.read()
        assert answer.status == 200
        return time.perf_counter()


async def consumer_killed(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """kill -9 of a consumer that is attached, to the end of its reservation."""
    if name != "nullworker":
        return {}
    figures = {}
    for grace in (5, 0):
        async with Peer(name, vast, folder, NULL_CONSUMER_GRACE_SECONDS=str(grace)) as peer:
            work = (sys.executable, "-m", "nullworker", "work", "--control-url", peer.control, "--", "sleep", "60")
            async with running(*work, folder=folder, out="work.log", env={"PYTHONPATH": str(ROOT)}) as consumer:
                waiting = asyncio.ensure_future(peer.reserve(peer.body()))
                await _attached(peer)
                began = time.perf_counter()
                os.killpg(consumer.pid, signal.SIGKILL)
                assert await waiting == 503
                figure = f"consumer killed -> hold ended, NULL_CONSUMER_GRACE_SECONDS={grace}, s"
                figures[figure] = time.perf_counter() - began
    return figures


async def _attached(peer: Peer) -> None:
    give_up_at = time.perf_counter() + PATIENCE
    while time.perf_counter() < give_up_at:
        async with peer.http.get(f"{peer.control}/metrics") as answer:
            if "nullworker_consumer_attached 1.0" in await answer.text():
                return
        await asyncio.sleep(0.02)
    raise TimeoutError("no consumer has attached")


#: The consumer's command: takes the oldest job that waits, and writes down when it began and ended.
_JOB = """\
import sqlite3, time
began = time.time()
jobs = sqlite3.connect("jobs.db", timeout=10, isolation_level=None)
taken = jobs.execute(
    "UPDATE jobs SET began = ? WHERE id = (SELECT min(id) FROM jobs WHERE began IS NULL) RETURNING id", (began,)
).fetchone()
if taken:
    time.sleep(0.5)
    jobs.execute("UPDATE jobs SET ended = ? WHERE id = ?", (time.time(), *taken))
"""
_TABLE = "CREATE TABLE jobs (id INTEGER PRIMARY KEY, queued REAL, began REAL, ended REAL)"
_COUNTS = "SELECT sum(began IS NULL), sum(began IS NOT NULL AND ended IS NULL) FROM jobs"


async def jobs(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """A queue, `nullworker dispatch` and `nullworker dev`: first jobs on a fleet at zero and on a warm one, and back.

    The fleet's machine is this one: what it takes Vast to start a machine is not in it.
    """
    if name != "nullworker":
        return {}
    (folder / "job.py").write_text(_JOB)
    (folder / "workers").mkdir()
    with _opened(folder / "jobs.db") as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(_TABLE)
    cli, env = (sys.executable, "-W", "ignore", "-m", "nullworker"), {"PYTHONPATH": str(ROOT)}
    dev = (*cli, "dev", "--port", "0", "--worker-port", "0", "--control-port", "0", *IDLE.split())
    dev += ("--folder", str(folder / "workers"), "--", *cli, "work", "--", sys.executable, str(folder / "job.py"))
    dispatch = (*cli, "dispatch", "--endpoint", "null", "--max", "3", "--port", "0", *POLL.split())
    async with running(*dev, folder=folder, out="dev.log", env=env) as fleet:
        url = await until("`nullworker dev` starts", lambda: _url(fleet.output()), fleet)
        dispatch += ("--autoscaler", url, "--queue", f"sqlite:///{folder / 'jobs.db'}?query={_COUNTS}")
        async with running(*dispatch, folder=folder, out="dispatch.log", env=env) as dispatcher:
            await until("an endpoint", lambda: "endpoint_found" in dispatcher.output(), dispatcher)
            figures = await _dispatched(folder, fleet, dispatcher)
    return figures


async def _dispatched(folder: Path, fleet: Child, dispatcher: Child) -> Figures:
    rng = random.Random()
    figures, warm = dict[str, float](), list[tuple[float, float, float]]()
    for number in range(1 + WARM_JOBS):
        await asyncio.sleep(rng.uniform(*WARM_SECONDS))
        with _opened(folder / "jobs.db") as db:
            db.execute("INSERT INTO jobs (queued) VALUES (?)", (time.time(),))
        await until("the job is done", lambda done=number + 1: _done(folder) == done, dispatcher, 90.0)  # type: ignore[misc]
        if number:
            warm.append(_parts(folder, number))
        else:
            figures |= _named("a fleet at zero", *_parts(folder, number))
    middle = [statistics.median(part) for part in zip(*warm, strict=True)]
    with _opened(folder / "jobs.db") as db:
        (last,) = db.execute("SELECT max(ended) FROM jobs").fetchone()
    await until("the fleet is back at zero", lambda: not _workers(fleet), fleet, 90.0)
    figures[f"last job done -> fleet at zero, `{IDLE}`, s"] = time.time() - last
    return _named("a warm fleet", *middle) | figures


def _named(fleet: str, job: float, hold: float, begin: float) -> Figures:
    return {
        f"job queued -> job begun on {fleet}, `{POLL}`, s": job,
        f"of it, on {fleet}: queue polled -> worker held, s": hold,
        f"of it, on {fleet}: worker held -> job begun, s": begin,
    }


def _parts(folder: Path, number: int) -> tuple[float, float, float]:
    """Of a job: queued to begun; and of that: from the claim that a poll has opened to its hold, and on to the job."""
    with _opened(folder / "jobs.db") as db:
        queued, began = db.execute("SELECT queued, began FROM jobs ORDER BY id LIMIT 1 OFFSET ?", (number,)).fetchone()
    with _opened(folder / "nullworker-dispatch.db") as ledger:
        query = "SELECT max(at) FROM events WHERE kind = ? AND at <= ?"
        polled, held = (ledger.execute(query, (kind, began)).fetchone()[0] for kind in ("pending", "held"))
    return began - queued, held - polled, began - held


def _done(folder: Path) -> int:
    with _opened(folder / "jobs.db") as db:
        return int(db.execute("SELECT count(ended) FROM jobs").fetchone()[0])


def _workers(fleet: Child) -> int:
    """Worker processes of the fleet that run."""
    count = 0
    for process in psutil.Process(fleet.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            count += process.cmdline()[-1:] == ["serve"]
    return count


def _url(said: str) -> str:
    lines = [line for line in said.splitlines() if "a stand-in for Vast Serverless" in line]
    return lines[0].rpartition(" ")[2] if lines else ""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as conn:
        yield conn
