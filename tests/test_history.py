"""The history, newest first: the same whatever the steps in which it is searched, and nobody waits for a search."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import GOLDEN, rows

from nullworker import history
from nullworker.condition import Condition
from nullworker.fsm.book import Limits
from nullworker.fsm.events import from_row
from nullworker.fsm.table import STATES
from nullworker.http.control import Control
from nullworker.log import EventLog, open_log
from nullworker.metrics.exporter import Exporter, Readings
from nullworker.service import Service
from nullworker.testing.fakes import FakeClock


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with contextlib.closing(open_log(tmp_path_factory.mktemp("history") / "log.db")) as log:
        log.append([(seq, from_row(tuple(row))) for seq, *row in rows(GOLDEN[-1])])
        yield log


def ids(conn: sqlite3.Connection, **asked: Any) -> list[str]:
    return [row["id"] for row in history.reservations(conn, **asked) if row is not None]


@settings(deadline=None)
@given(step=st.integers(1, 70), state=st.sampled_from([None, *STATES]), limit=st.integers(0, 25), before=st.booleans())
def test_steps_change_nothing_in_what_is_found(
    log: EventLog, step: int, state: str | None, limit: int, *, before: bool
) -> None:
    asked = {"state": state, "before": "golden0000000011" if before else None}
    whole = ids(log.conn, **asked, limit=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "STEP", step)
        assert ids(log.conn, **asked, limit=limit) == whole[:limit]


def test_an_empty_log_has_no_history(tmp_path: Path) -> None:
    with contextlib.closing(open_log(tmp_path / "log.db")) as empty:
        assert ids(empty.conn) == []


def test_others_have_their_turn_while_the_history_is_searched(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(log, FakeClock(), Limits(), Condition(key=None, starting=None))
    control = Control(service, log, Exporter(service, Readings(lambda: 0, lambda: 0)), dict)
    monkeypatch.setattr(history, "STEP", 1)
    search = control._newest("expired", 1000, None)
    turns = 0
    while True:
        try:
            search.send(None)
        except StopIteration as done:
            found = done.value
            break
        turns += 1
    assert len(found) == 5
    assert turns == log.last_seq
