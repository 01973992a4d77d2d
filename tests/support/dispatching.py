"""`nullworker dispatch` as a process, on a table of jobs, with consumers beside real workers."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from fleets import Dev
from programs import Program

#: Takes the first job of the table, if there is one, and works for its seconds.
TAKE = """
import os, sqlite3, sys, time
with open(os.environ["JOBS"] + ".runs", "a") as runs:
    print(os.environ["NULLWORKER_RESERVATION_ID"], file=runs)
db = sqlite3.connect(os.environ["JOBS"], timeout=20, isolation_level=None)
row = db.execute(
    "UPDATE jobs SET state = 'busy' WHERE id = (SELECT min(id) FROM jobs WHERE state = 'new') RETURNING id, seconds"
).fetchone()
if row is not None:
    time.sleep(row[1])
    db.execute("UPDATE jobs SET state = 'done', runs = runs + 1 WHERE id = ?", row[:1])
"""
COUNT = "SELECT sum(state = 'new'), sum(state = 'busy') FROM jobs"


class Jobs:
    """A table of jobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "jobs.db"
        self.url = f"sqlite:///{self.path}?query=SELECT * FROM counts"
        (folder / "take.py").write_text(TAKE)
        self.consumer = (sys.executable, "-m", "nullworker", "work", "--", sys.executable, str(folder / "take.py"))
        self.env = {"JOBS": str(self.path)}
        with self.opened() as conn:
            conn.execute("PRAGMA journal_mode = WAL")
            conn.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, state TEXT, seconds REAL, runs INTEGER DEFAULT 0)")
        self.show()

    @contextlib.contextmanager
    def opened(self) -> Any:
        with contextlib.closing(sqlite3.connect(self.path, timeout=20)) as conn, conn:
            yield conn

    def show(self) -> None:
        """Make the view that the dispatcher reads."""
        with self.opened() as conn:
            conn.execute(f"CREATE VIEW counts AS {COUNT}")

    def hide(self) -> None:
        """Take it away: the queue cannot be read."""
        with self.opened() as conn:
            conn.execute("DROP VIEW counts")

    def put(self, number: int, seconds: float) -> None:
        with self.opened() as conn:
            conn.executemany("INSERT INTO jobs (state, seconds) VALUES ('new', ?)", [(seconds,)] * number)

    def states(self) -> dict[str, int]:
        with self.opened() as conn:
            return dict(conn.execute("SELECT state, count(*) FROM jobs GROUP BY state"))


class Dispatch(Program):
    """`nullworker dispatch` against a stand-in. Its log is JSON."""

    def __init__(self, folder: Path, dev: Dev | str, *arguments: str, **env: str) -> None:
        command = (sys.executable, "-m", "nullworker", "dispatch", "--endpoint", "null", "--port", "0")
        url = dev if isinstance(dev, str) else dev.url
        self.ledger = folder / "nullworker-dispatch.db"
        env = {"NULL_LOG_FORMAT": "json", "PYTHONWARNINGS": "default", **env}
        super().__init__(folder, *command, "--autoscaler", url, *arguments, **env)

    async def ask(self, path: str) -> tuple[int, Any]:
        """GET from its port: the status, and JSON or text."""
        port = (await self.line("dispatcher_started"))["port"]
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}{path}") as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    def rows(self, query: str = "SELECT * FROM claims") -> list[dict[str, Any]]:
        """Ask the ledger."""
        with contextlib.closing(sqlite3.connect(self.ledger, timeout=10)) as conn:
            conn.row_factory = sqlite3.Row
            return [dict(row) for row in conn.execute(query)]


@contextlib.asynccontextmanager
async def fleet(folder: Path, *arguments: str, max_workers: int = 3, **env: str) -> AsyncIterator[tuple[Jobs, Dev]]:
    """A table of jobs, and `nullworker dev` whose consumers do them."""
    jobs = Jobs(folder)
    options = ("--max-workers", str(max_workers), "--inactivity", "1", *arguments)
    async with Dev(folder, *options, "--", *jobs.consumer, **jobs.env, **env) as dev:
        yield jobs, dev
