"""The tables, triggers and views of the event log.

Triggers refuse to change or remove an event, to end a reservation twice and to hold two at once, whoever writes: this
worker, a second one, or a sqlite3 shell. INSERT OR REPLACE bypasses the triggers for UPDATE and DELETE, so an insert
must also come after the last event.

Rows are only removed by inserting a reservation's id into `pruning`, which is allowed once the view `done_with` lists
it: it has ended and every reader has passed it.

`live` is derived from `events` by triggers, so that a start reads only what is open. Times are stored as epoch seconds;
the views show them as ISO 8601 UTC with milliseconds.

`user_version` is the version of a file's tables. A later version adds a step to MIGRATIONS that changes tables;
triggers and views hold no data, so a migrated file gets all of them anew.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nullworker.errors import CannotStart
from nullworker.eventlog.sqlite import statements, transaction

if TYPE_CHECKING:
    from sqlite_utils import Database

#: `PRAGMA user_version` of a file that this code writes.
VERSION: Final = 1
#: For STRICT tables and `->>`. Ubuntu 22.04's own Python has 3.37.
OLDEST_SQLITE: Final = (3, 38)
#: `PRAGMA application_id`: "nulw", so that `file` and this project know whose it is.
APPLICATION_ID: Final = 0x6E756C77

TABLES: Final = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,  -- order of the events; given by the writer
    at REAL NOT NULL,  -- epoch seconds
    reservation_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('queued', 'held', 'extended', 'released', 'expired', 'cancelled')),
    reason TEXT,
    data TEXT NOT NULL CHECK (json_valid(data))
) STRICT;
CREATE INDEX events_by_reservation ON events (reservation_id, kind);

CREATE TABLE live (
    reservation_id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('queued', 'held')),
    callback INTEGER NOT NULL  -- whether a session's end is to be POSTed somewhere
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX one_held ON live (state) WHERE state = 'held';

CREATE TABLE callbacks (
    seq INTEGER PRIMARY KEY  -- the end of a session whose on_close_route has not been settled
) STRICT;

CREATE TABLE cursors (
    name TEXT PRIMARY KEY,  -- who reads along: worker_status, delete_requests
    seq INTEGER NOT NULL  -- the last event that the other side has acknowledged
) STRICT;
CREATE TABLE settled (
    name TEXT NOT NULL,  -- the reader
    seq INTEGER NOT NULL,  -- an event with which it is done in another way than by its cursor
    at REAL NOT NULL,
    outcome TEXT NOT NULL,  -- delivered, refused, given_up
    detail TEXT,
    PRIMARY KEY (name, seq)
) STRICT;
CREATE TABLE pruning (
    reservation_id TEXT PRIMARY KEY  -- named here, a reservation is removed; empty outside of a transaction
) STRICT;
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
"""

RULES: Final = """
CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only: no UPDATE'); END;
CREATE TRIGGER events_are_not_removed BEFORE DELETE ON events
WHEN NOT EXISTS (SELECT 1 FROM pruning WHERE reservation_id = OLD.reservation_id)
BEGIN SELECT RAISE(ABORT, 'events are append-only: no DELETE'); END;
CREATE TRIGGER events_come_after_the_last BEFORE INSERT ON events
WHEN NEW.seq <= (SELECT max(seq) FROM events)
BEGIN SELECT RAISE(ABORT, 'events are append-only: seq must be greater than every other'); END;
CREATE TRIGGER events_end_only_what_is_live BEFORE INSERT ON events
WHEN NEW.kind <> 'queued' AND NOT EXISTS (SELECT 1 FROM live WHERE reservation_id = NEW.reservation_id)
BEGIN SELECT RAISE(ABORT, 'the reservation of this event is not live'); END;
CREATE TRIGGER events_queue_only_what_is_new BEFORE INSERT ON events
WHEN NEW.kind = 'queued' AND EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id)
BEGIN SELECT RAISE(ABORT, 'the reservation of this event exists already'); END;

CREATE TRIGGER live_queued AFTER INSERT ON events WHEN NEW.kind = 'queued'
BEGIN INSERT INTO live VALUES (NEW.reservation_id, 'queued', NEW.data ->> '$.session.on_close_route' IS NOT NULL); END;
CREATE TRIGGER live_held AFTER INSERT ON events WHEN NEW.kind = 'held'
BEGIN UPDATE live SET state = 'held' WHERE reservation_id = NEW.reservation_id; END;
CREATE TRIGGER live_ended AFTER INSERT ON events WHEN NEW.kind IN ('released', 'expired', 'cancelled')
BEGIN
    INSERT INTO callbacks
        SELECT NEW.seq FROM live WHERE reservation_id = NEW.reservation_id AND callback AND state = 'held';
    DELETE FROM live WHERE reservation_id = NEW.reservation_id;
END;
CREATE TRIGGER callbacks_settled AFTER INSERT ON settled WHEN NEW.name = 'callbacks'
BEGIN DELETE FROM callbacks WHERE seq = NEW.seq; END;

CREATE TRIGGER pruning_only_what_is_done_with BEFORE INSERT ON pruning
WHEN NOT EXISTS (SELECT 1 FROM done_with WHERE reservation_id = NEW.reservation_id)
BEGIN SELECT RAISE(ABORT, 'only a reservation that has ended, and of which all have heard, can be pruned'); END;
CREATE TRIGGER pruned AFTER INSERT ON pruning
BEGIN
    DELETE FROM settled
     WHERE name IN ('callbacks', 'delete_requests')
       AND seq IN (SELECT seq FROM events WHERE reservation_id = NEW.reservation_id);
    DELETE FROM events WHERE reservation_id = NEW.reservation_id;
    DELETE FROM pruning WHERE reservation_id = NEW.reservation_id;
END;
"""


def _ms(column: str) -> str:
    return f"CAST({column} * 1000 + 0.5 AS INTEGER) / 1000.0"  # clock.to_ms


def _iso(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {_ms(column)}, 'unixepoch')"


_TIMELINE: Final = f"""
SELECT seq, {_iso("at")} AS at, reservation_id, kind, reason, data FROM events
"""

_RESERVATIONS: Final = f"""
SELECT q.reservation_id AS id,
       q.data ->> 'kind' AS kind,
       coalesce(e.kind, iif(h.seq IS NULL, 'queued', 'held')) AS state,
       e.reason AS reason,
       {_iso("q.at")} AS queued_at,
       {_iso("h.at")} AS held_at,
       {_iso("coalesce(x.data ->> 'ends_at', h.data ->> 'ends_at')")} AS ends_at,
       {_iso("e.at")} AS ended_at,
       round({_ms("coalesce(h.at, e.at)")} - {_ms("q.at")}, 3) AS queued_seconds,
       round({_ms("e.at")} - {_ms("h.at")}, 3) AS held_seconds,
       q.data ->> 'duration_cap' AS duration_cap,
       q.data ->> 'request_idx' AS request_idx,
       q.data -> 'metadata' AS metadata,
       e.data -> 'result' AS result
  FROM events AS q
  LEFT JOIN events AS h ON h.reservation_id = q.reservation_id AND h.kind = 'held'
  LEFT JOIN events AS e ON e.reservation_id = q.reservation_id AND e.kind IN ('released', 'expired', 'cancelled')
  LEFT JOIN events AS x ON x.seq = (
       SELECT max(seq) FROM events WHERE reservation_id = q.reservation_id AND kind = 'extended')
 WHERE q.kind = 'queued'
 ORDER BY q.seq
"""

_OPEN: Final = """
SELECT * FROM reservations WHERE id IN (SELECT reservation_id FROM live)
"""

_DAILY: Final = f"""
WITH ended AS (
    SELECT date({_ms("q.at")}, 'unixepoch') AS day, e.kind AS state, {_ms("e.at")} - {_ms("h.at")} AS held
      FROM events AS q
      LEFT JOIN events AS h ON h.reservation_id = q.reservation_id AND h.kind = 'held'
      LEFT JOIN events AS e ON e.reservation_id = q.reservation_id AND e.kind IN ('released', 'expired', 'cancelled')
     WHERE q.kind = 'queued'
), ranked AS (
    SELECT day, state, held,
           row_number() OVER (PARTITION BY day, held IS NULL ORDER BY held) AS rank,
           count(held) OVER (PARTITION BY day) AS holds
      FROM ended
)
SELECT day,
       count(*) AS reservations,
       count(*) FILTER (WHERE state = 'released') AS released,
       count(*) FILTER (WHERE state = 'expired') AS expired,
       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE state IS NULL) AS open,
       round(min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.50 * holds), 3) AS p50_hold_seconds,
       round(min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.95 * holds), 3) AS p95_hold_seconds,
       round(coalesce(sum(held), 0), 3) AS busy_seconds
  FROM ranked
 GROUP BY day
 ORDER BY day
"""

_DONE_WITH: Final = """
SELECT seq, at, reservation_id
  FROM events
 WHERE kind IN ('released', 'expired', 'cancelled')
   AND seq < (SELECT max(seq) FROM events)
   AND seq <= (SELECT iif(count(*) = 2, min(seq), -1) FROM cursors WHERE name IN ('worker_status', 'delete_requests'))
   AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = events.seq)
"""

VIEWS: Final = {
    "timeline": _TIMELINE,
    "reservations": _RESERVATIONS,
    "open_reservations": _OPEN,
    "daily": _DAILY,
    "done_with": _DONE_WITH,
}

#: By version: what brings the tables from the one before to it. `Database` is sqlite-utils', for its `transform`.
MIGRATIONS: Final[dict[int, Callable[[Database], object]]] = {}

_RULES_AND_VIEWS: Final = [
    *(f"DROP TRIGGER IF EXISTS {name}" for name in re.findall(r"CREATE TRIGGER (\w+)", RULES)),
    *statements(RULES),
    *(f"DROP VIEW IF EXISTS {name}" for name in VIEWS),
    *(f"CREATE VIEW {name} AS {select}" for name, select in VIEWS.items()),
]


def migrate(conn: sqlite3.Connection) -> None:
    """Bring a file to VERSION: a new one in one transaction, an older one in one transaction for each step.

    `user_version` is set in the transaction of its step, so a start that was killed goes on where it was.

    Raises:
        sqlite3.Error: it cannot be read or written; the step that failed has changed nothing.
    """
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    if version == 0:
        with transaction(conn):
            for statement in statements(TABLES):
                conn.execute(statement)
            _finish(conn, VERSION)
        return
    from sqlite_utils import Database  # 30 ms that a worker with a new or current log does not pay

    for step in range(version + 1, VERSION + 1):
        with transaction(conn):
            MIGRATIONS[step](Database(conn, recursive_triggers=False))
            _finish(conn, step)


def _finish(conn: sqlite3.Connection, version: int) -> None:
    for statement in _RULES_AND_VIEWS:
        conn.execute(statement)
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {version}")


def check_version(path: Path, conn: sqlite3.Connection) -> None:
    """Whether this code may use a file, with the SQLite that this Python has.

    Raises:
        CannotStart: it is of another program, or of a newer version of this one; or SQLite is too old for either.
        sqlite3.Error: it cannot be read.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        raise CannotStart(
            f"this Python has SQLite {sqlite3.sqlite_version}, and the event log needs {needed} or newer; "
            "use a Python that brings its own, such as uv's"
        )
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    owner = conn.execute("PRAGMA application_id").fetchone()[0]
    empty = conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if owner != APPLICATION_ID and not empty:
        raise CannotStart(f"{path} is a database of another program; set NULL_EVENT_LOG to another file")
    if version > VERSION:
        raise CannotStart(
            f"{path} was written by a newer nullworker (log version {version}, this one knows {VERSION}); "
            "update nullworker, or set NULL_EVENT_LOG to another file"
        )
