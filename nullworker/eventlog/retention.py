"""Prunes the event log: removes reservations that ended long ago and that no reader still needs.

A reservation is removed with all its events or not at all; the schema refuses anything else. A running worker prunes in
small transactions with pauses, so that no request waits for it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from typing import Final

from nullworker.clock import iso
from nullworker.errors import LogUnavailable
from nullworker.eventlog.log import EventLog
from nullworker.logs import get_log

log = get_log(__name__)

#: Events searched in one step, about 50 to 100 reservations: a few milliseconds.
STEP: Final = 256
#: Pages of 4 KiB returned to the disk after each step: more than a step frees.
PAGES: Final = 64
#: Seconds between two steps in a running worker.
PAUSE_SECONDS: Final = 0.05
#: Seconds from a worker's start to its first pruning, and between two prunings.
FIRST_SECONDS: Final = 60.0
DAY_SECONDS: Final = 86_400.0


def expendable(conn: sqlite3.Connection, before: float) -> Iterator[list[str]]:
    """The ids of reservations that ended before a time, in epoch seconds, and may be pruned; oldest first, in batches.

    The search stops at the first step in which every event is newer.
    """
    seq = 0
    while True:
        rows = conn.execute("SELECT seq, at FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (seq, STEP)).fetchall()
        if all(at >= before for _, at in rows):
            return
        found = conn.execute(
            "SELECT reservation_id FROM done_with WHERE seq > ? AND seq <= ? AND at < ?", (seq, rows[-1][0], before)
        ).fetchall()
        seq = rows[-1][0]
        if found:
            yield [reservation_id for (reservation_id,) in found]


def ended_before(conn: sqlite3.Connection, before: float) -> int:
    """The number of reservations that ended before a time, in epoch seconds. It scans all older events."""
    query = "SELECT count(*) FROM events WHERE kind IN ('released', 'expired', 'cancelled') AND at < ?"
    return int(conn.execute(query, (before,)).fetchone()[0])


async def prune_gently(event_log: EventLog, before: float) -> None:
    """Prune the log of a running worker, in small steps. After an error the rest is pruned the next day."""
    pruned = 0
    try:
        for reservation_ids in expendable(event_log.conn, before):
            event_log.prune(reservation_ids)
            event_log.give_back(PAGES)
            pruned += len(reservation_ids)
            await asyncio.sleep(PAUSE_SECONDS)
    except (LogUnavailable, sqlite3.Error) as error:
        log.warning("not_pruned", why=str(error), reservations=pruned)
    else:
        log.info("log_pruned", reservations=pruned, before=iso(before))
