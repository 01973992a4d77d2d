"""Checks a finished run: compares what was seen from outside with the log.

Each check returns a list of sentences, empty if all is well. The log is read with plain SQL, after the last worker
has ended.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec

from nullworker.autoscaler.messages import outcome_of
from nullworker.errors import IllegalMove
from nullworker.fsm.book import Book, Limits, Reservation
from nullworker.fsm.events import Event, from_row
from nullworker.fsm.table import ENDED
from nullworker.http.reservations import verdict
from nullworker.testing import FakeAutoscaler
from stress.crash_load import Claim, Hold, Ledger

#: Seconds by which two processes' readings of one clock may differ: times in JSON are rounded to the millisecond.
ROUNDING = 0.002


@dataclass
class History:
    """The log, replayed through the same book as the worker's. `ends` are in the order of the log."""

    events: list[Event] = field(default_factory=list)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    ends: list[Reservation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(db: Path) -> History:
    """Replay a log."""
    history, book = History(), Book(Limits())
    conn = sqlite3.connect(db)
    try:
        verdicts = [row[0] for row in conn.execute("PRAGMA integrity_check")]
        rows = conn.execute("SELECT at, reservation_id, kind, reason, data FROM events ORDER BY seq").fetchall()
        seqs = [row[0] for row in conn.execute("SELECT seq FROM events ORDER BY seq")]
        live = conn.execute("SELECT count(*) FROM live").fetchone()[0]
    finally:
        conn.close()
    if verdicts != ["ok"]:
        history.problems.append(f"integrity_check: {verdicts}")
    if seqs != list(range(1, len(seqs) + 1)):
        history.problems.append("the seqs have holes")
    if live:
        history.problems.append(f"{live} reservations are open after the end")
    for row in rows:
        event = from_row(row)
        history.events.append(event)
        try:
            reservation = book.apply(event)  # refuses a second hold, a second end, an end without a beginning
        except IllegalMove as error:
            history.problems.append(f"the log does not replay: {error}")
            continue
        history.reservations[reservation.id] = reservation
        if event.kind in ENDED:
            history.ends.append(reservation)
    history.problems += [f"{r.id} has no end" for r in history.reservations.values() if r.state not in ENDED]
    return history


def callbacks_owed(db: Path) -> int:
    """Ends of sessions that their owners have not been told of."""
    conn = sqlite3.connect(db)
    try:
        return int(conn.execute("SELECT count(*) FROM callbacks").fetchone()[0])
    finally:
        conn.close()


def check(history: History, ledger: Ledger, vast: FakeAutoscaler, sure: list[dict[str, Any]]) -> Iterator[str]:
    """Everything that is wrong. `sure`: the reports that the worker must have seen acknowledged."""
    yield from history.problems
    by_idx: dict[int | None, list[Reservation]] = {}
    for reservation in history.reservations.values():
        by_idx.setdefault(reservation.terms.request_idx, []).append(reservation)
    known = {claim.idx for claim in ledger.claims}
    for idx, found in by_idx.items():
        if idx not in known or len(found) > 1:
            yield f"request_idx {idx} has {len(found)} reservations and {'a' if idx in known else 'no'} claim"
    for claim in ledger.claims:
        yield from _answer(claim, history, next(iter(by_idx.get(claim.idx, [])), None))
    for session_id, status, body in ledger.waits:
        if (status, body) != _verdict(history.reservations.get(session_id)):
            yield f"who waited for session {session_id} got {status} {body}, the log says otherwise"
    yield from _releases(history, ledger)
    yield from _outcomes(history, vast, sure)
    yield from _overlaps(ledger)


def _answer(claim: Claim, history: History, found: Reservation | None) -> Iterator[str]:
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
        renewals = sum(e.kind == "extended" and e.reservation_id == found.id for e in history.events)
        if renewals < claim.pings:
            yield f"{claim} was renewed {claim.pings} times, and the log knows {renewals}"
    elif claim.fate == "answered" and (claim.status, claim.body) != _verdict(found):
        yield f"{claim} got another answer than the log has: {_verdict(found)}"


def _releases(history: History, ledger: Ledger) -> Iterator[str]:
    """A release ended what it was aimed at, or nothing; and one that was answered with true ended something."""
    ended_by = {
        cast(Any, reservation.result)["token"]: reservation.id
        for reservation in history.ends
        if (reservation.state, reservation.reason) == ("released", "explicit")
    }
    if len(ended_by) != sum(r.reason == "explicit" for r in history.ends):
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
    owed = [(r.terms.request_idx, outcome) for r in history.ends if (outcome := outcome_of(r)) is not None]
    arrived = list(dict.fromkeys((each["request_idx"], each["status"]) for each in vast.outcomes))
    if arrived != owed:
        missing, extra = Counter(owed) - Counter(arrived), Counter(arrived) - Counter(owed)
        yield f"outcomes: {len(missing)} have not arrived {list(missing)[:5]}, {len(extra)} are not in the log " + (
            "" if missing or extra else "(the order differs)"
        )
    told: Counter[str] = Counter(outcome for _, outcome in owed)
    for name, word in (("cur_perf", "Success"), ("rej_load", "Rejected")):
        least, most = (sum(status[name] for status in statuses) / 100 for statuses in (sure, vast.statuses))
        if not least <= told[word] <= most:
            yield f"{name}: the log has {told[word]}, reports say {least} at least and {most} at most"


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


def _verdict(found: Reservation | None) -> tuple[int, dict[str, Any]] | None:
    """Status and body that belong to the end in the log; None: there is no end."""
    if found is None or found.state not in ENDED:
        return None
    status, body = verdict(found)
    return status, msgspec.json.decode(msgspec.json.encode(body))
