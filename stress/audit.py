"""What a worker promises, stated once: the simulation, the crash harness and the soak ask this file.

It knows the contract's rules by itself and imports nothing of the state machine, the log or the answers that it judges:
the rows of a log are read as any SQLite shell would read them, after the last worker has ended.

    log         every history is legal: one is held at a time, first come first served, one end each, no time runs back
    answers     what a caller was told is in the log, word for word
    releases    one release ends what it was aimed at, or nothing
    outcomes    each end is told once or more, as it was, the first time in the order of the ends; the figures add up
    callbacks   an owner who asked for it hears of his session's end
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from nullworker.testing import FakeAutoscaler
    from stress.crash_load import Claim, Hold, Ledger

#: Seconds by which two processes' readings of one clock may differ: times in JSON are rounded to the millisecond.
ROUNDING = 0.002
#: Stands for a result that was never handed over.
NOTHING: Final = object()

Row = tuple[float, str, str, "str | None", str]  # at, reservation_id, kind, reason, data

#: How a reservation may end: whether it was held, its state and reason; then the answer to /reserve and the outcome.
ENDS: Final[dict[tuple[bool, str, str], tuple[int, str | None]]] = {
    **{(True, "released", reason): (200, "Success") for reason in ("explicit", "session_end", "consumer_exit")},
    (True, "expired", "duration_elapsed"): (200, "Success"),
    **{(False, "expired", reason): (429, "Rejected") for reason in ("queue_timeout", "queue_full", "busy")},
    (False, "expired", "duplicate"): (429, None),
    (True, "cancelled", "client_disconnect"): (499, "Cancelled"),
    (False, "cancelled", "client_disconnect"): (499, "Cancelled"),
    **{
        (False, "cancelled", reason): (503, "Rejected")
        for reason in ("not_ready", "errored", "draining", "log_unavailable")
    },
    (False, "cancelled", "worker_restart"): (503, "Cancelled"),
    **{
        (True, "cancelled", reason): (503, "Cancelled")
        for reason in ("draining", "consumer_unhealthy", "worker_restart", "consumer_lost", "consumer_absent")
    },
    (True, "cancelled", "worker_error"): (500, "Error"),
    (False, "cancelled", "worker_error"): (500, "Error"),
}
#: Why a deadline may be moved.
EXTENDED: Final = ("extend", "ping", "attached")


@dataclass
class Past:
    """One reservation, as its rows tell. Times are epoch seconds."""

    id: str
    kind: Literal["request", "session"]
    request_idx: int | None
    duration_cap: float
    give_up_at: float
    on_close_route: str | None
    queued_at: float
    held_at: float | None = None
    ends_at: float | None = None
    ended_at: float | None = None
    state: str = "queued"
    reason: str | None = None
    result: Any = NOTHING
    extensions: Counter[str] = field(default_factory=Counter)

    @property
    def open(self) -> bool:
        return self.state in ("queued", "held")

    @property
    def outcome(self) -> str | None:
        """What the autoscaler is to be told; None: nothing."""
        return ENDS[self.held_at is not None, self.state, str(self.reason)][1]

    @property
    def owner_is_told(self) -> bool:
        """Whether the end is to be POSTed to somebody."""
        return self.on_close_route is not None and self.held_at is not None


@dataclass
class History:
    """A log, read. `ends` are in the order of the log; `problems` are sentences about what may not be."""

    reservations: dict[str, Past] = field(default_factory=dict)
    ends: list[Past] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    events: int = 0


def read(db: Path) -> History:
    """Read a log whose worker has ended: nothing may be open in it."""
    conn = sqlite3.connect(db)
    try:
        verdicts = [row[0] for row in conn.execute("PRAGMA integrity_check")]
        rows = conn.execute("SELECT at, reservation_id, kind, reason, data FROM events ORDER BY seq").fetchall()
        seqs = [row[0] for row in conn.execute("SELECT seq FROM events ORDER BY seq")]
        live = conn.execute("SELECT count(*) FROM live").fetchone()[0]
    finally:
        conn.close()
    history = replay(rows)
    if verdicts != ["ok"]:
        history.problems.append(f"integrity_check: {verdicts}")
    if seqs != list(range(1, len(seqs) + 1)):
        history.problems.append("the seqs have holes")
    if live:
        history.problems.append(f"{live} reservations are open after the end")
    history.problems += [f"{past.id} has no end" for past in history.reservations.values() if past.open]
    return history


def callbacks_owed(db: Path) -> int:
    """Ends of sessions that their owners have not been told of."""
    conn = sqlite3.connect(db)
    try:
        return int(conn.execute("SELECT count(*) FROM callbacks").fetchone()[0])
    finally:
        conn.close()


def replay(rows: Iterable[Row]) -> History:
    """What the rows of a log make, by the contract's rules alone."""
    history = History()
    queue: dict[str, None] = {}
    held: str | None = None
    for number, (at, name, kind, reason, text) in enumerate(rows, 1):
        history.events = number
        data, past = json.loads(text), history.reservations.get(name)
        wrong = _wrong(past, at, kind, reason, held, next(iter(queue), None))
        if wrong:
            history.problems.append(f"event {number}, {kind}/{reason} of {name}: {wrong}")
            continue
        if past is None:
            queue[name] = None
            history.reservations[name] = Past(
                name,
                data["kind"],
                data.get("request_idx"),
                data["duration_cap"],
                data["give_up_at"],
                data.get("session", {}).get("on_close_route"),
                at,
            )
            continue
        if kind == "held":
            del queue[name]
            held, past.state, past.held_at, past.ends_at = name, "held", at, data["ends_at"]
        elif kind == "extended":
            past.ends_at = data["ends_at"]
            past.extensions[str(reason)] += 1
        else:
            queue.pop(name, None)
            held = None if held == name else held
            past.state, past.reason, past.ended_at = kind, reason, at
            past.result = data.get("result", NOTHING)
            history.ends.append(past)
    return history


def _wrong(
    past: Past | None, at: float, kind: str, reason: str | None, held: str | None, first: str | None
) -> str | None:
    """Why an event may not follow; None: it may."""
    if past is None:
        return None if kind == "queued" and reason is None else "it was never claimed"
    newest = past.held_at if past.held_at is not None else past.queued_at
    if at < newest:
        return "time runs back"
    if not past.open:
        return f"it has ended as {past.state}"
    if kind == "held":
        if past.state != "queued" or reason is not None:
            return f"it is {past.state}"
        if held is not None:
            return f"{held} is held"
        return None if past.id == first else f"{first} came before"
    if kind == "extended":
        return None if past.state == "held" and reason in EXTENDED else f"it is {past.state}"
    ends = (past.state == "held", kind, str(reason)) in ENDS
    return None if ends else f"nothing that is {past.state} ends so"


def answer(past: Past | None) -> tuple[int, dict[str, Any]] | None:
    """Status and body that belong to the end in the log, but for the sentence `error`; None: there is no end."""
    if past is None or past.ended_at is None:
        return None
    status = ENDS[past.held_at is not None, past.state, str(past.reason)][0]
    if status == 503 and past.kind == "session" and past.held_at is not None:
        held = {"state": past.state, "held_seconds": _seconds(past.held_at, past.ended_at)}
        return 410, {"reservation_id": past.id, "reason": past.reason, **held}
    if status != 200:
        return status, {"reservation_id": past.id, "reason": past.reason}
    assert past.held_at is not None
    if past.state == "expired":
        return 200, {"released": "duration_elapsed", "duration": _seconds(past.held_at, past.ends_at or 0.0)}
    body = {
        "released": past.reason,
        "duration_cap": round(past.duration_cap, 3),
        "reservation_id": past.id,
        "queued_seconds": _seconds(past.queued_at, past.held_at),
        "held_seconds": _seconds(past.held_at, past.ended_at),
    }
    return 200, body if past.result is NOTHING else {**body, "result": past.result}


def is_answer(status: int, body: dict[str, Any], past: Past | None) -> bool:
    """Whether that is what the log says, and says why in a sentence where it is an error."""
    expected = answer(past)
    if expected is None or status != expected[0]:
        return False
    if status == 200:
        return body == expected[1]
    told = all(body.get(name) == value for name, value in expected[1].items())
    return told and isinstance(body.get("error"), str) and bool(body["error"])


def _seconds(start: float, end: float) -> float:
    return round(max(int(end * 1000 + 0.5) / 1000 - int(start * 1000 + 0.5) / 1000, 0.0), 3)


def outcomes_owed(ends: Iterable[Past]) -> list[tuple[int | None, str]]:
    """What the autoscaler is to hear, in order."""
    return [(past.request_idx, outcome) for past in ends if (outcome := past.outcome) is not None]


# -- what was seen from outside --------------------------------------------------------------------------------------


def check(history: History, ledger: Ledger, vast: FakeAutoscaler, sure: list[dict[str, Any]]) -> Iterator[str]:
    """Everything that is wrong. `sure`: the reports that the worker must have seen acknowledged."""
    yield from history.problems
    by_idx: dict[int | None, list[Past]] = {}
    for past in history.reservations.values():
        by_idx.setdefault(past.request_idx, []).append(past)
    known = {claim.idx for claim in ledger.claims}
    for idx, found in by_idx.items():
        if idx not in known or len(found) > 1:
            yield f"request_idx {idx} has {len(found)} reservations and {'a' if idx in known else 'no'} claim"
    for claim in ledger.claims:
        yield from _answer(claim, next(iter(by_idx.get(claim.idx, [])), None))
    for session_id, status, body in ledger.waits:
        if not is_answer(status, body, history.reservations.get(session_id)):
            yield f"who waited for session {session_id} got {status} {body}, the log says otherwise"
    yield from _releases(history, ledger)
    yield from _outcomes(history, vast, sure)
    yield from _overlaps(ledger)


def _shortest(lifetime: float) -> float:
    """Seconds from a ping to the deadline at least: a ping that would hardly move it is answered without an event.

    The worker's time and the client's differ by some milliseconds.
    """
    return lifetime - min(1.0, lifetime / 10) - 0.05


def _answer(claim: Claim, found: Past | None) -> Iterator[str]:
    """Every answer is in the log, word for word."""
    if claim.reservation_id is not None and (found is None or found.id != claim.reservation_id):
        yield f"{claim} is not in the log"
    elif found is None:
        # without the key nobody is let in, and nobody is noted
        if claim.fate == "answered" and (claim.status, claim.body.get("reason")) != (503, "not_ready"):
            yield f"{claim} is not in the log"
    elif claim.status == 201:
        ended = (found.state, found.reason) == ("released", "session_end")
        if found.held_at is None or (claim.ended and not ended):
            yield f"{claim} was created and ended by its owner, and the log says {found.state}/{found.reason}"
        if claim.renewed_at is not None and claim.renewed_at + _shortest(claim.body["lifetime"]) > (found.ends_at or 0):
            yield f"{claim} was renewed at {claim.renewed_at}, and its deadline in the log is {found.ends_at}"
    elif claim.fate == "answered" and not is_answer(claim.status, claim.body, found):
        yield f"{claim} got another answer than the log has: {answer(found)}"


def _releases(history: History, ledger: Ledger) -> Iterator[str]:
    """A release ended what it was aimed at, or nothing; and one that was answered with true ended something."""
    explicit = [past for past in history.ends if past.reason == "explicit"]
    ended_by = {past.result["token"]: past.id for past in explicit}
    if len(ended_by) != len(explicit):
        yield "one release has ended two reservations"
    for release in ledger.releases:
        ended = ended_by.pop(release.token, None)
        if ended is not None and release.aimed_at not in (None, ended):
            yield f"{release} has ended {ended}"
        if release.answer is not None:
            said = release.answer.get("reservation_id") if release.answer.get("released") else None
            if said != ended:
                yield f"{release} was answered, and the log says that it ended {ended}"
    if ended_by:
        yield f"releases that nobody sent: {ended_by}"


def _outcomes(history: History, vast: FakeAutoscaler, sure: list[dict[str, Any]]) -> Iterator[str]:
    """Every outcome has arrived, the first arrivals in the log's order; and the figures add up."""
    owed = outcomes_owed(history.ends)
    arrived = list(dict.fromkeys((each["request_idx"], each["status"]) for each in vast.outcomes))
    if arrived != owed:
        missing, extra = Counter(owed) - Counter(arrived), Counter(arrived) - Counter(owed)
        yield f"outcomes: {len(missing)} have not arrived {list(missing)[:5]}, {len(extra)} are not in the log " + (
            "" if missing or extra else "(the order differs)"
        )
    told: Counter[str] = Counter(outcome for _, outcome in owed)
    for name, outcome in (("cur_perf", "Success"), ("rej_load", "Rejected")):
        least, most = (sum(status[name] for status in statuses) / 100 for statuses in (sure, vast.statuses))
        if not least <= told[outcome] <= most:
            yield f"{name}: the log has {told[outcome]}, reports say {least} at least and {most} at most"


def _overlaps(ledger: Ledger) -> Iterator[str]:
    """At no time did two clients know that they hold the worker."""
    certain = sorted((hold.seen_at, over, hold) for hold in ledger.holds if (over := _certain(hold, ledger)))
    for (_, over, first), (begun, _, second) in pairwise(certain):
        if begun < over - ROUNDING and first.reservation_id != second.reservation_id:
            yield f"held at once: {first} and {second}"


def _certain(hold: Hold, ledger: Ledger) -> float | None:
    """The end of the time in which nothing from outside can have ended it; None: there was no such time."""
    cuts = [release.sent for release in ledger.releases if release.done >= hold.held_at - ROUNDING]
    if hold.kind == "request":
        cuts += [kill for kill in ledger.kills if kill >= hold.held_at - ROUNDING]
    over = min(hold.over, *cuts, hold.over)
    return over if over > hold.seen_at else None
