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

#: Events looked at in one step, so some 50 to 100 reservations: a few milliseconds of a worker's time.
STEP: Final = 256
#: Pages given back to the disk after each step, 4 KiB each: more than a step frees.
PAGES: Final = 64
#: Seconds between two steps of a worker.
PAUSE_SECONDS: Final = 0.05
#: Seconds from a worker's start to its first pruning, and from one to the next.
FIRST_SECONDS: Final = 60.0
DAY_SECONDS: Final = 86_400.0


def expendable(conn: sqlite3.Connection, before: float) -> Iterator[list[str]]:
    """Reservations that ended before a time, in epoch seconds, and may be pruned; oldest first, in small lists.

    It stops at the first step in which everything is newer, so it costs what it finds and not what the log holds.
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
    """How many reservations ended before a time, in epoch seconds. It reads all that is older."""
    query = "SELECT count(*) FROM events WHERE kind IN ('released', 'expired', 'cancelled') AND at < ?"
    return int(conn.execute(query, (before,)).fetchone()[0])


async def prune_gently(event_log: EventLog, before: float) -> None:
    """Prune the log of a worker that goes on working. What fails is tried again the next day."""
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
