"""Reads the event log, for the control port, the commands and the reports to the autoscaler. Plain SQL over sqlite3.

The cost of a query depends on what it returns, not on the size of the log. The one exception is the search for a rare
state, which walks back through the newest events (0.4 s for a million; an index would cost each commit a page) and
runs in batches.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypedDict, cast

from nullworker.clock import from_shown, iso, tidy
from nullworker.fsm.book import refused_at_once
from nullworker.fsm.table import ENDED, LIVE, Outcome, ending

#: Events that are searched in one batch: about 10 ms.
STEP: Final = 20_000
#: Events among which a start looks for the last holds: 40 ms, and many hours of refusals beside a hold.
SEARCHED: Final = 100_000

_COLUMNS: Final = (
    "id, kind, state, reason, queued_at, held_at, ends_at, ended_at, queued_seconds, held_seconds,"
    " duration_cap, request_idx, metadata, result"
)


@dataclass(frozen=True)
class Finished:
    """An ended reservation from the log. Times are epoch seconds; None: it was never held."""

    seq: int
    request_idx: int | None
    outcome: Outcome | None  # None: no outcome is sent for it
    queued_at: float
    held_at: float | None
    ended_at: float
    refused_at_once: bool
    cost: float | None = None  # the load, where it is not that of every request


class ReservationJson(TypedDict):
    """A reservation as the control port and the commands show it. Times are as 2026-11-24T14:05:00.123Z."""

    id: str
    kind: str  # request or session
    state: str  # queued, held, released, expired or cancelled
    reason: str | None  # why it has ended
    queued_at: str
    held_at: str | None
    ends_at: str | None  # the deadline
    ended_at: str | None
    queued_seconds: float | None
    held_seconds: float | None
    duration_cap: float  # seconds that it may be held
    request_idx: int | None  # the autoscaler's number for it
    metadata: dict[str, Any] | None
    result: Any


class EventJson(TypedDict):
    """An event as streams and commands show it."""

    seq: int  # its place in the log
    at: str  # as the times of a reservation
    reservation_id: str
    kind: str  # queued, held, extended, released, expired or cancelled
    reason: str | None  # why, one of fsm/table.py
    data: dict[str, Any]  # the further fields of its kind (docs/event-log.md), without auth hash and callback


def reservation(conn: sqlite3.Connection, reservation_id: str) -> ReservationJson | None:
    """One reservation of the log, or None."""
    row = conn.execute(f"SELECT {_COLUMNS} FROM reservations WHERE id = ?", (reservation_id,)).fetchone()
    return _as_json(row) if row else None


def reservations(conn: sqlite3.Connection, **filters: Any) -> list[ReservationJson]:
    """The newest reservations first; arguments and errors as for `batches`."""
    return list(itertools.chain.from_iterable(batches(conn, **filters)))


def batches(
    conn: sqlite3.Connection,
    *,
    state: str | None = None,
    limit: int = 50,
    before: str | None = None,
    since: float | None = None,
    by_time: bool = False,
) -> Iterator[list[ReservationJson]]:
    """The newest reservations first, in one batch for each STEP searched events; a batch may be empty.

    Args:
        state: only reservations in this state.
        limit: the maximum number of reservations.
        before: only reservations older than this id or ISO 8601 time.
        since: only reservations queued at or after this time, in epoch seconds.
        by_time: newest by their times, in one batch that searches all events: a fleet's database has them in order of
            arrival, and a worker without a connection sends them hours later.

    Raises:
        ValueError: before is neither a known id nor a time.
    """
    # two queries, since SQLite scans the table for min and max together
    first, last = conn.execute("SELECT (SELECT min(seq) FROM events), (SELECT max(seq) FROM events)").fetchone()
    where, values = ["kind = 'queued'"], list[Any]()
    if before is not None:
        found = conn.execute(
            "SELECT seq FROM events WHERE reservation_id = ? AND kind = 'queued'", (before,)
        ).fetchone()
        if found:
            last = found[0] - 1
        else:
            where.append("at < ?")
            values.append(from_shown(before))
    if since is not None:
        where.append("at >= ?")
        values.append(since)
    if state in ENDED:
        where.append("EXISTS (SELECT 1 FROM events e WHERE e.reservation_id = q.reservation_id AND e.kind = ?)")
        values.append(state)
    elif state in LIVE:
        where.append("reservation_id IN (SELECT reservation_id FROM live WHERE state = ?)")
        values.append(state)
    if first is None:
        return
    step = (
        max(last, 1) if by_time or state in LIVE else STEP
    )  # live reservations are found by the table `live` and need no search
    # a fleet's database keeps two contents of one event: such a reservation is listed once
    order = "GROUP BY reservation_id ORDER BY min(at) DESC, min(seq) DESC" if by_time else "ORDER BY seq DESC"
    for top in range(last, first - 1, -step):
        ids = conn.execute(
            f"SELECT reservation_id FROM events q WHERE {' AND '.join(where)} AND seq BETWEEN ? AND ? {order} LIMIT ?",
            (*values, top - step + 1, top, limit),
        ).fetchall()
        yield [row for (reservation_id,) in ids if (row := reservation(conn, reservation_id)) is not None]
        limit -= len(ids)
        if limit <= 0:
            return


def event_json(seq: int, at: float, reservation_id: str, kind: str, reason: str | None, data: str) -> EventJson:
    """An event as streams and commands show it."""
    return {
        "seq": seq,
        "at": iso(at),
        "reservation_id": reservation_id,
        "kind": kind,
        "reason": reason,
        "data": public_data(json.loads(data)),
    }


def public_data(data: dict[str, Any]) -> dict[str, Any]:
    """An event's data without the hash of its auth and a session's callback."""
    data = {name: value for name, value in data.items() if name != "auth_sha256"}
    if "session" in data:
        data["session"] = {"lifetime": data["session"].get("lifetime")}
    return data


def ended_holds(conn: sqlite3.Connection, *, limit: int) -> list[tuple[str, str, str]]:
    """Kind, hash of the auth, and id of the last that were held and have ended, but for hang-ups; oldest first.

    No more than the last SEARCHED events are searched: an index of the holds would cost each commit a page.
    """
    rows = conn.execute(
        """
        SELECT q.data ->> 'kind', q.data ->> 'auth_sha256', h.reservation_id
          FROM events AS h
          JOIN events AS e ON e.reservation_id = h.reservation_id AND e.kind IN ('released', 'expired', 'cancelled')
          JOIN events AS q ON q.reservation_id = h.reservation_id AND q.kind = 'queued'
         WHERE h.seq > (SELECT max(seq) FROM events) - ? AND h.kind = 'held'
           AND q.data ->> 'auth_sha256' IS NOT NULL AND e.reason <> 'client_disconnect'
         ORDER BY h.seq DESC
         LIMIT ?
        """,
        (SEARCHED, limit),
    ).fetchall()
    return rows[::-1]


def claimed_by(conn: sqlite3.Connection, reservation_id: str) -> tuple[str | None, str | None]:
    """The kind of a reservation of the log, and the hash of the auth it was claimed with."""
    query = "SELECT data ->> 'kind', data ->> 'auth_sha256' FROM events WHERE reservation_id = ? AND kind = 'queued'"
    row = conn.execute(query, (reservation_id,)).fetchone()
    return (None, None) if row is None else (row[0], row[1])


def events(
    conn: sqlite3.Connection, *, after: int = 0, limit: int = 1000, reservation_id: str | None = None
) -> list[EventJson]:
    """Events after a seq, in order; of one reservation if its id is given."""
    only = "" if reservation_id is None else " AND reservation_id = ?"
    values = (after,) if reservation_id is None else (after, reservation_id)
    rows = conn.execute(
        f"SELECT seq, at, reservation_id, kind, reason, data FROM events WHERE seq > ?{only} ORDER BY seq LIMIT ?",
        (*values, limit),
    )
    return [event_json(*row) for row in rows]


def finished(conn: sqlite3.Connection, *, after: int, limit: int) -> list[Finished]:
    """Reservations whose end has a seq above `after`, in the order of their ends."""
    rows = conn.execute(
        """
        SELECT e.seq, q.data ->> 'request_idx', e.kind, e.reason, q.at, h.at, e.at, q.data ->> 'give_up_at',
               q.data ->> 'cost'
          FROM events AS e
          JOIN events AS q ON q.reservation_id = e.reservation_id AND q.kind = 'queued'
          LEFT JOIN events AS h ON h.reservation_id = e.reservation_id AND h.kind = 'held'
         WHERE e.seq > ? AND e.kind IN ('released', 'expired', 'cancelled')
         ORDER BY e.seq
         LIMIT ?
        """,
        (after, limit),
    )
    done = []
    for seq, request_idx, state, reason, queued_at, held_at, ended_at, give_up_at, cost in rows:
        outcome = ending(state, reason, was_held=held_at is not None).outcome
        at_once = refused_at_once(queued_at, held_at, give_up_at)
        done.append(Finished(seq, request_idx, outcome, queued_at, held_at, ended_at, at_once, cost))
    return done


@dataclass(frozen=True)
class Callback:
    """A pending callback. Small, since many may be pending; its call is read by `callback_call`."""

    seq: int
    ended_at: float
    session_id: str


def callbacks(conn: sqlite3.Connection, *, after: int) -> list[Callback]:
    """The pending callbacks of sessions whose end has a seq above `after`, in order."""
    rows = conn.execute(
        """
        SELECT e.seq, e.at, e.reservation_id
          FROM callbacks AS c
          JOIN events AS e ON e.seq = c.seq
         WHERE c.seq > ?
         ORDER BY c.seq
        """,
        (after,),
    )
    return [Callback(*row) for row in rows]


def callback_call(conn: sqlite3.Connection, seq: int) -> tuple[str, dict[str, Any]]:
    """The route and the body of a pending callback."""
    session_id, state, reason, session = conn.execute(
        """
        SELECT e.reservation_id, e.kind, e.reason, q.data -> 'session'
          FROM events AS e
          JOIN events AS q ON q.reservation_id = e.reservation_id AND q.kind = 'queued'
         WHERE e.seq = ?
        """,
        (seq,),
    ).fetchone()
    terms = json.loads(session)
    payload = terms.get("on_close_payload")
    theirs = payload if isinstance(payload, dict) else {} if payload is None else {"payload": payload}
    return terms["on_close_route"], {**theirs, "session_id": session_id, "state": state, "reason": reason}


def begun_load(conn: sqlite3.Connection, *, after: int, load: float) -> float:
    """The load of the claims made after an event; `load` is that of one without a cost of its own."""
    query = "SELECT total(coalesce(data ->> 'cost', ?)) FROM events WHERE seq > ? AND kind = 'queued'"
    return float(conn.execute(query, (load, after)).fetchone()[0])


def count_finished(conn: sqlite3.Connection, *, after: int) -> int:
    """The number of reservations that ended after an event."""
    row = conn.execute(
        "SELECT count(*) FROM events WHERE seq > ? AND kind IN ('released', 'expired', 'cancelled')", (after,)
    ).fetchone()
    return int(row[0])


def _as_json(row: tuple[Any, ...]) -> ReservationJson:
    named = dict(zip(_COLUMNS.replace(" ", "").split(","), row, strict=True))
    for name in ("queued_seconds", "held_seconds", "duration_cap"):
        if isinstance(named[name], float):
            named[name] = tidy(named[name])
    named["metadata"] = None if named["metadata"] is None else json.loads(named["metadata"])
    named["result"] = None if named["result"] is None else json.loads(named["result"])
    return cast(ReservationJson, named)
