"""What the database itself refuses, from any SQLite shell, whatever conflict clause the statement has."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from pruning import add
from test_log import TERMS, queue

from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held

CLAUSES = ["", "OR REPLACE", "OR IGNORE", "OR FAIL", "OR ROLLBACK", "OR ABORT"]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    """One reservation has ended (events 1 to 4), one is held (5 to 7), one waits (8)."""
    with contextlib.closing(open_log(tmp_path / "nullworker.db", sync="normal")) as log:
        add(log, "over", 0.0)
        add(log, "held", 10.0, end=None)
        queue(log, "waiting")
        yield log


def contents(log: EventLog) -> list[tuple[object, ...]]:
    tables = ("events", "live", "callbacks", "pruning")
    return [row for table in tables for row in log.conn.execute(f"SELECT '{table}', * FROM {table} ORDER BY 2")]


def refused(log: EventLog, statement: str) -> None:
    """Nothing of it is there afterwards, whether it was alone or in a transaction, and one is held as before."""
    before = contents(log)
    for clause, recursive, alone in itertools.product(CLAUSES, (True, False), (True, False)):
        with contextlib.closing(sqlite3.connect(log.path, isolation_level=None)) as shell:
            shell.execute(f"PRAGMA recursive_triggers = {recursive}")
            if not alone:
                shell.execute("BEGIN")
            with pytest.raises(sqlite3.IntegrityError):
                shell.execute(statement.format(clause=clause))
            if shell.in_transaction:
                shell.execute("COMMIT")
        assert contents(log) == before, f"{clause}, recursive: {recursive}, alone: {alone}"
    assert log.conn.execute("SELECT count(*) FROM reservations WHERE state = 'held'").fetchone() == (1,)


INSERTS = {
    "a second held": "(9, 20, 'waiting', 'held', NULL, '{\"ends_at\": 80}')",
    "the held one again": "(9, 20, 'held', 'held', NULL, '{\"ends_at\": 80}')",
    "one that is over": "(9, 20, 'over', 'held', NULL, '{\"ends_at\": 80}')",
    "one that never was": "(9, 20, 'nobody', 'held', NULL, '{\"ends_at\": 80}')",
    "a second end": "(9, 20, 'over', 'cancelled', 'draining', '{}')",
    "an end of nothing": "(9, 20, 'nobody', 'expired', 'busy', '{}')",
    "a release of what waits": "(9, 20, 'waiting', 'released', 'explicit', '{}')",
    "an extension of what waits": "(9, 20, 'waiting', 'extended', 'ping', '{\"ends_at\": 80}')",
    "a second claim": "(9, 20, 'waiting', 'queued', NULL, '{}')",
    "a claim that is over": "(9, 20, 'over', 'queued', NULL, '{}')",
    "a changed event": "(6, 20, 'held', 'held', NULL, '{\"ends_at\": 1e9}')",
    "an event in between": "(0, 20, 'nobody', 'queued', NULL, '{}')",
    "a second row that may not be": "(9, 20, 'new', 'queued', NULL, '{}'), (10, 20, 'new', 'held', NULL, '{}')",
}


@pytest.mark.parametrize("row", INSERTS.values(), ids=INSERTS)
def test_no_insert_makes_a_history_that_cannot_be(log: EventLog, row: str) -> None:
    refused(log, "INSERT {clause} INTO events VALUES " + row.replace("{", "{{").replace("}", "}}"))


CHANGES = [
    "UPDATE {clause} events SET reason = 'explicit' WHERE seq = 4",
    "UPDATE {clause} events SET seq = 9 WHERE seq = 4",
    "UPDATE {clause} events SET seq = 4 WHERE seq = 8",
    "DELETE FROM events",
    "UPDATE {clause} live SET state = 'held' WHERE reservation_id = 'waiting'",
    "UPDATE {clause} live SET state = 'queued' WHERE reservation_id = 'held'",
    "UPDATE {clause} live SET reservation_id = 'waiting' WHERE reservation_id = 'held'",
    "UPDATE {clause} live SET callback = 1",
    "DELETE FROM live",
    "INSERT {clause} INTO live VALUES ('held', 'waiting', 0)",
    "INSERT {clause} INTO live VALUES ('held', 'held', 1)",
    "INSERT {clause} INTO live VALUES ('queued', 'over', 0)",
    "INSERT {clause} INTO live VALUES ('queued', 'nobody', 0)",
    "INSERT {clause} INTO pruning VALUES ('held')",
    "INSERT {clause} INTO pruning VALUES ('over')",
]


@pytest.mark.parametrize("statement", CHANGES)
def test_no_change_of_what_the_triggers_go_by(log: EventLog, statement: str) -> None:
    refused(log, statement)


@pytest.mark.parametrize("clause", CLAUSES)
def test_what_may_happen_may_happen_with_every_clause(log: EventLog, clause: str) -> None:
    """A guard that refused everything would pass the tests above."""
    with contextlib.closing(sqlite3.connect(log.path, isolation_level=None)) as shell:
        for row in (
            "(9, 20, 'held', 'extended', 'extend', '{\"ends_at\": 80}')",
            "(10, 20, 'held', 'released', 'explicit', '{}'), (11, 20, 'waiting', 'held', NULL, '{\"ends_at\": 80}')",
            "(12, 20, 'new', 'queued', NULL, '{}'), (13, 20, 'new', 'expired', 'busy', '{}')",
        ):
            shell.execute(f"INSERT {clause} INTO events VALUES {row}")
    assert log.conn.execute("SELECT * FROM live").fetchall() == [("held", "waiting", 0)]


def test_each_commit_writes_three_pages(log: EventLog) -> None:
    """One of events, one of their index, one of live: each is one write to a disk that is waited for."""
    log.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number, events in enumerate(
        (
            [(9, Event(30.0, "waiting", "cancelled", "client_disconnect", Ended()))],
            [(10, Event(31.0, "held", "released", "explicit", Ended()))],
            [(11, Event(32.0, "new", "queued", None, TERMS)), (12, Event(32.0, "new", "held", None, Held(90.0)))],
        ),
        1,
    ):
        log.append(events)
        # sqlite.org/fileformat2.html#walformat
        assert (Path(f"{log.path}-wal").stat().st_size - 32) // (4096 + 24) == 3 * number
