PRAGMA application_id = 1853189239;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'nullworker','m001_events','2026-11-26 11:45:12.823416+00:00');
CREATE TABLE callbacks (
    seq INTEGER PRIMARY KEY  -- the end of a session whose on_close_route has not been settled
) STRICT;
CREATE TABLE cursors (
    name TEXT PRIMARY KEY,  -- who reads along: worker_status, delete_requests
    seq INTEGER NOT NULL  -- the last event that the other side has acknowledged
) STRICT;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,  -- order of the events; given by the writer
    at REAL NOT NULL,  -- epoch seconds
    reservation_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('queued', 'held', 'extended', 'released', 'expired', 'cancelled')),
    reason TEXT,
    data TEXT NOT NULL CHECK (json_valid(data))
) STRICT;
CREATE TABLE live (
    reservation_id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('queued', 'held')),
    callback INTEGER NOT NULL  -- whether a session's end is to be POSTed somewhere
) STRICT, WITHOUT ROWID;
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
CREATE TABLE settled (
    name TEXT NOT NULL,  -- the reader
    seq INTEGER NOT NULL,  -- an event with which it is done in another way than by its cursor
    at REAL NOT NULL,
    outcome TEXT NOT NULL,  -- delivered, refused, given_up
    detail TEXT,
    PRIMARY KEY (name, seq)
) STRICT;
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE INDEX events_by_reservation ON events (reservation_id, kind);
CREATE UNIQUE INDEX one_held ON live (state) WHERE state = 'held';
CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only: no UPDATE'); END;
CREATE TRIGGER events_are_not_removed BEFORE DELETE ON events
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
    INSERT INTO callbacks SELECT NEW.seq FROM live WHERE reservation_id = NEW.reservation_id AND callback;
    DELETE FROM live WHERE reservation_id = NEW.reservation_id;
END;
CREATE TRIGGER callbacks_settled AFTER INSERT ON settled WHEN NEW.name = 'callbacks'
BEGIN DELETE FROM callbacks WHERE seq = NEW.seq; END;
CREATE VIEW "reservations" AS 
SELECT q.reservation_id AS id,
       q.data ->> 'kind' AS kind,
       coalesce(e.kind, iif(h.seq IS NULL, 'queued', 'held')) AS state,
       e.reason AS reason,
       strftime('%Y-%m-%dT%H:%M:%fZ', q.at, 'unixepoch') AS queued_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', h.at, 'unixepoch') AS held_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', coalesce(x.data ->> 'ends_at', h.data ->> 'ends_at'), 'unixepoch') AS ends_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', e.at, 'unixepoch') AS ended_at,
       round(coalesce(h.at, e.at) - q.at, 3) AS queued_seconds,
       round(e.at - h.at, 3) AS held_seconds,
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
 ORDER BY q.seq;
CREATE VIEW "open_reservations" AS 
SELECT * FROM reservations WHERE id IN (SELECT reservation_id FROM live);
CREATE VIEW "daily" AS 
WITH ended AS (
    SELECT date(q.at, 'unixepoch') AS day, e.kind AS state, e.at - h.at AS held
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
 ORDER BY day;
COMMIT;
