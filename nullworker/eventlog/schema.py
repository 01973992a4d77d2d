"""The tables, triggers and views of the event log.

Triggers refuse to change or remove an event, to end a reservation twice and to hold two at once, whichever program
writes: this worker, a second one, or a sqlite3 shell. Each raises ABORT before the row is inserted; none relies on a
UNIQUE index, since an outer INSERT OR REPLACE or OR IGNORE decides what happens at a constraint, within triggers too
(sqlite.org/lang_createtrigger.html), but not at a RAISE.

Rows are only removed by inserting a reservation's id into `pruning`, which is allowed once the view `done_with` lists
it: it has ended and every reader has passed it.

`live` is derived from `events` by triggers, so that a start reads only live reservations. It is keyed by state: a claim
writes three pages, of events, their index and live. Times are stored as epoch seconds; the views show them as ISO 8601
UTC with milliseconds.

`user_version` is the version of a file's tables. A later version adds a step to MIGRATIONS that changes tables;
triggers and views hold no data, so a migrated file gets all of them anew.
"""

from __future__ import annotations

import re
import secrets
import socket
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
#: That of the database of `nullworker collect`, "nulf": its views have the names and columns of a log.
FLEET_APPLICATION_ID: Final = 0x6E756C66
#: That of the ledger of `nullworker dispatch`, "nuld".
LEDGER_APPLICATION_ID: Final = 0x6E756C64

TABLES: Final = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,  -- order of the events; given by the writer
    at REAL NOT NULL,  -- epoch seconds
    reservation_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (
        kind = 'queued' OR kind = 'held' OR kind = 'extended'
        OR kind = 'released' OR kind = 'expired' OR kind = 'cancelled'
    ),
    reason TEXT,
    data TEXT NOT NULL CHECK (json_valid(data))
) STRICT;
CREATE INDEX events_by_reservation ON events (reservation_id, kind);

CREATE TABLE live (
    state TEXT NOT NULL CHECK (state IN ('queued', 'held')),
    reservation_id TEXT NOT NULL,
    callback INTEGER NOT NULL,  -- whether a session's end is to be POSTed somewhere
    PRIMARY KEY (state, reservation_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE callbacks (
    seq INTEGER PRIMARY KEY  -- the end of a session whose on_close_route has not been settled
) STRICT;

CREATE TABLE cursors (
    name TEXT PRIMARY KEY,  -- who reads along: worker_status, delete_requests, a sink
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
    name TEXT PRIMARY KEY,  -- log_id, instance, sink_key, sink, clock, probe
    value TEXT NOT NULL
) STRICT;
"""

# SQLite makes a temporary table of an IN list of three or more, for each row that is inserted: with `=` a claim and its
# release take half the CPU.
RULES: Final = """
CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only: no UPDATE'); END;
CREATE TRIGGER events_are_not_removed BEFORE DELETE ON events
WHEN NOT EXISTS (SELECT 1 FROM pruning WHERE reservation_id = OLD.reservation_id)
BEGIN SELECT RAISE(ABORT, 'events are append-only: no DELETE'); END;
CREATE TRIGGER events_follow_from_what_is_live BEFORE INSERT ON events
BEGIN SELECT CASE
    WHEN NEW.seq <= (SELECT max(seq) FROM events)
    THEN RAISE(ABORT, 'events are append-only: seq must be greater than every other')
    WHEN NEW.kind = 'queued' AND EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id)
    THEN RAISE(ABORT, 'the reservation of this event exists already')
    WHEN NEW.kind = 'held'
     AND NOT EXISTS (SELECT 1 FROM live WHERE state = 'queued' AND reservation_id = NEW.reservation_id)
    THEN RAISE(ABORT, 'the reservation of this event is not queued')
    WHEN NEW.kind = 'held' AND EXISTS (SELECT 1 FROM live WHERE state = 'held')
    THEN RAISE(ABORT, 'another reservation is held')
    WHEN NEW.kind IN ('extended', 'released')
     AND NOT EXISTS (SELECT 1 FROM live WHERE state = 'held' AND reservation_id = NEW.reservation_id)
    THEN RAISE(ABORT, 'the reservation of this event is not held')
    WHEN NEW.kind IN ('expired', 'cancelled')
     AND NOT EXISTS (SELECT 1 FROM live WHERE state = 'held' AND reservation_id = NEW.reservation_id)
     AND NOT EXISTS (SELECT 1 FROM live WHERE state = 'queued' AND reservation_id = NEW.reservation_id)
    THEN RAISE(ABORT, 'the reservation of this event is not live')
END; END;

CREATE TRIGGER live_begins_with_its_event BEFORE INSERT ON live
WHEN NEW.state <> 'queued'
  OR NOT EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id AND kind = 'queued')
  OR EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id AND kind = 'held')
  OR EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id AND kind = 'expired')
  OR EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id AND kind = 'cancelled')
BEGIN SELECT RAISE(ABORT, 'live follows events: no INSERT'); END;
CREATE TRIGGER live_is_held_with_its_event BEFORE UPDATE ON live
WHEN OLD.state <> 'queued' OR NEW.state <> 'held' OR NEW.reservation_id <> OLD.reservation_id
  OR NOT EXISTS (SELECT 1 FROM events WHERE reservation_id = NEW.reservation_id AND kind = 'held')
BEGIN SELECT RAISE(ABORT, 'live follows events: no UPDATE'); END;
CREATE TRIGGER live_ends_with_its_event BEFORE DELETE ON live
WHEN NOT EXISTS (SELECT 1 FROM events WHERE reservation_id = OLD.reservation_id AND kind = 'released')
 AND NOT EXISTS (SELECT 1 FROM events WHERE reservation_id = OLD.reservation_id AND kind = 'expired')
 AND NOT EXISTS (SELECT 1 FROM events WHERE reservation_id = OLD.reservation_id AND kind = 'cancelled')
BEGIN SELECT RAISE(ABORT, 'live follows events: no DELETE'); END;

CREATE TRIGGER live_queued AFTER INSERT ON events WHEN NEW.kind = 'queued'
BEGIN INSERT INTO live VALUES ('queued', NEW.reservation_id, NEW.data ->> '$.session.on_close_route' IS NOT NULL); END;
CREATE TRIGGER live_held AFTER INSERT ON events WHEN NEW.kind = 'held'
BEGIN UPDATE live SET state = 'held' WHERE state = 'queued' AND reservation_id = NEW.reservation_id; END;
CREATE TRIGGER live_ended AFTER INSERT ON events
WHEN NEW.kind = 'released' OR NEW.kind = 'expired' OR NEW.kind = 'cancelled'
BEGIN
    INSERT INTO callbacks
        SELECT NEW.seq FROM live WHERE state = 'held' AND reservation_id = NEW.reservation_id AND callback;
    DELETE FROM live WHERE state = 'held' AND reservation_id = NEW.reservation_id;
    DELETE FROM live WHERE state = 'queued' AND reservation_id = NEW.reservation_id;
END;
CREATE TRIGGER callbacks_settled AFTER INSERT ON settled WHEN NEW.name = 'callbacks'
BEGIN DELETE FROM callbacks WHERE seq = NEW.seq; END;

CREATE TRIGGER pruning_only_what_is_done_with BEFORE INSERT ON pruning
WHEN NOT EXISTS (SELECT 1 FROM done_with WHERE reservation_id = NEW.reservation_id)
BEGIN SELECT RAISE(ABORT, 'only a reservation that has ended, and of which all have heard, can be pruned'); END;
CREATE TRIGGER pruned AFTER INSERT ON pruning
BEGIN
    DELETE FROM settled
     WHERE name IN (SELECT 'callbacks' UNION ALL SELECT name FROM cursors)
       AND seq IN (SELECT seq FROM events WHERE reservation_id = NEW.reservation_id);
    DELETE FROM events WHERE reservation_id = NEW.reservation_id;
    DELETE FROM pruning WHERE reservation_id = NEW.reservation_id;
END;
"""


def _ms(column: str) -> str:
    return f"CAST({column} * 1000 + 0.5 AS INTEGER) / 1000.0"  # clock.to_ms


def _iso(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {_ms(column)}, 'unixepoch')"


def _span(start: str, end: str) -> str:
    """Seconds between two times, as clock.elapsed: never negative; NULL if one of them is NULL."""
    return f"round(max({_ms(end)} - {_ms(start)}, 0.0), 3)"


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
       {_span("q.at", "coalesce(h.at, e.at)")} AS queued_seconds,
       {_span("h.at", "e.at")} AS held_seconds,
       q.data ->> 'duration_cap' AS duration_cap,
       q.data ->> 'request_idx' AS request_idx,
       q.data -> 'metadata' AS metadata,
       e.data -> 'result' AS result,
       {_span("h.at", "coalesce(e.data ->> 'attached_at', a.at)")} AS attach_seconds
  FROM events AS q
  LEFT JOIN events AS h ON h.reservation_id = q.reservation_id AND h.kind = 'held'
  LEFT JOIN events AS e ON e.reservation_id = q.reservation_id AND e.kind IN ('released', 'expired', 'cancelled')
  LEFT JOIN events AS x ON x.seq = (
       SELECT max(seq) FROM events WHERE reservation_id = q.reservation_id AND kind = 'extended')
  LEFT JOIN events AS a ON a.seq = (
       SELECT min(seq) FROM events
        WHERE reservation_id = q.reservation_id AND kind = 'extended' AND reason = 'attached')
 WHERE q.kind = 'queued'
 ORDER BY q.seq
"""

_OPEN: Final = """
SELECT * FROM reservations WHERE id IN (SELECT reservation_id FROM live)
"""

_DAILY: Final = f"""
WITH ended AS (
    SELECT date({_ms("q.at")}, 'unixepoch') AS day, e.kind AS state, {_span("h.at", "e.at")} AS held
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

#: Whose cursors pruning waits for. `meta.sink` names the cursor of the sink that is in force.
_READERS: Final = """
SELECT 'worker_status' AS name UNION ALL SELECT 'delete_requests' UNION ALL SELECT value FROM meta WHERE name = 'sink'
"""

_DONE_WITH: Final = """
SELECT seq, at, reservation_id
  FROM events
 WHERE kind IN ('released', 'expired', 'cancelled')
   AND seq < (SELECT max(seq) FROM events)
   AND seq <= (SELECT min(coalesce(cursors.seq, 0)) FROM readers LEFT JOIN cursors USING (name))
   AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = events.seq)
"""

VIEWS: Final = {
    "timeline": _TIMELINE,
    "reservations": _RESERVATIONS,
    "open_reservations": _OPEN,
    "daily": _DAILY,
    "readers": _READERS,
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


def migrate(conn: sqlite3.Connection) -> bool:
    """Bring a file to VERSION: a new one in one transaction, an older one in one transaction for each step.

    `user_version` is set in the transaction of its step, so a start that was killed continues where it was. Returns
    whether there was anything to do.

    Raises:
        sqlite3.Error: it cannot be read or written; the step that failed has changed nothing.
    """
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return False
    if version == 0:
        with transaction(conn):
            for statement in statements(TABLES):
                conn.execute(statement)
            ids = {"log_id": secrets.token_hex(8), "instance": socket.gethostname(), "sink_key": secrets.token_hex(32)}
            conn.executemany("INSERT INTO meta VALUES (?, ?)", ids.items())
            _finish(conn, VERSION)
        return True
    from sqlite_utils import Database  # 30 ms that a worker with a new or current log does not pay

    for step in range(version + 1, VERSION + 1):
        with transaction(conn):
            MIGRATIONS[step](Database(conn, recursive_triggers=False))
            _finish(conn, step)
    return True


def _finish(conn: sqlite3.Connection, version: int) -> None:
    for statement in _RULES_AND_VIEWS:
        conn.execute(statement)
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {version}")


def check_readable(path: Path, conn: sqlite3.Connection) -> None:
    """As `check_version`, for reading: then the database of a fleet will do, too.

    Raises:
        CannotStart, sqlite3.Error: as there.
    """
    if not is_fleet(conn):
        check_version(path, conn)


def is_fleet(conn: sqlite3.Connection) -> bool:
    """Whether it is the database of `nullworker collect`."""
    return bool(conn.execute("PRAGMA application_id").fetchone()[0] == FLEET_APPLICATION_ID)


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
