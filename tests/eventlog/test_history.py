"""The history, newest first: independent of the batches in which it is searched, and never blocking the worker."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import GOLDEN, rows

from nullworker.autoscaler.messages import Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.clock import iso
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms, from_row
from nullworker.fsm.table import STATES
from nullworker.http.reservations import newest
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.testing.fakes import FakeClock


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with contextlib.closing(open_log(tmp_path_factory.mktemp("history") / "log.db")) as log:
        log.append([(seq, from_row(tuple(row))) for seq, *row in rows(GOLDEN[-1])])
        yield log


def reporter(service: Service, log: EventLog) -> Reporter:
    return Reporter(Identity(1, "", "", 100), service, log, None, lambda call, result: None)  # type: ignore[arg-type]


def ids(conn: sqlite3.Connection, **asked: Any) -> list[str]:
    return [row["id"] for row in queries.reservations(conn, **asked) if row is not None]


@settings(deadline=None)
@given(step=st.integers(1, 70), state=st.sampled_from([None, *STATES]), limit=st.integers(0, 25), before=st.booleans())
def test_steps_change_nothing_in_what_is_found(
    log: EventLog, step: int, state: str | None, limit: int, *, before: bool
) -> None:
    asked = {"state": state, "before": "golden0000000011" if before else None}
    whole = ids(log.conn, **asked, limit=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "STEP", step)
        assert ids(log.conn, **asked, limit=limit) == whole[:limit]


def test_what_was_refused_at_once_is_told_from_what_had_waited_for_less_than_a_millisecond(tmp_path: Path) -> None:
    """Before and after a restart: the second was received by this worker, the first never."""
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        service = Service(log, FakeClock(), Limits(), Readiness())
        live = reporter(service, log)
        service.observers.append(live.observe)
        for _ in range(2):
            service.claim(Claim())
        service.claim(Claim(kind="session"))
        service.drain("told to")
        service.claim(Claim())
        restarted = reporter(service, log)
        assert [each.refused_at_once for each in queries.finished(log.conn, after=0, limit=10)] == [True, False, True]
        assert [(each._load.received, each._load.rejected) for each in (live, restarted)] == [(200, 300), (200, 300)]


def test_the_pages_follow_the_order_of_the_claims_also_when_the_clock_was_set_back(tmp_path: Path) -> None:
    clock = FakeClock()
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        service = Service(log, clock, Limits(), Readiness())
        made = []
        for step in (0.0, -3600.0, 0.0, 7200.0):
            clock.step_wall(step)
            made.append(service.claim(Claim(duration=0)).id)
        pages, before = list[str](), None
        for _ in made:
            (row,) = asyncio.run(newest(service, log, state=None, limit=1, before=before))
            before = row["id"]
            pages.append(before)
        assert pages == made[::-1]


def test_an_empty_log_has_no_history(tmp_path: Path) -> None:
    with contextlib.closing(open_log(tmp_path / "log.db")) as empty:
        assert ids(empty.conn) == []


def test_a_search_of_the_history_does_not_block_the_event_loop(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(log, FakeClock(), Limits(), Readiness())
    monkeypatch.setattr(queries, "STEP", 1)
    search = newest(service, log, state="expired", limit=1000, before=None)
    turns = 0
    while True:
        try:
            search.send(None)
        except StopIteration as done:
            found = done.value
            break
        turns += 1
    assert len(found) == 6
    assert turns == log.last_seq


def test_the_page_before_an_id_or_a_time_or_since_one_begins_right_beside_it(tmp_path: Path) -> None:
    clock = FakeClock()
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        service = Service(log, clock, Limits(max_queued=10), Readiness())
        made = []
        for _ in range(4):  # after the first they wait: one event each
            made.append(service.claim(Claim()))
            clock.advance(1.0)
        first, second, third, last = (reservation.id for reservation in made)
        assert ids(log.conn, before=third) == [second, first]
        assert ids(log.conn, before=iso(made[2].queued_at)) == [second, first]
        assert ids(log.conn, since=made[2].queued_at) == [last, third]
        with pytest.raises(ValueError, match="nobody"):
            ids(log.conn, before="nobody")


def test_events_are_read_on_from_a_place_and_of_one_reservation(tmp_path: Path) -> None:
    clock = FakeClock(1_800_000_000.0)
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        service = Service(log, clock, Limits(), Readiness())
        session = SessionTerms(60.0, "http://10.0.0.1/secret", {"secret": 1})
        held = service.claim(Claim("session", 60.0, session=session, auth_sha256="secret"))
        service.claim(Claim())
        service.release(held.id, result="done")
        everything = queries.events(log.conn)
        assert [event["seq"] for event in everything] == [1, 2, 3, 4, 5, 6, 7][: len(everything)]
        assert everything[0] == {
            "seq": 1,
            "at": "2027-01-15T08:00:00.000Z",
            "reservation_id": held.id,
            "kind": "queued",
            "reason": None,
            "data": everything[0]["data"],
        }
        assert everything[0]["data"]["session"] == {"lifetime": 60.0}
        assert "secret" not in str(everything)
        assert queries.events(log.conn, after=1, limit=2) == everything[1:3]
        mine = [event for event in everything if event["reservation_id"] == held.id]
        assert queries.events(log.conn, after=1, reservation_id=held.id) == mine[1:]
        assert [event["reason"] for event in mine] == [None, None, "explicit"]
        assert queries.claimed_by(log.conn, held.id) == ("session", "secret")
        assert queries.claimed_by(log.conn, "nobody") == (None, None)


@pytest.mark.parametrize(
    ("payload", "sent"), [({"job": "a"}, {"job": "a"}), ([1], {"payload": [1]}), (0, {"payload": 0}), (None, {})]
)
def test_a_callback_has_what_was_asked_for_and_how_it_ended(tmp_path: Path, payload: Any, sent: dict[str, Any]) -> None:
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        service = Service(log, FakeClock(), Limits(), Readiness())
        terms = SessionTerms(60.0, "http://10.0.0.1/", payload)
        held = service.claim(Claim("session", 60.0, session=terms))
        service.release(held.id, reason="session_end")
        (owed,) = queries.callbacks(log.conn, after=0)
        ended = {"session_id": held.id, "state": "released", "reason": "session_end"}
        assert queries.callback_call(log.conn, owed.seq) == ("http://10.0.0.1/", {**sent, **ended})
