"""The tables, triggers and views of the fleet's database.

`received` has every event once, unchanged. It is append-only, except that retention removes whole reservations by
inserting them into `pruning`. `holds` has a row for each reservation with the seqs of its events. The first `queued`,
`held` and end of a reservation count; a second event with the same seq is kept and flagged, and changes no other view.

The views have the names and columns of a worker's log, preceded by `worker`, `instance` and `gpu`. Times are stored as
epoch seconds and shown as ISO 8601 UTC with milliseconds; durations are seconds.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlite_utils import Database, Migrations

from nullworker.eventlog.schema import FLEET_APPLICATION_ID
from nullworker.eventlog.sqlite import transaction

#: `PRAGMA user_version` of a file that this code writes.
VERSION: Final = 1

TABLES: Final = (
    """
    CREATE TABLE sources (
        id INTEGER PRIMARY KEY,
        source TEXT NOT NULL UNIQUE,  -- nullworker/<instance>/<log id>
        key_sha256 TEXT NOT NULL,  -- of the key of the first batch; '' if it had none
        worker TEXT NOT NULL,
        instance TEXT NOT NULL,
        gpu TEXT,
        version TEXT,
        url TEXT,
        first_heard_at REAL NOT NULL,  -- collector's clock
        last_heard_at REAL NOT NULL,  -- collector's clock
        skew_seconds REAL,  -- worker's clock less the collector's
        started_at REAL,  -- worker's clock
        stopped_at REAL  -- worker's clock; NULL when it has been heard since
    ) STRICT
    """,
    """
    CREATE TABLE received (
        id INTEGER PRIMARY KEY,
        source_id INTEGER NOT NULL REFERENCES sources (id),
        seq INTEGER,  -- of the event in its log
        event_id TEXT NOT NULL,
        digest TEXT NOT NULL,  -- of the content: half a SHA-256
        conflict INTEGER NOT NULL,  -- 1: a different event with this seq had come
        at REAL,
        kind TEXT,  -- NULL: the views ignore it
        reservation_id TEXT,
        reason TEXT,
        received_at REAL NOT NULL,  -- collector's clock
        body TEXT NOT NULL,  -- the event as it came
        type TEXT GENERATED ALWAYS AS (body ->> '$.type') VIRTUAL,
        data TEXT GENERATED ALWAYS AS (coalesce(body -> '$.data.data', '{}')) VIRTUAL
    ) STRICT
    """,
    "CREATE UNIQUE INDEX received_once ON received (source_id, seq, digest) WHERE seq IS NOT NULL",
    "CREATE UNIQUE INDEX received_once_by_id ON received (source_id, event_id, digest) WHERE seq IS NULL",
    "CREATE INDEX received_by_reservation ON received (reservation_id, kind) WHERE kind IS NOT NULL",
    "CREATE INDEX received_conflicts ON received (source_id, seq) WHERE conflict",
    """
    CREATE TABLE holds (
        id INTEGER PRIMARY KEY,
        reservation_id TEXT NOT NULL,
        source_id INTEGER NOT NULL REFERENCES sources (id),
        queued INTEGER,  -- received.id of the event, as in the next ones
        held INTEGER,
        extended INTEGER,  -- the last one
        ended INTEGER,
        held_at REAL,
        ended_at REAL,
        UNIQUE (reservation_id, source_id)
    ) STRICT
    """,
    "CREATE INDEX holds_open ON holds (source_id) WHERE ended IS NULL",
    "CREATE INDEX holds_by_end ON holds (ended_at) WHERE held_at IS NOT NULL",
    "CREATE TABLE prices (instance TEXT PRIMARY KEY, dollars_per_hour REAL NOT NULL) STRICT",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE pruning (id INTEGER PRIMARY KEY REFERENCES holds (id)) STRICT",
    """
    CREATE TABLE pruned (  -- one row: the sums over all reservations that retention has removed
        id INTEGER PRIMARY KEY CHECK (id = 1),
        held_seconds REAL NOT NULL,
        dollars REAL NOT NULL
    ) STRICT
    """,
)

TRIGGERS: Final = {
    "received_is_not_changed": """
        CREATE TRIGGER received_is_not_changed BEFORE UPDATE ON received
        BEGIN SELECT RAISE(ABORT, 'events are append-only: no UPDATE'); END
    """,
    "received_is_not_removed": """
        CREATE TRIGGER received_is_not_removed BEFORE DELETE ON received
        WHEN OLD.kind IS NOT NULL AND NOT EXISTS (
             SELECT 1 FROM pruning JOIN holds USING (id)
              WHERE reservation_id = OLD.reservation_id AND source_id = OLD.source_id)
        BEGIN SELECT RAISE(ABORT, 'events are append-only: no DELETE'); END
    """,
    "received_comes_after_the_last": """
        CREATE TRIGGER received_comes_after_the_last BEFORE INSERT ON received
        WHEN NEW.id <= (SELECT max(id) FROM received)
          OR EXISTS (SELECT 1 FROM received
                      WHERE source_id = NEW.source_id AND seq = NEW.seq AND digest = NEW.digest)
          OR EXISTS (SELECT 1 FROM received
                      WHERE source_id = NEW.source_id AND seq IS NULL AND event_id = NEW.event_id
                        AND digest = NEW.digest)
        BEGIN SELECT RAISE(ABORT, 'events are append-only: this one exists, or its id is taken'); END
    """,
    "received_keeps_holds": """
        CREATE TRIGGER received_keeps_holds AFTER INSERT ON received WHEN NEW.kind IS NOT NULL
        BEGIN
            INSERT INTO holds (reservation_id, source_id, queued, held, extended, ended, held_at, ended_at)
            VALUES (NEW.reservation_id, NEW.source_id,
                    iif(NEW.kind = 'queued', NEW.id, NULL),
                    iif(NEW.kind = 'held', NEW.id, NULL),
                    iif(NEW.kind = 'extended', NEW.id, NULL),
                    iif(NEW.kind IN ('released', 'expired', 'cancelled'), NEW.id, NULL),
                    iif(NEW.kind = 'held', NEW.at, NULL),
                    iif(NEW.kind IN ('released', 'expired', 'cancelled'), NEW.at, NULL))
            ON CONFLICT (reservation_id, source_id) DO UPDATE SET
                queued = coalesce(queued, excluded.queued),
                held = coalesce(held, excluded.held),
                extended = coalesce(excluded.extended, extended),
                ended = coalesce(ended, excluded.ended),
                held_at = coalesce(held_at, excluded.held_at),
                ended_at = coalesce(ended_at, excluded.ended_at);
        END
    """,
    "pruning_only_what_has_ended": """
        CREATE TRIGGER pruning_only_what_has_ended BEFORE INSERT ON pruning
        WHEN NOT EXISTS (SELECT 1 FROM holds WHERE id = NEW.id AND ended IS NOT NULL)
        BEGIN SELECT RAISE(ABORT, 'only a reservation that has ended can be pruned'); END
    """,
    "pruned_whole": """
        CREATE TRIGGER pruned_whole AFTER INSERT ON pruning
        BEGIN
            INSERT INTO pruned
                SELECT 1, ended - began, (ended - began) / 3600.0 * coalesce(dollars_per_hour, 0)
                  FROM spans WHERE spans.id = NEW.id
                ON CONFLICT (id) DO UPDATE SET
                    held_seconds = held_seconds + excluded.held_seconds, dollars = dollars + excluded.dollars;
            DELETE FROM received
             WHERE kind IS NOT NULL
               AND (reservation_id, source_id) = (SELECT reservation_id, source_id FROM holds WHERE id = NEW.id);
            DELETE FROM holds WHERE id = NEW.id;
            DELETE FROM pruning WHERE id = NEW.id;
        END
    """,
}


def ms(column: str) -> str:
    """Epoch seconds to the millisecond: the sum of clock.to_ms."""
    return f"CAST({column} * 1000 + 0.5 AS INTEGER) / 1000.0"


def iso(column: str) -> str:
    """Epoch seconds as ISO 8601 UTC with milliseconds."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {ms(column)}, 'unixepoch')"


#: Now, in epoch seconds of the collector's clock.
NOW: Final = "((julianday('now') - 2440587.5) * 86400.0)"
#: Seconds without an event after which a worker is silent (`nullworker collect --silence`).
SILENCE: Final = "(SELECT CAST(value AS REAL) FROM meta WHERE name = 'silence')"
_PRICE: Final = (
    "coalesce((SELECT dollars_per_hour FROM prices WHERE prices.instance = s.instance),"
    " (SELECT CAST(value AS REAL) FROM meta WHERE name = 'price'))"
)
_SAYS: Final = "s.worker, s.instance, s.gpu"
#: Until when a hold counts, in seconds of its worker's clock: its end; while it is open, the last event of its worker,
#: and at most its deadline.
_UNTIL: Final = """
    max(h.held_at, coalesce(h.ended_at, min(
        s.last_heard_at + coalesce(s.skew_seconds, 0),
        coalesce((SELECT coalesce(x.data ->> 'ends_at', r.data ->> 'ends_at')
                    FROM received AS r LEFT JOIN received AS x ON x.id = h.extended WHERE r.id = h.held), 1e12))))
"""

_EVENTS: Final = f"""
SELECT r.id AS seq, r.at, r.reservation_id, r.kind, r.reason, r.data, {_SAYS}, s.source, r.seq AS log_seq, r.conflict
  FROM received AS r LEFT JOIN sources AS s ON s.id = r.source_id  -- LEFT: SQLite leaves it out where it is not used
 WHERE r.kind IS NOT NULL
"""

_TIMELINE: Final = f"""
SELECT seq, {iso("at")} AS at, worker, instance, gpu, reservation_id, kind, reason, data, log_seq FROM events
"""

_RESERVATIONS: Final = f"""
SELECT {_SAYS},
       h.reservation_id AS id,
       q.data ->> 'kind' AS kind,
       coalesce(e.kind, iif(h.held IS NULL, 'queued', 'held')) AS state,
       e.reason AS reason,
       {iso("q.at")} AS queued_at,
       {iso("h.held_at")} AS held_at,
       {iso("coalesce(x.data ->> 'ends_at', g.data ->> 'ends_at')")} AS ends_at,
       {iso("h.ended_at")} AS ended_at,
       max(round({ms("coalesce(h.held_at, h.ended_at)")} - {ms("q.at")}, 3), 0) AS queued_seconds,
       max(round({ms("h.ended_at")} - {ms("h.held_at")}, 3), 0) AS held_seconds,
       q.data ->> 'duration_cap' AS duration_cap,
       q.data ->> 'request_idx' AS request_idx,
       q.data -> 'metadata' AS metadata,
       e.data -> 'result' AS result,
       max(round({ms("coalesce(e.data ->> 'attached_at', a.at)")} - {ms("h.held_at")}, 3), 0) AS attach_seconds
  FROM holds AS h
  JOIN sources AS s ON s.id = h.source_id
  LEFT JOIN received AS q ON q.id = h.queued
  LEFT JOIN received AS g ON g.id = h.held
  LEFT JOIN received AS x ON x.id = h.extended
  LEFT JOIN received AS e ON e.id = h.ended
  LEFT JOIN received AS a ON a.id = (
       SELECT min(id) FROM received
        WHERE reservation_id = h.reservation_id AND source_id = h.source_id
          AND kind = 'extended' AND reason = 'attached')
 ORDER BY h.id
"""

_LIVE: Final = """
SELECT h.reservation_id, iif(h.held IS NULL, 'queued', 'held') AS state FROM holds AS h WHERE h.ended IS NULL
"""

_OPEN: Final = """
SELECT * FROM reservations WHERE id IN (SELECT reservation_id FROM live) AND state IN ('queued', 'held')
"""

_DAILY: Final = f"""
WITH ended AS (
    SELECT {_SAYS}, date({ms("q.at")}, 'unixepoch') AS day, e.kind AS state,
           {ms("h.ended_at")} - {ms("h.held_at")} AS held
      FROM holds AS h
      JOIN sources AS s ON s.id = h.source_id
      JOIN received AS q ON q.id = h.queued
      LEFT JOIN received AS e ON e.id = h.ended
), ranked AS (
    SELECT *,
           row_number() OVER (PARTITION BY day, worker, held IS NULL ORDER BY held) AS rank,
           count(held) OVER (PARTITION BY day, worker) AS holds
      FROM ended
)
SELECT day, worker, instance, gpu,
       count(*) AS reservations,
       count(*) FILTER (WHERE state = 'released') AS released,
       count(*) FILTER (WHERE state = 'expired') AS expired,
       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE state IS NULL) AS open,
       round(min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.50 * holds), 3) AS p50_hold_seconds,
       round(min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.95 * holds), 3) AS p95_hold_seconds,
       round(coalesce(sum(held), 0), 3) AS busy_seconds
  FROM ranked
 GROUP BY day, worker
 ORDER BY day, worker
"""

_WORKERS: Final = f"""
SELECT s.worker, s.instance, s.gpu, s.source,
       CASE WHEN h.id IS NOT NULL AND {NOW} - s.last_heard_at > {SILENCE}
            THEN iif(r.ends_at < {NOW} + coalesce(s.skew_seconds, 0), 'lost', 'silent while holding')
            WHEN s.stopped_at IS NOT NULL THEN 'stopped'
            WHEN {NOW} - s.last_heard_at > {SILENCE} THEN 'silent'
            WHEN h.id IS NOT NULL THEN 'holding'
            ELSE 'idle' END AS state,
       h.reservation_id AS holding,
       {iso("h.held_at")} AS held_since,
       {iso("r.ends_at")} AS ends_at,
       {iso("s.first_heard_at")} AS first_heard_at,
       {iso("s.last_heard_at")} AS last_heard_at,
       round({NOW} - s.last_heard_at, 3) AS silent_seconds,
       round(s.skew_seconds, 3) AS skew_seconds,
       {iso("s.started_at")} AS started_at,
       {iso("s.stopped_at")} AS stopped_at,
       s.version, s.url,
       (SELECT max(seq) FROM received WHERE source_id = s.id AND seq IS NOT NULL) AS last_seq,
       (SELECT count(*) FROM received WHERE source_id = s.id AND conflict) AS conflicts
  FROM sources AS s
  LEFT JOIN holds AS h
    ON h.id = (SELECT max(id) FROM holds WHERE source_id = s.id AND ended IS NULL AND held IS NOT NULL)
  LEFT JOIN (SELECT h.id, coalesce(x.data ->> 'ends_at', g.data ->> 'ends_at') AS ends_at
               FROM holds AS h
               JOIN received AS g ON g.id = h.held
               LEFT JOIN received AS x ON x.id = h.extended
              WHERE h.ended IS NULL) AS r ON r.id = h.id
 ORDER BY s.worker
"""

#: Each hold as a span of time, in epoch seconds of its worker's clock, and its price; used by the next views.
_SPANS: Final = f"""
SELECT h.id, h.source_id, h.held_at AS began, {_UNTIL} AS ended, {_PRICE} AS dollars_per_hour
  FROM holds AS h JOIN sources AS s ON s.id = h.source_id
 WHERE h.held_at IS NOT NULL
"""

_COST: Final = f"""
SELECT {_SAYS}, h.reservation_id AS id, coalesce(e.kind, 'held') AS state,
       {iso("p.began")} AS held_at,
       {iso("p.ended")} AS until,
       round(p.ended - p.began, 3) AS held_seconds,
       p.dollars_per_hour,
       round((p.ended - p.began) / 3600.0 * p.dollars_per_hour, 6) AS dollars,
       q.data -> 'metadata' AS metadata
  FROM spans AS p
  JOIN holds AS h ON h.id = p.id
  JOIN sources AS s ON s.id = h.source_id
  LEFT JOIN received AS q ON q.id = h.queued
  LEFT JOIN received AS e ON e.id = h.ended
 ORDER BY h.id
"""

#: The part of each hold in each day of UTC.
_SPANS_BY_DAY: Final = """
WITH RECURSIVE parts (id, source_id, began, ended, dollars_per_hour, day_began) AS (
    SELECT id, source_id, began, ended, dollars_per_hour, CAST(began / 86400 AS INTEGER) * 86400.0 FROM spans
     UNION ALL
    SELECT id, source_id, began, ended, dollars_per_hour, day_began + 86400 FROM parts WHERE ended > day_began + 86400
), cut AS (
    SELECT *, min(ended, day_began + 86400) - max(began, day_began) AS seconds FROM parts
)
SELECT date(day_began, 'unixepoch') AS day, id, source_id, seconds, seconds / 3600.0 * dollars_per_hour AS dollars
  FROM cut
"""

_FLEET_DAILY: Final = f"""
WITH busy AS (
    SELECT day, count(DISTINCT source_id) AS workers, sum(seconds) AS seconds, sum(dollars) AS dollars
      FROM spans_by_day GROUP BY day
), begun AS (
    SELECT date(held_at, 'unixepoch') AS day, count(*) AS holds FROM holds WHERE held_at IS NOT NULL GROUP BY 1
), ended AS (
    SELECT date(h.ended_at, 'unixepoch') AS day, e.kind AS state, e.reason,
           {ms("h.ended_at")} - {ms("h.held_at")} AS held
      FROM holds AS h JOIN received AS e ON e.id = h.ended
), ranked AS (
    SELECT *,
           row_number() OVER (PARTITION BY day, held IS NULL ORDER BY held) AS rank,
           count(held) OVER (PARTITION BY day) AS holds
      FROM ended
), ends AS (
    SELECT day,
           count(*) FILTER (WHERE state = 'released') AS released,
           count(*) FILTER (WHERE state = 'expired') AS expired,
           count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
           count(*) FILTER (WHERE reason IN ('consumer_lost', 'consumer_absent')) AS consumers_lost,
           min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.50 * holds) AS p50,
           min(held) FILTER (WHERE held IS NOT NULL AND rank >= 0.95 * holds) AS p95
      FROM ranked GROUP BY day
)
SELECT days.day,
       coalesce(busy.workers, 0) AS workers,
       coalesce(begun.holds, 0) AS holds,
       coalesce(ends.released, 0) AS released,
       coalesce(ends.expired, 0) AS expired,
       coalesce(ends.cancelled, 0) AS cancelled,
       coalesce(ends.consumers_lost, 0) AS consumers_lost,
       round(ends.p50, 3) AS p50_hold_seconds,
       round(ends.p95, 3) AS p95_hold_seconds,
       round(coalesce(busy.seconds, 0) / 3600.0, 4) AS held_hours,
       round(busy.dollars, 4) AS dollars
  FROM (SELECT day FROM busy UNION SELECT day FROM begun UNION SELECT day FROM ends) AS days
  LEFT JOIN busy ON busy.day = days.day
  LEFT JOIN begun ON begun.day = days.day
  LEFT JOIN ends ON ends.day = days.day
 ORDER BY days.day
"""

_CONFLICTS: Final = f"""
SELECT {_SAYS}, r.seq AS log_seq, r.event_id, r.conflict, r.type,
       {iso("r.at")} AS at, {iso("r.received_at")} AS received_at, r.body
  FROM (SELECT DISTINCT source_id, seq FROM received WHERE conflict AND seq IS NOT NULL) AS c
  JOIN received AS r ON r.source_id = c.source_id AND r.seq = c.seq
  JOIN sources AS s ON s.id = r.source_id
 ORDER BY s.worker, r.seq, r.id
"""

#: Each view uses only those before it.
VIEWS: Final = {
    "events": _EVENTS,
    "timeline": _TIMELINE,
    "live": _LIVE,
    "reservations": _RESERVATIONS,
    "open_reservations": _OPEN,
    "daily": _DAILY,
    "workers": _WORKERS,
    "spans": _SPANS,
    "cost": _COST,
    "spans_by_day": _SPANS_BY_DAY,
    "fleet_daily": _FLEET_DAILY,
    "conflicts": _CONFLICTS,
}

migrations: Final = Migrations("nullworker.collector")


@migrations(name="m001_tables")
def _tables(db: Database) -> None:
    for statement in TABLES:
        db.execute(statement)


def migrate(conn: sqlite3.Connection) -> None:
    """Bring a file to VERSION. The triggers and views of a file of another version are recreated.

    Raises:
        sqlite3.Error: it cannot be read or written.
    """
    if conn.execute("PRAGMA user_version").fetchone()[0] == VERSION:
        return
    db = Database(conn)
    migrations.apply(db)
    with transaction(conn):
        for name, trigger in TRIGGERS.items():
            conn.execute(f"DROP TRIGGER IF EXISTS {name}")
            conn.execute(trigger)
        for name in reversed(VIEWS):
            conn.execute(f"DROP VIEW IF EXISTS {name}")
        for name, select in VIEWS.items():
            conn.execute(f"CREATE VIEW {name} AS {select}")
        conn.execute(f"PRAGMA application_id = {FLEET_APPLICATION_ID}")
        conn.execute(f"PRAGMA user_version = {VERSION}")
