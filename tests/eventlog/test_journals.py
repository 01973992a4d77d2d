"""The contract of journals, for the log and the fake one; and the file's rules against any SQLite shell."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nullworker.clock import Anchor
from nullworker.errors import CannotStart, LogDamaged, LogUnavailable
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_for_reading, open_log
from nullworker.fsm.events import DATA_OF, Ended, Event, Extended, Held, Queued, SessionTerms, from_row, to_row
from nullworker.service import Journal
from nullworker.testing.fakes import MemoryJournal, check_journal

TERMS = Queued(kind="request", duration_cap=60.0, give_up_at=130.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "nullworker.db"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    opened = open_log(path)
    yield opened
    opened.close()


def test_the_log_keeps_the_contract_of_journals(path: Path) -> None:
    made: list[EventLog] = []

    def make() -> Journal:
        made.append(open_log(path))
        return made[-1]

    def reopen(journal: Journal) -> Journal:
        made[-1].close()
        return make()

    check_journal(make, reopen)
    made[-1].close()


def test_the_memory_journal_keeps_the_contract_of_journals() -> None:
    check_journal(MemoryJournal, lambda journal: journal)


def story(log: EventLog) -> None:
    log.append(
        [
            (1, Event(100.0, "a", "queued", None, TERMS)),
            (2, Event(100.0, "a", "held", None, Held(160.0))),
            (3, Event(101.0, "b", "queued", None, TERMS)),
        ]
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE events SET at = 0", "no UPDATE"),
        ("DELETE FROM events", "no DELETE"),
        ("INSERT OR REPLACE INTO events VALUES (1, 0, 'x', 'queued', NULL, '{}')", "seq must be greater"),
        ("REPLACE INTO events VALUES (3, 0, 'x', 'queued', NULL, '{}')", "seq must be greater"),
        ("INSERT INTO events (at, reservation_id, kind, data) VALUES (0, 'x', 'queued', '{}')", "seq must be greater"),
        ("INSERT INTO events VALUES (9, 0, 'b', 'held', NULL, '{}')", "is not queued|another reservation is held"),
        ("INSERT INTO events VALUES (9, 0, 'x', 'released', 'explicit', '{}')", "is not held"),
        ("INSERT INTO events VALUES (9, 0, 'a', 'queued', NULL, '{}')", "exists already"),
        ("INSERT INTO events VALUES (9, 0, 'x', 'begun', NULL, '{}')", "is not live|CHECK constraint failed"),
        ("INSERT INTO events VALUES (9, 0, 'x', 'queued', NULL, 'no json')", "CHECK constraint failed|malformed JSON"),
        ("INSERT INTO events VALUES (9, 'soon', 'x', 'queued', NULL, '{}')", "cannot store TEXT value in REAL"),
    ],
)
def test_the_file_refuses_what_would_rewrite_history_from_any_shell(log: EventLog, statement: str, why: str) -> None:
    story(log)
    before = log.conn.execute("SELECT * FROM events").fetchall()
    shell = shutil.which("sqlite3")
    assert shell is not None, "the test needs the sqlite3 shell"
    ran = subprocess.run([shell, str(log.path), statement], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    with sqlite3.connect(log.path) as stranger, pytest.raises(sqlite3.Error, match=why):
        stranger.execute(statement)
    stranger.close()
    assert log.conn.execute("SELECT * FROM events").fetchall() == before


def test_the_database_ends_a_reservation_once(log: EventLog) -> None:
    story(log)
    log.append([(4, Event(102.0, "a", "released", "explicit", Ended()))])
    with pytest.raises(LogUnavailable, match="is not live"):
        log.append([(5, Event(103.0, "a", "expired", "duration_elapsed", Ended()))])


def test_the_views_show_people_what_happened(log: EventLog) -> None:
    story(log)
    log.append(
        [
            (4, Event(110.0, "a", "extended", "extend", Extended(200.5))),
            (5, Event(112.25, "a", "released", "explicit", Ended({"ok": [1]}))),
            (6, Event(112.25, "b", "held", None, Held(172.25))),
        ]
    )
    columns = [row[1] for row in log.conn.execute("PRAGMA table_info(reservations)")]
    rows = [dict(zip(columns, row, strict=True)) for row in log.conn.execute("SELECT * FROM reservations")]
    assert rows[0] == {
        "id": "a",
        "kind": "request",
        "state": "released",
        "reason": "explicit",
        "queued_at": "1970-01-01T00:01:40.000Z",
        "held_at": "1970-01-01T00:01:40.000Z",
        "ends_at": "1970-01-01T00:03:20.500Z",
        "ended_at": "1970-01-01T00:01:52.250Z",
        "queued_seconds": 0.0,
        "held_seconds": 12.25,
        "duration_cap": 60.0,
        "request_idx": None,
        "metadata": None,
        "result": '{"ok":[1]}',
        "attach_seconds": None,
    }
    assert [(r["id"], r["state"], r["queued_seconds"]) for r in rows[1:]] == [("b", "held", 11.25)]
    assert log.conn.execute("SELECT id, state FROM open_reservations").fetchall() == [("b", "held")]
    daily = dict(
        zip(
            [r[1] for r in log.conn.execute("PRAGMA table_info(daily)")],
            *log.conn.execute("SELECT * FROM daily"),
            strict=True,
        )
    )
    assert daily["day"] == "1970-01-01"
    assert (daily["reservations"], daily["released"], daily["open"], daily["busy_seconds"]) == (2, 1, 1, 12.25)
    assert (daily["p50_hold_seconds"], daily["p95_hold_seconds"]) == (12.25, 12.25)


def test_the_daily_view_has_the_nearest_rank_percentiles(log: EventLog) -> None:
    seq = 0
    for number in range(1, 21):
        name, at = f"r{number}", 1000.0 * number
        log.append(
            [
                (seq + 1, Event(at, name, "queued", None, TERMS)),
                (seq + 2, Event(at, name, "held", None, Held(at + 60))),
                (seq + 3, Event(at + number, name, "released", "explicit", Ended())),
            ]
        )
        seq += 3
    assert log.conn.execute("SELECT p50_hold_seconds, p95_hold_seconds FROM daily").fetchall() == [(10.0, 19.0)]


def test_a_second_worker_on_the_log_is_refused_and_told_who_has_it(log: EventLog) -> None:
    with pytest.raises(CannotStart, match=r"belongs to a worker that is running: pid \d+, since 20") as refused:
        open_log(log.path)
    assert not refused.value.tell, "the worker that runs is well: the autoscaler must not hear of a failure"


def test_the_files_are_for_their_owner_only(log: EventLog) -> None:
    story(log)
    files = sorted(log.path.parent.iterdir())
    assert [file.name for file in files] == [
        "nullworker.db",
        "nullworker.db-shm",
        "nullworker.db-wal",
        "nullworker.db.lock",
    ]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_cursor_is_kept_and_never_runs_ahead_of_the_log(log: EventLog) -> None:
    story(log)
    log.move_cursor("worker_status", 2)
    log.move_cursor("delete_requests", 99)
    assert (log.cursor("worker_status"), log.cursor("delete_requests"), log.cursor("nobody")) == (2, 3, 0)


def test_the_clocks_anchor_is_kept_while_something_is_live(log: EventLog) -> None:
    log.store_anchor(Anchor("boot", 12.5))
    assert log.anchor() is None, "nothing is timed by it"
    story(log)
    assert log.anchor() == Anchor("boot", 12.5)


def test_a_reader_sees_the_log_of_a_worker_that_runs(log: EventLog) -> None:
    story(log)
    reader = open_for_reading(log.path)
    assert reader.last_seq == 3
    with pytest.raises(LogUnavailable, match="readonly"):
        reader.move_cursor("nobody", 1)
    reader.close()
    with pytest.raises(CannotStart, match="no event log to read"):
        open_for_reading(log.path.with_name("none.db"))


@pytest.mark.parametrize(
    "event",
    [
        Event(1.5, "a", "queued", None, TERMS),
        Event(
            1.5,
            "a",
            "queued",
            None,
            Queued(
                kind="session",
                duration_cap=1.0,
                give_up_at=2.0,
                request_idx=2**70,
                metadata={"x": [None, "ü"]},
                session=SessionTerms(60.0, "http://x/", {"a": None}),
            ),
        ),
        Event(1.5, "a", "held", None, Held(2.0)),
        Event(1.5, "a", "extended", "ping", Extended(3.0)),
        Event(1.5, "a", "released", "explicit", Ended()),
        Event(1.5, "a", "released", "explicit", Ended(None)),
        Event(1.5, "a", "cancelled", "draining", Ended({"x": 1})),
    ],
)
def test_each_event_comes_back_from_its_row(event: Event) -> None:
    assert from_row(to_row(event)) == event


@pytest.mark.parametrize(
    "row",
    [
        (1.0, "a", "begun", None, "{}"),
        (1.0, "a", "queued", None, "{}"),
        (1.0, "a", "held", None, "[]"),
        (1.0, "a", "held", None, '{"ends_at": "soon"}'),
        (1.0, "a", "held", None, "{"),
        ("soon", "a", "held", None, '{"ends_at": 1}'),
        (1.0, "a", "held", None, None),
    ],
)
def test_a_row_that_is_no_event_is_called_damage(row: tuple[object, ...]) -> None:
    with pytest.raises(LogDamaged, match="cannot be read"):
        from_row(row)  # type: ignore[arg-type]


def test_every_kind_of_event_has_a_type_of_data() -> None:
    from nullworker.fsm.table import EVENT_KINDS

    assert tuple(DATA_OF) == EVENT_KINDS
