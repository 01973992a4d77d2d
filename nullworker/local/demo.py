"""`nullworker demo`: queue, scaling, reservations and audit on this machine, with real processes and no account.

Three jobs of a queue reserve a worker each; the fake autoscaler has no worker and starts three, one after the other; a
consumer beside each worker does the job and releases; the idle fleet scales to zero; and the workers' event logs are
queried at the end. The demo fails when the printed story is not what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from nullworker.clock import SystemClock
from nullworker.errors import NullworkerError
from nullworker.local.chart import Bar, chart, table
from nullworker.local.demo_clients import Job, official, official_version, plain
from nullworker.local.fleet import Fleet
from nullworker.local.fleet_worker import Change, Plan
from nullworker.settings import Settings, variable
from nullworker.testing import FakeAutoscaler, Parameters

#: The jobs of the queue: name, seconds of work, and when it asks for a worker, in seconds after the start.
JOBS: Final = (Job("render-1", 6.0, 0.0), Job("render-2", 6.0, 2.0), Job("render-3", 6.0, 4.0))
PARAMETERS: Final = Parameters(max_workers=3, inactivity_timeout=3.0)
#: Time limits in seconds for the jobs, and then for the end of the fleet; a slow machine needs half of them.
JOBS_SECONDS, GONE_SECONDS = 60.0, 25.0

#: The consumer's command, in place of any program: started for each reservation, which its exit releases.
_JOB: Final = """\
import json, os, time

job = json.loads(os.environ["NULLWORKER_RESERVATION_METADATA"])
time.sleep(job["seconds"])  # your work
"""

_OUTCOMES: Final = """\
SELECT metadata ->> 'job' AS job, state, reason, queued_seconds AS queued_s, held_seconds AS held_s,
       result ->> 'exit_code' AS exit_code
  FROM reservations"""
_STEPS: Final = """\
SELECT seq, substr(at, 12, 12) AS at, kind, reason
  FROM timeline WHERE reservation_id = (SELECT id FROM reservations WHERE metadata ->> 'job' = 'render-2')
 ORDER BY seq"""
_DAILY: Final = "SELECT day, reservations, released, open, p50_hold_seconds, busy_seconds FROM daily"
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
        """Print a change of a worker's state; holds are printed by the clients."""
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
    came: list[int] = []

    def stop(number: int) -> None:
        if not came:
            task.cancel()
        came.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        raise click.exceptions.Exit(128 + came[0]) from None


async def _demo(folder: Path) -> None:
    now = SystemClock().now
    (folder / "job.py").write_text(_JOB)
    consumer = (sys.executable, "-m", "nullworker", "work", "--", sys.executable, "job.py")
    plan = Plan(folder, environment(), consumer=consumer)
    async with FakeAutoscaler(
        parameters=dataclasses.replace(PARAMETERS), mtoken=secrets.token_hex(8), clock=now
    ) as vast:
        _introduce(vast)
        narrator = Narrator(now)
        narrator.say("fleet", "no workers, no costs")
        async with Fleet(vast, plan, now, narrator.changed) as fleet:
            try:
                await _watched(fleet, _jobs(vast, narrator), JOBS_SECONDS, "the jobs are not done")
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
    version = official_version()
    client = f"the official vastai {version}" if version else "plain HTTP (for the official: pip install vastai)"
    click.echo(_heading("Three jobs in your queue, and workers that are there only while they work"))
    click.echo(f"autoscaler  a stand-in for Vast Serverless at {vast.url}; nothing leaves this machine")
    click.echo(f"client      {client}")
    click.echo("workers     nullworker serve, on demand, three at most")
    click.echo("consumer    nullworker work -- python job.py, beside each worker\n")


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


async def _jobs(vast: FakeAutoscaler, narrator: Narrator) -> None:
    reserve = official if official_version() else plain

    async def one(job: Job) -> None:
        await asyncio.sleep(job.asked_at)
        narrator.say(job.name, "asks for a worker")
        answer = await reserve(vast, job, environment(), lambda line: narrator.say(job.name, line))
        if answer.get("released") != "consumer_exit" or answer.get("result") != {"exit_code": 0}:
            raise DemoFailed(f"{job.name} ended as {answer}")
        narrator.say(job.name, f"is done: its consumer released the worker after {answer['held_seconds']:.1f} s")

    await asyncio.gather(*(one(job) for job in JOBS))


def _check(vast: FakeAutoscaler, narrator: Narrator) -> None:
    outcomes = Counter(outcome["status"] for outcome in vast.outcomes)
    workers = len({change.worker for change in narrator.changes})
    if (outcomes, workers) != ({"Success": len(JOBS)}, PARAMETERS.max_workers):
        raise DemoFailed(f"{workers} workers were started, and the autoscaler was told {dict(outcomes)}")
    narrator.say("autoscaler", f"was told: {len(JOBS)} requests, {len(JOBS)} times Success")


def _bars(folder: Path, numbers: list[int], narrator: Narrator) -> Iterator[Bar]:
    """One bar for each worker: process times as observed, holds from its log; in seconds since the start."""
    for number in numbers:
        at: dict[str, float] = {}
        for change in narrator.changes:
            if change.worker == number:
                at.setdefault(change.state, change.at - narrator.since)
        with _opened(folder, number) as conn:
            holds = conn.execute(
                "SELECT h.at, e.at FROM events h JOIN events e USING (reservation_id)"
                " WHERE h.kind = 'held' AND e.kind IN ('released', 'expired', 'cancelled')"
            ).fetchall()
        end = at.get("gone", at.get("cold", at["starting"]))
        spans = [(begin - narrator.since, end - narrator.since) for begin, end in holds]
        yield Bar(f"worker {number}", at["starting"], at.get("ready", end), end, spans)


def _audit(folder: Path, numbers: list[int]) -> None:
    """Query the logs with plain SQL."""
    _ask("Which job held which worker, and how did it end?", _OUTCOMES, folder, numbers)
    _ask("What happened to render-2, step by step?", _STEPS, folder, numbers)
    _ask("How long was each worker of use?", _DAILY, folder, numbers)
    click.echo(_heading("Can the log be changed afterwards?"))
    click.echo(f"{_FORGERY};")
    with _opened(folder, numbers[0]) as conn:
        try:
            conn.execute(_FORGERY)
        except sqlite3.Error as error:
            click.echo(f"Error: {error}")
            return
    raise DemoFailed("an event could be removed from the log")


def _ask(question: str, query: str, folder: Path, numbers: list[int]) -> None:
    names: list[str] = []
    rows: list[tuple[Any, ...]] = []
    for number in numbers:
        with _opened(folder, number) as conn:
            found = conn.execute(query)
            names = ["log", *(column[0] for column in found.description)]
            rows += [(f"nullworker-{number}.db", *row) for row in found]
    if not rows:
        raise DemoFailed(f"the logs do not answer: {question}")
    click.echo(_heading(question))
    click.echo(f"{query};\n")
    click.echo(table(names, rows))


@contextlib.contextmanager
def _opened(folder: Path, number: int) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(folder / f"nullworker-{number}.db")) as conn:
        yield conn


def _heading(text: str) -> str:
    return "\n" + click.style(text, bold=True)
