"""What must be true of a fleet that was driven by `nullworker dispatch`, whoever was killed: checked from files alone.

    jobs       every job is done; none is worked on by two at once; a second run of it only where somebody of its first
               was killed
    holds      at most the maximum are held at once; none is longer without a job than the grace and one poll; none is
               left a lifetime after the last job
    ledger     it has each session, once, with the worker's own end, and nothing is open

The folder has `jobs.json` (the names), `runs.jsonl` (a line for each step of a consumer), `kills.jsonl`,
`nullworker-dispatch.db`, and the workers' logs `dev/nullworker-*.db`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds: NULL_CONSUMER_GRACE_SECONDS, and that of a session whose worker is started again (contract, liveness).
GRACE, RESTART_GRACE = 5.0, 30.0


class Terms(NamedTuple):
    """What the run was told. `slack`: seconds for a poll and for starting processes on a busy machine."""

    workers: int
    lifetime: float
    slack: float


class Kill(NamedTuple):
    """One SIGKILL. `log`: of the worker on whose machine it was; empty for the dispatcher."""

    at: float
    what: str  # dispatcher, serve, work or consumer.py
    pid: int
    log: str


class JobRun(NamedTuple):
    """One consumer at one job; `job` is empty of one that found none."""

    job: str
    reservation: str
    pid: int
    begin: float
    end: float  # its last sign of life
    last: str  # its last step


class Hold(NamedTuple):
    """One hold, by the worker's log. `end`: None where its worker was killed and not started again."""

    reservation: str
    claim: str
    log: str
    held_at: float
    end: float | None
    reason: str | None


class Account(NamedTuple):
    """What a run came to; `faults` must be empty."""

    jobs: int
    killed: dict[str, int]
    runs: int  # times that a consumer took a job
    cut: int  # of those, how many were killed
    empty: int  # consumers that found no job
    holds: int
    claims: dict[str, int]  # by the reason of their end
    most_held: int
    longest_idle: float  # seconds that a hold was without a job, its worker alive
    longest_idle_after_kill: float  # the same, its worker killed meanwhile
    seconds: float
    faults: list[str]


def read_runs(folder: Path) -> list[JobRun]:
    """The consumers' own notes."""
    steps: dict[tuple[str, str, int], list[tuple[float, str]]] = {}
    for job, reservation, pid, what, at in _lines(folder / "runs.jsonl"):
        steps.setdefault((job, reservation, pid), []).append((at, what))
    return [JobRun(*key, notes[0][0], notes[-1][0], notes[-1][1]) for key, notes in steps.items()]


def read_kills(folder: Path) -> list[Kill]:
    """What the harness has killed."""
    return [Kill(*line) for line in _lines(folder / "kills.jsonl")]


def ledger(folder: Path, query: str) -> list[Any]:
    """Rows of the dispatcher's ledger."""
    with contextlib.closing(sqlite3.connect(folder / "nullworker-dispatch.db", timeout=20)) as conn:
        return conn.execute(query).fetchall()


def audit(folder: Path, terms: Terms, seconds: float) -> Account:
    """The account of a run whose processes have ended."""
    names = json.loads((folder / "jobs.json").read_text())
    runs, kills, holds = read_runs(folder), read_kills(folder), _holds(folder)
    faults = [*_jobs(names, runs, kills, holds), *_ledger(folder, holds)]
    most = _most_held(folder, holds)
    if most > terms.workers:
        faults.append(f"{most} were held at once, of {terms.workers}")
    idle = dict.fromkeys((False, True), (0.0, ""))
    over = max((run.end for run in runs if run.last in ("done", "finishing")), default=0.0)
    for hold in holds:
        restarted = any(kill.what == "serve" and _during(kill, hold) for kill in kills)
        idle[restarted] = max(idle[restarted], (_longest_idle(hold, runs), hold.reservation))
        end = hold.end if hold.end is not None else max((k.at for k in kills if k.log == hold.log), default=over)
        if end > over + terms.lifetime + terms.slack:
            faults.append(f"{hold.reservation} was held for {end - over:.1f} s after the last job was done")
    for restarted, grace in ((False, GRACE), (True, RESTART_GRACE)):
        longest, reservation = idle[restarted]
        if longest > grace + terms.slack:
            faults.append(f"{reservation} was held for {longest:.1f} s without a job, which is more than {grace} s")
    working = [run for run in runs if run.job]
    ends = Counter(str(reason) for (reason,) in ledger(folder, "SELECT reason FROM claims"))
    return Account(
        jobs=len(names),
        killed=dict(Counter(kill.what for kill in kills)),
        runs=len(working),
        cut=sum(run.last not in ("done", "finishing") for run in working),
        empty=len(runs) - len(working),
        holds=len(holds),
        claims=dict(ends),
        most_held=most,
        longest_idle=round(idle[False][0], 2),
        longest_idle_after_kill=round(idle[True][0], 2),
        seconds=round(seconds, 1),
        faults=faults,
    )


def unfinished(names: list[str], runs: list[JobRun]) -> set[str]:
    """The jobs that nobody has done yet. One whose consumer was killed while it settled it may come again."""
    return set(names) - {run.job for run in runs if run.last in ("done", "finishing")}


def _jobs(names: list[str], runs: list[JobRun], kills: list[Kill], holds: list[Hold]) -> list[str]:
    faults = []
    if missing := unfinished(names, runs):
        faults.append(f"jobs that were not done: {sorted(missing)}")
    where = {hold.reservation: hold for hold in holds}
    by_job: dict[str, list[JobRun]] = {}
    for run in runs:
        if run.job:
            by_job.setdefault(run.job, []).append(run)
    for job, of_job in by_job.items():
        of_job.sort(key=lambda run: run.begin)
        for first, second in itertools.pairwise(of_job):
            if second.begin < first.end:
                faults.append(f"job {job} was worked on twice at once: {first} and {second}")
            if first.last == "done":
                faults.append(f"job {job} was done twice: {first} and {second}")
            elif not any(_excuses(kill, first, where.get(first.reservation)) for kill in kills):
                faults.append(f"job {job} was begun again, and nobody was killed: {first} and {second}")
    return faults


def _excuses(kill: Kill, run: JobRun, hold: Hold | None) -> bool:
    if kill.what == "consumer.py":
        return kill.pid == run.pid
    return hold is not None and kill.log == hold.log and _during(kill, hold) and kill.what in ("serve", "work")


def _during(kill: Kill, hold: Hold) -> bool:
    return kill.log == hold.log and hold.held_at - 1.0 <= kill.at and (hold.end is None or kill.at <= hold.end + 1.0)


def _longest_idle(hold: Hold, runs: list[JobRun]) -> float:
    """Seconds that it was held while nobody worked on a job or looked for one."""
    spans = sorted((run.begin, run.end) for run in runs if run.reservation == hold.reservation)
    if hold.end is None:  # its worker is gone; nobody knows when it would have ended it
        return 0.0
    edges = [hold.held_at, *itertools.chain.from_iterable(spans), hold.end]
    return max((later - earlier for earlier, later in zip(edges[::2], edges[1::2], strict=True)), default=0.0)


def _holds(folder: Path) -> list[Hold]:
    holds = []
    for path in sorted((folder / "dev").glob("nullworker-*.db")):
        with contextlib.closing(sqlite3.connect(path)) as conn:
            if not conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'events'").fetchone():
                continue  # killed before it had made its log
            query = (
                "SELECT h.reservation_id, q.data -> 'metadata' ->> 'claim', h.at, e.at, e.reason"
                " FROM events h JOIN events q ON q.reservation_id = h.reservation_id AND q.kind = 'queued'"
                " LEFT JOIN events e ON e.reservation_id = h.reservation_id"
                "  AND e.kind IN ('released', 'expired', 'cancelled')"
                " WHERE h.kind = 'held'"
            )
            holds += [
                Hold(reservation, claim, path.name, at, end, reason)
                for reservation, claim, at, end, reason in conn.execute(query)
            ]
    return holds


def _ledger(folder: Path, holds: list[Hold]) -> list[str]:
    faults = []
    query = "SELECT id, session_id, reason, state FROM claims"
    claims = {claim: (session, reason, state) for claim, session, reason, state in ledger(folder, query)}
    sessions = Counter(session for session, _, _ in claims.values() if session is not None)
    faults += [f"session {session} is in the ledger {times} times" for session, times in sessions.items() if times > 1]
    for hold in holds:
        if hold.claim not in claims:
            faults.append(f"the ledger does not know {hold}")
            continue
        session, reason, _ = claims[hold.claim]
        if session is None and reason in ("lost", "refused") and hold.end is None:
            continue  # killed between the question and the answer, and its worker never came back
        if session != hold.reservation:
            faults.append(f"the ledger has session {session} for {hold}")
        elif hold.end is not None and reason not in (hold.reason, "lost", "gone", "silent"):
            faults.append(f"the ledger has the end {reason} for {hold}")
    faults += [f"claim {claim} is open" for claim, (_, _, state) in claims.items() if state != "ended"]
    return faults


def _most_held(folder: Path, holds: list[Hold]) -> int:
    """The most at any time. A hold whose worker was killed for good counts until the ledger's end of it."""
    query = "SELECT claim_id, at FROM events WHERE kind = 'ended'"
    ended = dict(ledger(folder, query))
    edges = []
    for hold in holds:
        end = hold.end if hold.end is not None else ended.get(hold.claim, hold.held_at)
        edges += [(hold.held_at, 1), (end, -1)]
    now = most = 0
    for _, step in sorted(edges):
        now += step
        most = max(most, now)
    return most


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
