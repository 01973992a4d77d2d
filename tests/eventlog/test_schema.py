"""The tables, triggers and views of the log: what they refuse, show and cost."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET
from sqlite_utils import Database

from nullworker.errors import CannotStart
from nullworker.eventlog import queries, schema
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, SessionTerms
from nullworker.fsm.table import EventKind

GOLDEN = Path(__file__).parent / "golden" / "log-v1.jsonl"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with contextlib.closing(open_log(tmp_path / "nullworker.db", sync="normal")) as log:
        yield log


def begin(name: str, seq: int) -> list[tuple[int, Event]]:
    """A session that is held, and whose owner is to be told of its end."""
    terms = SessionTerms(lifetime=60, on_close_route="http://10.0.0.1/")
    queued = Queued(kind="session", duration_cap=60, give_up_at=seq + 30, session=terms)
    return [
        (seq + 1, Event(seq, name, "queued", None, queued)),
        (seq + 2, Event(seq, name, "held", None, Held(seq + 60))),
    ]


@pytest.mark.parametrize(
    "row",
    [
        "events VALUES (9, NULL, 'x', 'queued', NULL, '{}')",
        "events VALUES (9, 0, 'open', NULL, NULL, '{}')",
        "events VALUES (9, 0, 'open', 'extended', 'extend', NULL)",
        "events VALUES (9, 0, 'open', 'extended', 'extend', 'no json')",
        "events VALUES (9, 0, 'open', 'begun', NULL, '{}')",
        "live VALUES ('ended', 'x', 0)",
        "live VALUES (NULL, 'x', 0)",
        "live VALUES ('queued', 'x', NULL)",
        "live VALUES ('queued', 'x', 'perhaps')",
        "live VALUES ('queued', 'x', 0)",
        "live VALUES ('queued', 'open', 0)",
        "callbacks VALUES (7), (7)",
        "cursors VALUES ('reader', NULL)",
        "cursors VALUES ('reader', 'the last')",
        "cursors VALUES ('reader', 1), ('reader', 2)",
        "settled VALUES (NULL, 1, 0, 'delivered', NULL)",
        "settled VALUES ('reader', NULL, 0, 'delivered', NULL)",
        "settled VALUES ('reader', 1, NULL, 'delivered', NULL)",
        "settled VALUES ('reader', 1, 0, NULL, NULL)",
        "settled VALUES ('reader', 1, 'soon', 'delivered', NULL)",
        "settled VALUES ('reader', 1, 0, 'delivered', NULL), ('reader', 1, 0, 'refused', NULL)",
        "meta VALUES (NULL, 'value')",
        "meta VALUES ('name', NULL)",
        "meta VALUES ('name', 'a'), ('name', 'b')",
    ],
)
def test_tables_refuse_invalid_rows(log: EventLog, row: str) -> None:
    log.append(begin("open", 0))
    with contextlib.closing(sqlite3.connect(log.path)) as shell, pytest.raises(sqlite3.IntegrityError):
        shell.execute(f"INSERT INTO {row}")


def test_what_is_read_and_written_costs_no_more_when_the_log_has_grown(log: EventLog) -> None:
    """In steps of SQLite's own machine, so that no clock has a say."""
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    def grow(reservations: int) -> None:
        for _ in range(reservations):
            seq = log.last_seq
            log.append([*begin(f"r{seq}", seq), (seq + 3, Event(seq, f"r{seq}", "released", "explicit", Ended()))])
            log.settle("callbacks", [seq + 3], 0, "delivered")

    def cost() -> list[int]:
        nonlocal steps
        seq, name, costs = log.last_seq, f"r{log.last_seq}", []
        log.conn.set_progress_handler(step, 1)
        for act in (
            lambda: log.append(begin(name, seq)),
            lambda: list(log.live()),
            lambda: log.conn.execute("SELECT * FROM open_reservations").fetchall(),
            lambda: queries.reservation(log.conn, name),
            lambda: list(queries.reservations(log.conn, limit=3)),
            lambda: list(queries.reservations(log.conn, limit=3, before=name)),
            lambda: list(queries.reservations(log.conn, state="held")),
            lambda: log.append([(seq + 3, Event(seq, name, "released", "explicit", Ended()))]),
            lambda: queries.finished(log.conn, after=seq, limit=10),
            lambda: queries.callbacks(log.conn, after=0),
            lambda: log.settle("callbacks", [seq + 3], 0, "delivered"),
        ):
            steps = 0
            act()
            costs.append(steps)
        log.conn.set_progress_handler(None, 0)
        return costs

    grow(3)
    small = cost()
    grow(300)
    assert all(large < 2 * little for large, little in zip(cost(), small, strict=True))


def queue(log: EventLog, name: str, at: float) -> None:
    terms = SessionTerms(lifetime=60)
    put(log, Event(at, name, "queued", None, Queued(kind="session", duration_cap=60, give_up_at=at, session=terms)))


def put(log: EventLog, *events: Event) -> int:
    """Append these. The seq of the last one."""
    log.append(list(enumerate(events, log.last_seq + 1)))
    return log.last_seq


def told_all(log: EventLog) -> None:
    for name in ("worker_status", "delete_requests"):
        log.move_cursor(name, log.last_seq)


@pytest.mark.parametrize("kind", ["released", "expired", "cancelled"])
def test_what_has_ended_can_be_pruned_however_it_ended(log: EventLog, kind: EventKind) -> None:
    put(log, *(event for _, event in begin("old", 0)))
    log.settle("callbacks", [put(log, Event(2, "old", kind, "any", Ended()))], 3, "delivered")
    queue(log, "open", 3)
    told_all(log)
    log.prune(["old"])
    assert [event.reservation_id for _, event in log.live()] == ["open"]
    assert log.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)


def test_what_is_pruned_takes_only_its_own_settlements_with_it(log: EventLog) -> None:
    ends = {}
    for name in ("old", "new"):
        put(log, *(event for _, event in begin(name, 0)))
        ends[name] = put(log, Event(2, name, "released", "explicit", Ended()))
        log.settle("callbacks", [ends[name]], 3, "given_up")
        log.settle("delete_requests", [ends[name]], 3, "refused")
    queue(log, "open", 3)
    told_all(log)
    log.prune(["old"])
    settled = log.conn.execute("SELECT name, seq FROM settled ORDER BY name").fetchall()
    assert settled == [("callbacks", ends["new"]), ("delete_requests", ends["new"])]


def test_pruning_waits_for_the_cursor_of_the_sink_that_is_in_force_and_for_no_others(log: EventLog) -> None:
    put(log, *(event for _, event in begin("old", 0)))
    log.settle("callbacks", [put(log, Event(2, "old", "released", "explicit", Ended()))], 3, "delivered")
    queue(log, "open", 3)
    told_all(log)
    log.move_cursor("sink of before", 1)

    def prunable() -> list[tuple[str]]:
        return log.conn.execute("SELECT reservation_id FROM done_with").fetchall()

    log.set_sink("sink")
    assert prunable() == [], "it has heard nothing yet"
    log.move_cursor("sink", 2)
    assert prunable() == []
    log.move_cursor("sink", 3)
    assert prunable() == [("old",)]
    log.set_sink("sink of before")
    assert prunable() == []
    log.set_sink(None)
    assert prunable() == [("old",)]


def test_no_duration_is_negative_whatever_the_clock_did(log: EventLog) -> None:
    """A log of a machine whose clock went back by hours in the middle of a hold."""
    queue(log, "a", 30_000.0)
    put(log, Event(29_000.0, "a", "held", None, Held(29_060.0)))
    end = Ended("done", attached_at=28_000.0)
    put(log, Event(1_200.0, "a", "released", "explicit", end))
    rows = log.conn.execute("SELECT queued_seconds, held_seconds, attach_seconds FROM reservations").fetchall()
    assert rows == [(0.0, 0.0, 0.0)]
    days = log.conn.execute("SELECT p50_hold_seconds, p95_hold_seconds, busy_seconds FROM daily").fetchall()
    assert days == [(0.0, 0.0, 0.0)]
    shown = queries.reservation(log.conn, "a")
    assert shown is not None
    assert (shown["queued_seconds"], shown["held_seconds"]) == (0, 0)


def test_the_view_says_how_long_it_took_a_consumer_to_attach(log: EventLog) -> None:
    for name, attached_at in (("a", 13.5004), ("b", UNSET)):
        put(log, *(event for _, event in begin(name, 11)))
        put(log, Event(20, name, "released", "explicit", Ended(attached_at=attached_at)))
    assert log.conn.execute("SELECT attach_seconds FROM reservations").fetchall() == [(2.5,), (None,)]


def test_a_log_knows_its_instance_and_has_an_id_and_a_key_of_its_own(tmp_path: Path) -> None:
    ids = set[tuple[str, str]]()
    for name in ("a", "b"):
        for instance in (None, "4711", None):
            with contextlib.closing(open_log(tmp_path / name)) as log:
                if instance is not None:
                    log.set_instance(instance)
                ids.add((log.log_id, log.sink_key))
                assert re.fullmatch("[0-9a-f]{16}", log.log_id)
                assert re.fullmatch("[0-9a-f]{64}", log.sink_key)
                last = log.instance
        assert last == "4711"
    assert len(ids) == 2
    assert len({key for _, key in ids}) == len({log_id for log_id, _ in ids}) == 2


def test_an_outcome_that_is_settled_settles_no_callback(log: EventLog) -> None:
    put(log, *(event for _, event in begin("s", 0)))
    end = put(log, Event(2, "s", "released", "session_end", Ended()))
    log.settle("delete_requests", [end], 3, "refused")
    assert [owed.seq for owed in queries.callbacks(log.conn, after=0)] == [end]
    log.settle("callbacks", [end], 4, "delivered")
    assert queries.callbacks(log.conn, after=0) == []


def test_the_view_has_the_last_deadline_each_end_and_milliseconds(log: EventLog) -> None:
    for name, ends_at in (("a", None), ("b", 80.0), ("c", None)):
        queue(log, name, 0.12345)
        put(log, Event(1.0, name, "held", None, Held(61.0)))
        if ends_at is not None:
            for later in (90.0, ends_at):
                put(log, Event(2.0, name, "extended", "extend", Extended(later)))
        end: EventKind = {"a": "released", "b": "expired", "c": "cancelled"}[name]  # type: ignore[assignment]
        put(log, Event(3.45678, name, end, "any", Ended("done")))
    rows = log.conn.execute(
        "SELECT id, state, ends_at, queued_seconds, held_seconds, result FROM reservations"
    ).fetchall()
    minute = "1970-01-01T00:01:"
    assert rows == [
        ("a", "released", f"{minute}01.000Z", 0.877, 2.457, '"done"'),
        ("b", "expired", f"{minute}20.000Z", 0.877, 2.457, '"done"'),
        ("c", "cancelled", f"{minute}01.000Z", 0.877, 2.457, '"done"'),
    ]


def test_every_view_rounds_a_time_as_the_others_do(log: EventLog) -> None:
    """0.49 ms before midnight is shown as midnight, so it is of the next day; the parts of a hold are its seconds."""
    midnight = 86_400.0
    queue(log, "late", midnight - 0.00049)
    put(log, Event(midnight + 0.0004, "late", "held", None, Held(midnight + 60)))
    put(log, Event(midnight + 1.0006, "late", "released", "explicit", Ended()))
    rows = log.conn.execute("SELECT queued_at, ended_at, held_seconds FROM reservations").fetchall()
    assert rows == [("1970-01-02T00:00:00.000Z", "1970-01-02T00:00:01.001Z", 1.001)]
    assert log.conn.execute("SELECT day, p50_hold_seconds FROM daily").fetchall() == [("1970-01-02", 1.001)]
    timeline = log.conn.execute("SELECT at FROM timeline WHERE kind <> 'held' ORDER BY seq").fetchall()
    assert timeline == [rows[0][:1], rows[0][1:2]]


def test_a_day_is_told_by_its_own_reservations_however_they_ended(log: EventLog) -> None:
    """Refused ones count and have no hold; equal holds are as many as they are; the next day is another."""
    day = 86_400.0
    for number, (begun, held, end) in enumerate(
        [
            *((0.0, None, "cancelled"), (0.0, None, "cancelled"), (0.0, None, "expired")),
            *((0.0, 1.00044, "released"), (0.0, 1.00044, "expired"), (0.0, 3.0, "cancelled"), (0.0, 3.0, "released")),
            *((day, None, "expired"), (day, 7.00044, "released"), (2 * day, None, "cancelled")),
        ]
    ):
        name = f"r{number}"
        queue(log, name, begun)
        if held is not None:
            put(log, Event(begun, name, "held", None, Held(begun + 60)))
        put(log, Event(begun + (held or 0.0), name, end, "any", Ended()))  # type: ignore[arg-type]
    queue(log, "open", 2 * day)
    assert log.conn.execute("SELECT * FROM daily").fetchall() == [
        ("1970-01-01", 7, 2, 2, 3, 0, 1.0, 3.0, 8.0),
        ("1970-01-02", 2, 1, 1, 0, 0, 7.0, 7.0, 7.0),
        ("1970-01-03", 2, 0, 0, 1, 1, None, None, 0.0),
    ]


def test_a_file_says_whose_it_is_and_of_which_version(log: EventLog) -> None:
    """`file` and later versions of this project go by that."""
    assert log.conn.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"nulw", "big"),)
    assert log.conn.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)


def test_a_file_that_cannot_be_made_has_nothing_in_it_and_says_why(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as conn:
        conn.execute("PRAGMA max_page_count = 5")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            schema.migrate(conn)
        assert conn.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
        assert not conn.in_transaction


@pytest.fixture
def versions_2_and_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made-up later versions, to test the way to them: one adds a column, one rebuilds a table and a view."""
    later: dict[int, Callable[[Database], object]] = {
        2: lambda db: db.table("cursors").add_column("moved_at", float),
        3: lambda db: db.table("settled").transform(rename={"detail": "why"}),
    }
    monkeypatch.setattr(schema, "MIGRATIONS", later)
    monkeypatch.setattr(schema, "VERSION", 3)


def golden_log(path: Path) -> list[tuple[Any, ...]]:
    """A file of version 1 with all events of the golden log, and a view that a user has added."""
    rows = [tuple(json.loads(line)) for line in GOLDEN.read_text().splitlines()]
    with contextlib.closing(open_log(path)) as log:
        log.conn.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
        log.conn.execute("CREATE VIEW mine AS SELECT count(*) AS events FROM events")
    return rows


def test_a_log_of_an_older_version_is_migrated_with_all_its_events(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows = golden_log(tmp_path / "log.db")
    request.getfixturevalue("versions_2_and_3")
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        assert log.conn.execute("PRAGMA user_version").fetchone() == (3,)
        assert log.conn.execute("SELECT * FROM events").fetchall() == rows
        log.conn.execute("SELECT moved_at, why FROM cursors, settled, timeline, done_with")
        assert log.conn.execute("SELECT events FROM mine").fetchone() == (len(rows),), "a user's view stays"
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            log.conn.execute("DELETE FROM events")


def test_a_migration_that_was_cut_off_goes_on_where_it_was(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden_log(tmp_path / "log.db")
    request.getfixturevalue("versions_2_and_3")
    third = schema.MIGRATIONS[3]

    def is_cut_off(db: Database) -> None:
        third(db)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setitem(schema.MIGRATIONS, 3, is_cut_off)
    with pytest.raises(CannotStart, match="full"):
        open_log(tmp_path / "log.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (2,)
        conn.execute("SELECT moved_at, detail FROM cursors, settled")
    monkeypatch.setitem(schema.MIGRATIONS, 3, third)
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        assert log.conn.execute("PRAGMA user_version").fetchone() == (3,)
