"""The lower bound for a durable worker: bare aiohttp that also commits the rows of each event, by plain INSERTs.

No signature, triggers, metrics or log lines, but the same rows in the same number of commits at the same `synchronous`
as the worker's log.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import time
from collections import deque

from aiohttp import web


class Slot:
    """One slot, a queue in order, and a table of events."""

    def __init__(self, path: str, sync: str) -> None:
        self._conn = sqlite3.connect(path, isolation_level=None)
        self._conn.execute("PRAGMA journal_mode = WAL")
        self._conn.execute(f"PRAGMA synchronous = {sync}")
        self._conn.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, at REAL, id TEXT, kind TEXT, data TEXT)")
        self._ids = itertools.count(1)
        self._waiting: deque[tuple[str, asyncio.Event]] = deque()
        self._held: tuple[str, asyncio.Event] | None = None

    async def reserve(self, request: web.Request) -> web.Response:
        """Hold the slot, or wait for it; answers when it is released."""
        await request.json()
        mine = (f"{next(self._ids):016}", asyncio.Event())
        if self._held is None:
            self._held = mine
            self._commit((mine[0], "queued"), (mine[0], "held"))
        else:
            self._waiting.append(mine)
            self._commit((mine[0], "queued"))
        await mine[1].wait()
        return web.json_response({"released": "explicit"})

    async def release(self, _: web.Request) -> web.Response:
        """End what is held, and hand the slot on in the same commit."""
        if self._held is None:
            return web.json_response({"released": False, "reason": "no active reservation"})
        ended, self._held = self._held, self._waiting.popleft() if self._waiting else None
        handed_on = [] if self._held is None else [(self._held[0], "held")]
        self._commit((ended[0], "released"), *handed_on)
        ended[1].set()
        return web.json_response({"released": True})

    def _commit(self, *rows: tuple[str, str]) -> None:
        insert = "INSERT INTO events (at, id, kind, data) VALUES (?, ?, ?, ?)"
        values = [(time.time(), *row, '{"kind":"request","duration_cap":3600.0,"give_up_at":1.0}') for row in rows]
        if len(values) == 1:
            self._conn.execute(insert, values[0])
        else:
            self._conn.execute("BEGIN IMMEDIATE")
            self._conn.executemany(insert, values)
            self._conn.execute("COMMIT")


async def main() -> None:
    slot = Slot(os.environ["NULL_EVENT_LOG"], os.environ["NULL_LOG_SYNC"])
    for port, path, handler in (
        ("WORKER_PORT", "/reserve", slot.reserve),
        ("NULL_CONTROL_PORT", "/release", slot.release),
    ):
        app = web.Application()
        app.router.add_post(path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(os.environ[port])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
