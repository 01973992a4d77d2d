"""Logs with old reservations, for tests of pruning."""

from __future__ import annotations

from nullworker.eventlog.log import EventLog
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, SessionTerms

DAY = 86_400.0


def told_all(log: EventLog) -> None:
    """The autoscaler has acknowledged everything."""
    for name in ("worker_status", "delete_requests"):
        log.move_cursor(name, log.last_seq)


def add(log: EventLog, name: str, at: float, *, end: str | None = "released", route: str | None = None) -> int:
    """A reservation of a second, with all the events that one can have. The seq of its last event."""
    terms = SessionTerms(lifetime=60, on_close_route=route) if route else None
    queued = Queued(kind="session" if route else "request", duration_cap=60, give_up_at=at + 30, session=terms)
    events = [
        Event(at, name, "queued", None, queued),
        Event(at, name, "held", None, Held(at + 60)),
        Event(at, name, "extended", "extend", Extended(at + 90)),
    ]
    if end is not None:
        events.append(Event(at + 1, name, end, "explicit", Ended(result={"log": "x" * 500})))  # type: ignore[arg-type]
    log.append(list(enumerate(events, log.last_seq + 1)))
    return log.last_seq


def names(log: EventLog) -> dict[str, int]:
    """The reservations in the log, and how many events each has."""
    return dict(log.conn.execute("SELECT reservation_id, count(*) FROM events GROUP BY 1 ORDER BY min(seq)"))
