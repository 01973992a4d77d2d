"""The tables, triggers and views of the ledger.

Triggers refuse to change or remove an event, and refuse an event that the claim's state does not allow, whoever writes.
Credentials are in a table of their own while a claim is granted or held, and their pages are overwritten afterwards.
Times are stored as epoch seconds and shown by the views as ISO 8601 UTC with milliseconds.
"""

from __future__ import annotations

from typing import Final

from nullworker.dispatch.claims import EDGES

#: `PRAGMA user_version` of a file that this code writes.
VERSION: Final = 1
#: For STRICT tables and `->>`. Ubuntu 22.04's own Python has 3.37.
OLDEST_SQLITE: Final = (3, 38)

_KINDS: Final = ", ".join(f"'{kind}'" for kind in dict.fromkeys(edge.event for edge in EDGES))
_ALLOWED: Final = " OR ".join(
    f"(NEW.kind = '{edge.event}' AND live.state = '{edge.source}')" for edge in EDGES if edge.source is not None
)
_TARGETS: Final = " ".join(
    f"WHEN '{edge.event}' THEN '{edge.target}'" for edge in {edge.event: edge for edge in EDGES}.values()
)

TABLES: Final = f"""
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,  -- order of the events
    at REAL NOT NULL,  -- epoch seconds
    claim_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ({_KINDS})),
    reason TEXT,
    data TEXT NOT NULL CHECK (json_valid(data))
) STRICT;
CREATE INDEX events_by_claim ON events (claim_id, kind);
CREATE INDEX events_by_end ON events (at) WHERE kind = 'ended';

CREATE TABLE live (
    claim_id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('pending', 'granted', 'held'))
) STRICT, WITHOUT ROWID;

CREATE TABLE credentials (
    claim_id TEXT PRIMARY KEY,
    url TEXT NOT NULL,  -- of the worker
    body TEXT NOT NULL  -- of the request that asks for its session, and may renew and end it
) STRICT, WITHOUT ROWID;

CREATE TABLE renewals (
    claim_id TEXT PRIMARY KEY,
    at REAL NOT NULL  -- epoch seconds at which the last renewal that was answered was sent
) STRICT, WITHOUT ROWID;

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only: no UPDATE'); END;
CREATE TRIGGER events_are_not_removed BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only: no DELETE'); END;
CREATE TRIGGER events_come_after_the_last BEFORE INSERT ON events
WHEN NEW.seq <= (SELECT max(seq) FROM events)
BEGIN SELECT RAISE(ABORT, 'events are append-only: seq must be greater than every other'); END;
CREATE TRIGGER events_open_only_what_is_new BEFORE INSERT ON events
WHEN NEW.kind = 'pending' AND EXISTS (SELECT 1 FROM events WHERE claim_id = NEW.claim_id)
BEGIN SELECT RAISE(ABORT, 'the claim of this event exists already'); END;
CREATE TRIGGER events_follow_the_states BEFORE INSERT ON events
WHEN NEW.kind <> 'pending' AND NOT EXISTS (SELECT 1 FROM live WHERE claim_id = NEW.claim_id AND ({_ALLOWED}))
BEGIN SELECT RAISE(ABORT, 'the state of this claim does not allow this event'); END;

CREATE TRIGGER live_opened AFTER INSERT ON events WHEN NEW.kind = 'pending'
BEGIN INSERT INTO live VALUES (NEW.claim_id, 'pending'); END;
CREATE TRIGGER live_moved AFTER INSERT ON events WHEN NEW.kind NOT IN ('pending', 'ended')
BEGIN UPDATE live SET state = CASE NEW.kind {_TARGETS} END WHERE claim_id = NEW.claim_id; END;
CREATE TRIGGER live_ended AFTER INSERT ON events WHEN NEW.kind = 'ended'
BEGIN
    DELETE FROM live WHERE claim_id = NEW.claim_id;
    DELETE FROM renewals WHERE claim_id = NEW.claim_id;
END;
CREATE TRIGGER credentials_end AFTER INSERT ON events WHEN NEW.kind IN ('ended', 'refused')
BEGIN DELETE FROM credentials WHERE claim_id = NEW.claim_id; END;
"""


def _ms(column: str) -> str:
    return f"CAST({column} * 1000 + 0.5 AS INTEGER) / 1000.0"  # clock.to_ms


def _iso(column: str) -> str:
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {_ms(column)}, 'unixepoch')"


def _last(kind: str) -> str:
    return f"(SELECT max(seq) FROM events WHERE claim_id = o.claim_id AND kind = '{kind}')"


#: Seconds that a claim has held a worker; of an open one until now, by the clock of whoever asks. NULL: never held.
_HELD_SECONDS: Final = (
    "max(0, coalesce(e.data ->> 'held_seconds', e.at - h.at, (julianday('now') - 2440587.5) * 86400.0 - h.at))"
)

_CLAIMS: Final = f"""
SELECT o.claim_id AS id,
       iif(e.seq IS NOT NULL, 'ended', (SELECT state FROM live WHERE claim_id = o.claim_id)) AS state,
       e.reason AS reason,
       {_iso("o.at")} AS opened_at,
       {_iso("g.at")} AS granted_at,
       {_iso("h.at")} AS held_at,
       {_iso("a.at")} AS attached_at,
       {_iso("e.at")} AS ended_at,
       round(max(0, h.at - o.at), 3) AS wait_seconds,
       round({_HELD_SECONDS}, 3) AS held_seconds,
       round({_HELD_SECONDS} / 3600.0 * (p.data ->> 'price'), 6) AS dollars,
       p.data ->> 'price' AS price,
       g.data ->> 'url' AS url,
       coalesce(p.data ->> 'instance', h.data ->> 'instance') AS instance,
       h.data ->> 'session_id' AS session_id,
       (SELECT count(*) FROM events WHERE claim_id = o.claim_id AND kind = 'refused') AS refusals,
       coalesce(o.data ->> 'reclaim', 0) AS reclaim,
       o.data -> 'metadata' AS metadata,
       e.data -> 'final' -> 'result' AS result,
       e.data -> 'final' AS final_status,
       e.data ->> 'why' AS why
  FROM events AS o
  LEFT JOIN events AS g ON g.seq = {_last("granted")}
  LEFT JOIN events AS h ON h.claim_id = o.claim_id AND h.kind = 'held'
  LEFT JOIN events AS p ON p.seq = {_last("priced")}
  LEFT JOIN events AS a ON a.seq = (SELECT min(seq) FROM events WHERE claim_id = o.claim_id AND kind = 'attached')
  LEFT JOIN events AS e ON e.claim_id = o.claim_id AND e.kind = 'ended'
 WHERE o.kind = 'pending'
 ORDER BY o.seq
"""

_DAILY: Final = """
WITH ranked AS (
    SELECT substr(opened_at, 1, 10) AS day, *,
           row_number() OVER (
               PARTITION BY substr(opened_at, 1, 10), wait_seconds IS NULL ORDER BY wait_seconds) AS rank,
           count(wait_seconds) OVER (PARTITION BY substr(opened_at, 1, 10)) AS waits
      FROM claims
)
SELECT day,
       count(*) AS claims,
       count(held_at) AS held,
       count(*) FILTER (WHERE state <> 'ended') AS open,
       round(coalesce(sum(held_seconds), 0) / 3600.0, 4) AS hours,
       round(sum(dollars), 4) AS dollars,
       min(wait_seconds) FILTER (WHERE rank >= 0.50 * waits) AS p50_wait_seconds,
       min(wait_seconds) FILTER (WHERE rank >= 0.95 * waits) AS p95_wait_seconds
  FROM ranked
 GROUP BY day
 ORDER BY day
"""

_TIMELINE: Final = f"SELECT seq, {_iso('at')} AS at, claim_id, kind, reason, data FROM events"

VIEWS: Final = {
    "timeline": _TIMELINE,
    "claims": _CLAIMS,
    "open_claims": "SELECT * FROM claims WHERE id IN (SELECT claim_id FROM live)",
    "daily": _DAILY,
}

SCRIPT: Final = TABLES + "".join(f"CREATE VIEW {name} AS {query};\n" for name, query in VIEWS.items())
