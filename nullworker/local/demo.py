"""`nullworker demo`: queue, scaling, reservations and costs on this machine, with real processes and no account.

Ten jobs wait in an SQLite table. `nullworker dispatch`, a process of its own, reserves workers for them; the fake
autoscaler has none and starts three; a consumer beside each worker takes a job for each reservation; with the queue
empty the fleet goes back to zero; and the ledger says what each job cost. The demo fails when the printed story is not
what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from nullworker.aio import on_signals
from nullworker.clock import SystemClock
from nullworker.errors import NullworkerError
from nullworker.local.chart import Bar, chart, table
from nullworker.local.fleet import Fleet
from nullworker.local.fleet_worker import ROOT, Change, Plan
from nullworker.processes import OrphanGuard
from nullworker.settings import Settings, variable
from nullworker.testing import FakeAutoscaler, Parameters

JOBS: Final = 10
JOB_SECONDS: Final = 2.0
PARAMETERS: Final = Parameters(max_workers=3, inactivity_timeout=3.0)
#: Time limits in seconds for the jobs, and then for the end of the fleet; a slow machine needs half of them.
DONE_SECONDS, GONE_SECONDS = 75.0, 25.0
LOOK_SECONDS: Final = 0.1  # between two looks at the jobs

_TABLE: Final = f"""\
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    name TEXT,
    state TEXT DEFAULT 'new',  -- then busy, then done
    reservation TEXT  -- the hold in which it was done
);
WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < {JOBS})
INSERT INTO jobs (name) SELECT 'render-' || id FROM n;
"""
#: The consumer's command, in place of any program: started for each reservation, which its exit releases.
_CONSUMER: Final = f"""\
import os, sqlite3, time

jobs = sqlite3.connect("jobs.db", timeout=10, isolation_level=None)
taken = jobs.execute(
    "UPDATE jobs SET state = 'busy', reservation = ?"
    " WHERE id = (SELECT min(id) FROM jobs WHERE state = 'new') RETURNING id",
    (os.environ["NULLWORKER_RESERVATION_ID"],),
).fetchone()
if taken:
    time.sleep({JOB_SECONDS})  # your work
    jobs.execute("UPDATE jobs SET state = 'done' WHERE id = ?", taken)
"""
#: What the dispatcher asks the queue: how many jobs wait, and how many are worked on.
_QUEUE: Final = "SELECT sum(state = 'new'), sum(state = 'busy') FROM jobs"

_COSTS: Final = """\
SELECT j.name AS job, c.instance AS worker, c.wait_seconds AS waited_s, c.held_seconds AS held_s,
       printf('%.6f', c.dollars) AS dollars, c.reason, c.result ->> 'exit_code' AS exit_code
  FROM claims AS c JOIN jobs AS j ON j.reservation = c.session_id
 ORDER BY j.id"""
_DAILY: Final = "SELECT day, claims, held, open, hours, dollars, p50_wait_seconds AS p50_wait_s FROM daily"
_STEPS: Final = """\
SELECT seq, substr(at, 12, 12) AS at, kind, reason
  FROM timeline WHERE reservation_id = {reservation!r}
 ORDER BY seq"""
_FORGERY: Final = "DELETE FROM events"


class DemoFailed(NullworkerError):
    """The demo did not run as it should."""


class Narrator:
    """Prints each step with the seconds since the start, and records the changes of workers."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.since = now()
        self.changes: list[Change] = []

    def say(self, who: str, what: str) -> None:
        """Print one line."""
        click.echo(f"{self._now() - self.since:6.1f} s  {who:<9} {what}")

    def changed(self, change: Change) -> None:
        """Print a change of a worker's state; holds are printed by the dispatcher."""
        first = not any(earlier.worker == change.worker and earlier.state == "ready" for earlier in self.changes)
        self.changes.append(change)
        words = {"starting": "starts", "stopping": f"stops: {change.why}", "gone": "is gone", "cold": "is gone"}
        if change.state == "ready" and first:
            words["ready"] = "is ready, and has said so to the autoscaler"
        if change.state in ("errored", "dead"):
            words[change.state] = f"is {change.state}: {change.why}"
        if change.state in words:
            self.say(f"worker {change.worker}", words[change.state])


async def run(folder: Path) -> None:
    """Run the demo. SIGINT and SIGTERM end it in order; further signals are ignored."""
    task = asyncio.ensure_future(_demo(folder))
    received: list[int] = []

    def stop(number: int) -> None:
        if not received:
            task.cancel()
        received.append(number)

    on_signals(stop, (signal.SIGINT, signal.SIGTERM))
    try:
        await task
    except asyncio.CancelledError:
        raise click.exceptions.Exit(128 + received[0]) from None


async def _demo(folder: Path) -> None:
    if importlib.util.find_spec("vastai") is None:
        raise DemoFailed("the official client is not installed: pip install 'nullworker[client]'")
    now = SystemClock().now
    (folder / "consumer.py").write_text(_CONSUMER)
    with _opened(folder / "jobs.db") as jobs:
        jobs.executescript(_TABLE)
    consumer = (sys.executable, "-m", "nullworker", "work", "--", sys.executable, "consumer.py")
    plan = Plan(folder, environment(), consumer=consumer)
    async with FakeAutoscaler(
        parameters=dataclasses.replace(PARAMETERS), mtoken=secrets.token_hex(8), clock=now
    ) as vast:
        _introduce(vast)
        narrator = Narrator(now)
        narrator.say("queue", f"{JOBS} jobs wait; no workers, no costs")
        async with Fleet(vast, plan, now, narrator.changed) as fleet:
            try:
                async with _dispatch(folder, vast, narrator):
                    await _watched(fleet, _until_done(folder, narrator), DONE_SECONDS, "the jobs are not done")
                    await _watched(fleet, fleet.until_empty(), GONE_SECONDS, "the fleet is not back at zero")
            except BaseException:
                fleet.hurry()
                raise
        narrator.say("fleet", "no workers, no costs")
        _check(vast, narrator)
    numbers = sorted({change.worker for change in narrator.changes})
    click.echo(_heading("What the workers did"))
    click.echo(chart(_bars(folder, numbers, narrator), now() - narrator.since))
    _audit(folder, numbers)


def environment() -> dict[str, str]:
    """The environment of this process without worker settings, which may belong to another worker."""
    settings = {variable(setting.name) for setting in dataclasses.fields(Settings)}
    return {name: value for name, value in os.environ.items() if name not in settings}


def _introduce(vast: FakeAutoscaler) -> None:
    click.echo(_heading("Ten jobs in your queue, and workers that are there only while they work"))
    click.echo(f"autoscaler  a stand-in for Vast Serverless at {vast.url}; nothing leaves this machine")
    click.echo(f"queue       the table jobs of jobs.db: {_QUEUE}")
    click.echo("dispatcher  nullworker dispatch --max 3, with the official client")
    click.echo("workers     nullworker serve, on demand, three at most")
    click.echo("consumer    nullworker work -- python consumer.py, beside each worker\n")


@contextlib.asynccontextmanager
async def _dispatch(folder: Path, vast: FakeAutoscaler, narrator: Narrator) -> AsyncIterator[None]:
    """`nullworker dispatch` as a process, until the block ends; what it does is narrated."""
    guard = OrphanGuard(signal.SIGKILL)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "nullworker", "dispatch", "--endpoint", vast.endpoint),
        *("--autoscaler", vast.url, "--queue", f"sqlite:///{folder / 'jobs.db'}?query={_QUEUE}", "--max", "3"),
        *("--interval", "1", "--settle", "3", "--attach", "0", "--port", "0", "--log-format", "json"),
        *("--ledger", str(folder / "nullworker-dispatch.db")),
        cwd=folder,
        env={**environment(), "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    guard.hold(process.pid)
    reading = asyncio.ensure_future(_narrate(process, narrator))
    try:
        yield
        process.terminate()
        if await process.wait():
            raise DemoFailed("the dispatcher did not end as it should")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        reading.cancel()
        guard.forget(process.pid)
        guard.close()


async def _narrate(process: asyncio.subprocess.Process, narrator: Narrator) -> None:
    assert process.stderr is not None
    async for raw in process.stderr:
        try:
            line = json.loads(raw)
        except ValueError:
            line = {"event": "error", "level": "error", "message": raw.decode(errors="replace").strip()}
        if line["event"] == "decided" and line["opened"]:
            what = f"{line['waiting']} wait, {line['in_flight']} in flight, {line['held']} held"
            narrator.say("dispatch", f"{what}: asks for {line['opened']} more")
        elif line["event"] == "claim_held":
            narrator.say("dispatch", f"held on {line['url']}, after {line['waited']:.1f} s")
        elif line["level"] == "error":
            narrator.say("dispatch", str(line.get("message", line["event"])))


async def _until_done(folder: Path, narrator: Narrator) -> None:
    """Wait until every job is done and every hold has ended."""
    done: set[str] = set()
    while True:
        with _opened(folder / "jobs.db") as jobs:
            names = [name for (name,) in jobs.execute("SELECT name FROM jobs WHERE state = 'done' ORDER BY id")]
        for name in names:
            if name not in done:
                narrator.say(name, "is done")
        done.update(names)
        if len(done) == JOBS:
            with _opened(folder / "nullworker-dispatch.db") as ledger:
                if not ledger.execute("SELECT count(*) FROM open_claims").fetchone()[0]:
                    narrator.say("queue", "is empty")
                    return
        await asyncio.sleep(LOOK_SECONDS)


async def _watched(fleet: Fleet, work: Any, seconds: float, failure: str) -> None:
    """Await `work`, and fail when the time is over or the fleet fails."""
    task, keeping = asyncio.ensure_future(work), asyncio.ensure_future(fleet.run())
    try:
        done, _ = await asyncio.wait({task, keeping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise DemoFailed(f"{failure} after {seconds:g} s: try `nullworker demo --keep`, and look at the logs there")
        for finished in done:
            finished.result()
    finally:
        for finished in (task, keeping):
            finished.cancel()
        await asyncio.gather(task, keeping, return_exceptions=True)


def _check(vast: FakeAutoscaler, narrator: Narrator) -> None:
    outcomes = Counter(outcome["status"] for outcome in vast.outcomes)
    if outcomes != {"Success": JOBS}:
        raise DemoFailed(f"the autoscaler was told {dict(outcomes)}")
    narrator.say("autoscaler", f"was told: {JOBS} sessions, {JOBS} times Success")


def _bars(folder: Path, numbers: list[int], narrator: Narrator) -> Iterator[Bar]:
    """One bar for each worker: process times as observed, holds from its log; in seconds since the start."""
    for number in numbers:
        at: dict[str, float] = {}
        for change in narrator.changes:
            if change.worker == number:
                at.setdefault(change.state, change.at - narrator.since)
        with _opened(_log(folder, number)) as conn:
            holds = conn.execute(
                "SELECT h.at, e.at FROM events h JOIN events e USING (reservation_id)"
                " WHERE h.kind = 'held' AND e.kind IN ('released', 'expired', 'cancelled')"
            ).fetchall()
        end = at.get("gone", at.get("cold", at["starting"]))
        spans = [(begin - narrator.since, end - narrator.since) for begin, end in holds]
        yield Bar(f"worker {number}", at["starting"], at.get("ready", end), end, spans)


def _audit(folder: Path, numbers: list[int]) -> None:
    """Query the ledger and a worker's log with plain SQL."""
    ledger = folder / "nullworker-dispatch.db"
    with _opened(ledger) as conn:
        conn.execute("ATTACH ? AS queue", (str(folder / "jobs.db"),))
        rows = _ask(conn, "What did each job cost? (the dispatcher's ledger, beside the table of jobs)", _COSTS)
        if len(rows) != JOBS:
            raise DemoFailed(f"the ledger knows of {len(rows)} jobs, and {JOBS} were done")
        _ask(conn, "And all of them?", _DAILY)
        reservation = conn.execute("SELECT reservation FROM jobs WHERE id = 1").fetchone()[0]
    for number in numbers:
        with _opened(_log(folder, number)) as conn:
            if conn.execute("SELECT 1 FROM reservations WHERE id = ?", (reservation,)).fetchone():
                question = f"What happened to render-1, step by step? (the log of worker {number})"
                _ask(conn, question, _STEPS.format(reservation=reservation))
    click.echo(_heading("Can the ledger be changed afterwards?"))
    click.echo(f"{_FORGERY};")
    with _opened(ledger) as conn:
        try:
            conn.execute(_FORGERY)
        except sqlite3.Error as error:
            click.echo(f"Error: {error}")
            return
    raise DemoFailed("an event could be removed from the ledger")


def _ask(conn: sqlite3.Connection, question: str, query: str) -> list[Any]:
    cursor = conn.execute(query)
    names = [column[0] for column in cursor.description]
    rows = cursor.fetchall()
    if not rows:
        raise DemoFailed(f"there is no answer to: {question}")
    click.echo(_heading(question))
    click.echo(f"{query};\n")
    click.echo(table(names, rows))
    return rows


def _log(folder: Path, number: int) -> Path:
    return folder / f"nullworker-{number}.db"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as conn:
        yield conn


def _heading(text: str) -> str:
    return "\n" + click.style(text, bold=True)
