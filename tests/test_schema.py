"""The shape of the file: what it keeps out, what it forgets with whom, what its views say, and what it costs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nullworker import history, migrations, schema
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, SessionTerms
from nullworker.fsm.table import EventKind
from nullworker.log import EventLog, open_log

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with contextlib.closing(open_log(tmp_path / "nullworker.db", sync="normal")) as log:
        yield log


def old_log(folder: Path) -> sqlite3.Connection:
    """A file of version 1, without events."""
    conn = sqlite3.connect(folder / "old.db", isolation_level=None)
    conn.executescript((GOLDEN / "shape-v1.sql").read_text())
    return conn


def begin(name: str, seq: int) -> list[tuple[int, Event]]:
    """A session that is held, and whose owner is to be told of its end."""
    terms = SessionTerms(lifetime=60, auth_sha256="0" * 64, on_close_route="http://10.0.0.1/")
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
        "live VALUES ('x', 'ended', 0)",
        "live VALUES ('x', NULL, 0)",
        "live VALUES ('x', 'queued', NULL)",
        "live VALUES ('x', 'queued', 'perhaps')",
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
def test_no_table_takes_what_makes_no_sense(log: EventLog, row: str) -> None:
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
            lambda: history.reservation(log.conn, name),
            lambda: list(history.reservations(log.conn, limit=3)),
            lambda: list(history.reservations(log.conn, limit=3, before=name)),
            lambda: list(history.reservations(log.conn, state="held")),
            lambda: log.append([(seq + 3, Event(seq, name, "released", "explicit", Ended()))]),
            lambda: history.finished(log.conn, after=seq, limit=10),
            lambda: history.callbacks(log.conn, after=0),
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
    terms = SessionTerms(lifetime=60, auth_sha256="0" * 64)
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


def test_an_outcome_that_is_settled_settles_no_callback(log: EventLog) -> None:
    put(log, *(event for _, event in begin("s", 0)))
    end = put(log, Event(2, "s", "released", "session_end", Ended()))
    log.settle("delete_requests", [end], 3, "refused")
    assert [owed.seq for owed in history.callbacks(log.conn, after=0)] == [end]
    log.settle("callbacks", [end], 4, "delivered")
    assert history.callbacks(log.conn, after=0) == []


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
    steps = log.conn.execute("SELECT migration_set, name FROM _sqlite_migrations").fetchall()
    assert steps == [("nullworker", "m001_events"), ("nullworker", "m002_pruning")]


def test_a_file_that_cannot_be_made_has_nothing_in_it_and_says_why(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as conn:
        conn.execute("PRAGMA max_page_count = 5")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            migrations.migrate(conn)
        assert conn.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
        assert not conn.in_transaction


def test_a_file_whose_steps_were_cut_off_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {**migrations.STEPS, "m003_more": ["ALTER TABLE cursors ADD COLUMN at REAL"]}
    monkeypatch.setattr(migrations, "STEPS", {**steps, "m004_fails": ["CREATE TABLE events (seq)"]})
    with contextlib.closing(old_log(tmp_path)) as conn:
        with pytest.raises(sqlite3.OperationalError, match="exists"):
            migrations.migrate(conn)
        assert conn.execute("PRAGMA user_version").fetchone() == (1,)
        monkeypatch.setattr(migrations, "STEPS", {**steps, "m004_fails": ["ALTER TABLE settled ADD COLUMN by TEXT"]})
        migrations.migrate(conn)
        assert conn.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        applied = [name for (name,) in conn.execute("SELECT name FROM _sqlite_migrations ORDER BY id")]
        assert applied == ["m001_events", "m002_pruning", "m003_more", "m004_fails"]
        conn.execute("SELECT cursors.at, by FROM cursors, settled, timeline, done_with")


def test_a_file_of_version_1_is_brought_up_to_date_with_all_its_events(log: EventLog, tmp_path: Path) -> None:
    with contextlib.closing(old_log(tmp_path)) as conn:
        conn.execute("CREATE VIEW mine AS SELECT count(*) AS events FROM events")
        rows = [tuple(json.loads(line)) for line in (GOLDEN / "log-v1.jsonl").read_text().splitlines()]
        conn.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
    with contextlib.closing(open_log(tmp_path / "old.db")) as opened:
        assert opened.conn.execute("SELECT * FROM events").fetchall() == rows
        shape = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name <> 'mine' ORDER BY name"
        assert opened.conn.execute(shape).fetchall() == log.conn.execute(shape).fetchall()
        for pragma in ("user_version", "application_id"):
            ours, theirs = [each.conn.execute(f"PRAGMA {pragma}").fetchone() for each in (log, opened)]
            assert ours == theirs, pragma
        assert opened.conn.execute("SELECT events FROM mine").fetchone() == (len(rows),), "a user's view stays"
