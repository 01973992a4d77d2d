"""Queries of the page and the metrics on the fleet's database. Plain SQL over a read-only connection."""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final, TypedDict

from nullworker.clock import iso
from nullworker.collector import schema

WORKER_STATES: Final = ("holding", "idle", "silent while holding", "silent", "lost", "stopped")
#: Seconds after its last event for which a worker without a hold is shown.
SHOWN_SECONDS: Final = 86_400
#: Maximum number of holds in the timeline, and of workers.
MAX_HOLDS: Final = 2000
MAX_WORKERS: Final = 1000


class Totals(TypedDict):
    """Figures of the whole fleet, pruned reservations included."""

    workers: dict[str, int]  # by state
    holding: int  # held reservations, also of silent workers
    held_seconds: float
    dollars: float  # 0 for holds without a price
    conflicts: int


def totals(conn: sqlite3.Connection) -> Totals:
    """Figures for /metrics."""
    states = dict.fromkeys(WORKER_STATES, 0)
    states.update(conn.execute("SELECT state, count(*) FROM workers GROUP BY state").fetchall())
    holding = conn.execute("SELECT count(*) FROM holds WHERE ended IS NULL AND held IS NOT NULL").fetchone()[0]
    seconds, dollars = conn.execute(
        "SELECT total(seconds), total(dollars) FROM"
        " (SELECT ended - began AS seconds, (ended - began) / 3600.0 * dollars_per_hour AS dollars FROM spans"
        "   UNION ALL SELECT held_seconds, dollars FROM pruned)"
    ).fetchone()
    conflicts = conn.execute("SELECT count(*) FROM received WHERE conflict").fetchone()[0]
    return {
        "workers": states,
        "holding": holding,
        "held_seconds": seconds,
        "dollars": dollars,
        "conflicts": conflicts,
    }


def fleet(conn: sqlite3.Connection, *, hours: float) -> dict[str, Any]:
    """The document behind the page: `{"now", "today", "workers", "holds"}`.

    `now`: ISO time of the collector. `today`: `{"held_hours", "dollars", "consumers_lost"}` since midnight UTC; dollars
    None if there is no price. `workers`: rows of the view `workers` that hold, or have sent something within a day,
    with the `metadata` and `kind` of their reservation. `holds`: those of the last `hours`, newest first, as
    `{"worker", "id", "state", "reason", "held_at", "until", "dollars", "metadata"}`.
    """
    now = float(conn.execute(f"SELECT {schema.NOW}").fetchone()[0])
    today = _rows(
        conn,
        "SELECT coalesce(sum(seconds), 0) / 3600.0 AS held_hours,"
        " CASE WHEN EXISTS (SELECT 1 FROM prices) OR EXISTS (SELECT 1 FROM meta WHERE name = 'price')"
        "      THEN total(dollars) END AS dollars,"
        " (SELECT count(*) FROM holds AS h JOIN received AS e ON e.id = h.ended"
        "   WHERE h.ended_at >= ? AND e.reason IN ('consumer_lost', 'consumer_absent')) AS consumers_lost"
        " FROM (SELECT seconds, seconds / 3600.0 * dollars_per_hour AS dollars"
        "         FROM (SELECT ended - max(began, ?) AS seconds, dollars_per_hour FROM spans WHERE ended > ?"
        "                  AND id IN (SELECT id FROM holds WHERE ended_at > ? OR ended IS NULL)))",
        (now // 86_400 * 86_400,) * 4,
    )[0]
    workers = _rows(
        conn,
        "SELECT w.*, q.data ->> 'kind' AS kind, q.data -> 'metadata' AS metadata FROM workers AS w"
        "  LEFT JOIN sources AS s ON s.source = w.source"
        "  LEFT JOIN holds AS h ON h.reservation_id = w.holding AND h.source_id = s.id"
        "  LEFT JOIN received AS q ON q.id = h.queued"
        " WHERE w.holding IS NOT NULL OR w.silent_seconds < ? ORDER BY w.holding IS NULL, w.last_heard_at DESC LIMIT ?",
        (SHOWN_SECONDS, MAX_WORKERS),
    )
    holds = _rows(
        conn,
        "SELECT s.worker, h.reservation_id AS id, coalesce(e.kind, 'held') AS state, e.reason,"
        f"      {schema.iso('p.began')} AS held_at, {schema.iso('p.ended')} AS until,"
        "       (p.ended - p.began) / 3600.0 * p.dollars_per_hour AS dollars, q.data -> 'metadata' AS metadata"
        "  FROM holds AS h JOIN sources AS s ON s.id = h.source_id JOIN spans AS p ON p.id = h.id"
        "  LEFT JOIN received AS e ON e.id = h.ended LEFT JOIN received AS q ON q.id = h.queued"
        " WHERE h.id IN (SELECT id FROM holds WHERE held_at IS NOT NULL AND (ended_at > ? OR ended IS NULL)"
        "                 ORDER BY id DESC LIMIT ?)"
        " ORDER BY h.id DESC",
        (now - hours * 3600, MAX_HOLDS),
    )
    return {"now": iso(now), "today": today, "workers": workers, "holds": holds}


def _rows(conn: sqlite3.Connection, query: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
    cursor = conn.execute(query, values)
    names = [column[0] for column in cursor.description]
    rows = [dict(zip(names, row, strict=True)) for row in cursor]
    for row in rows:
        if row.get("metadata") is not None:
            row["metadata"] = json.loads(row["metadata"])
    return rows
