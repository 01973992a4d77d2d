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
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import from_row
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
