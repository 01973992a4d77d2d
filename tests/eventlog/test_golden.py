"""Golden logs: files of earlier versions must be read, replayed and shown by every later version.

A released golden log is never changed; a new field or reason gets a new one beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nullworker.errors import IllegalMove, LogDamaged
from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Book, Limits
from nullworker.fsm.events import from_row, to_row
from nullworker.fsm.table import EDGES

GOLDEN = sorted((Path(__file__).parent / "golden").glob("log-*.jsonl"))


def rows(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replay(logged: list[list[Any]]) -> Book:
    book = Book(Limits())
    for _, *row in logged:
        book.apply(from_row(tuple(row)))
    return book


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_golden_log_replays_to_what_was_open(golden: Path) -> None:
    book = Book(Limits())
    ends: Counter[str] = Counter()
    for _, *row in rows(golden):
        reservation = book.apply(from_row(tuple(row)))
        ends[reservation.state] += reservation.ended_at is not None
    assert [(r.id, r.state, r.terms.metadata) for r in book.live()] == [("golden0000000021", "held", {"who": "open"})]
    assert ends == {"queued": 0, "held": 0, "released": 5, "expired": 6, "cancelled": 14}


def test_a_golden_log_goes_through_the_file_and_the_views(golden: Path, tmp_path: Path) -> None:
    log = open_log(tmp_path / "log.db")
    for seq, *row in rows(golden):
        log.append([(seq, from_row(tuple(row)))])
    first = queries.reservation(log.conn, "golden0000000001")
    assert first == {
        "id": "golden0000000001",
        "kind": "request",
        "state": "released",
        "reason": "explicit",
        "queued_at": "2026-05-28T20:26:40.125Z",
        "held_at": "2026-05-28T20:26:40.125Z",
        "ends_at": "2026-05-28T20:28:21.375Z",
        "ended_at": "2026-05-28T20:26:43.375Z",
        "queued_seconds": 0,
        "held_seconds": 3.25,
        "duration_cap": 600.5,
        "request_idx": 11,
        "metadata": {"job": "ä 1", "n": [1, 2.5, None, True]},
        "result": {"ok": True, "nothing": None},
    }
    held = [each["id"] for each in queries.reservations(log.conn, state="held") if each is not None]
    assert held == ["golden0000000021"]
    log.close()


def test_an_event_of_today_is_stored_as_the_golden_one_was(golden: Path) -> None:
    for _, *row in rows(golden):
        assert list(to_row(from_row(tuple(row)))) == row


def test_the_newest_golden_log_has_every_event_and_reason() -> None:
    written = {(kind, reason) for _, _, _, kind, reason, _ in rows(GOLDEN[-1])}
    assert written >= {(edge.event, edge.reason) for edge in EDGES}


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (1, {3: "expired"}),  # held before it was queued
        (2, {3: "begun"}),  # a kind that never was
        (1, {4: "because"}),  # a reason that is none
        (1, {5: '{"ends_at": "soon"}'}),
    ],
)
def test_the_check_fails_for_an_impossible_history(number: int, change: dict[int, str]) -> None:
    history_of_lies = rows(GOLDEN[0])
    for column, value in change.items():
        history_of_lies[number][column] = value
    with pytest.raises((IllegalMove, LogDamaged)):
        replay(history_of_lies)
