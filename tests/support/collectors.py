"""A real collector for tests, and senders that are not workers."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from harness import ROOT, Answer, LoggedProcess
from programs import free_port

from nullworker.eventlog import cloudevents


class CollectorProcess(LoggedProcess):
    """`python -m nullworker collect` in a folder, on the same port after a restart."""

    def __init__(self, folder: Path, *options: str, db: str = "fleet.db", **env: str) -> None:
        self.db = folder / db
        self.port, self.page_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.sink = f"{self.url}/events"
        own = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
        command = (
            "-m",
            "nullworker",
            "collect",
            "--db",
            str(self.db),
            "--port",
            str(self.port),
            "--log-format",
            "json",
        )
        super().__init__(folder, (sys.executable, *command, "--page-port", str(self.page_port), *options), own)

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        await super().start()
        await self.line("collector_started")

    def files(self) -> list[Path]:
        """The database and what SQLite and the collector keep beside it."""
        return list(self.folder.glob(f"{self.db.name}*"))

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the database, as somebody with a SQLite shell would."""
        conn = sqlite3.connect(self.db)
        try:
            return conn.execute(query, values).fetchall()
        finally:
            conn.close()

    async def send(
        self,
        events: Sequence[cloudevents.CloudEvent] | bytes,
        *,
        key: str = "key",
        token: str | None = None,
        **headers: str,
    ) -> Answer:
        """POST a batch."""
        content_type = cloudevents.BATCH_TYPE
        if isinstance(events, bytes):
            data = events
        else:
            data, content_type = cloudevents.batch([cloudevents.encode(event) for event in events], "cloudevents")
        all_headers = {"Content-Type": content_type, cloudevents.KEY_HEADER: key, **headers}
        if token is not None:
            all_headers["Authorization"] = f"Bearer {token}"
        async with (
            aiohttp.ClientSession() as http,
            http.post(self.sink, data=io.BytesIO(data), headers=all_headers) as answer,
        ):
            return Answer(answer.status, await answer.json(), answer.headers)


def event(
    source: str, seq: int, kind: str, reservation_id: str, at: float, reason: str | None = None, /, **data: Any
) -> cloudevents.CloudEvent:
    """An event of a worker's log, as its sink sends it."""
    return cloudevents.reservation_event(source, (seq, at, reservation_id, kind, reason, json.dumps(data)))


def hold(source: str, seq: int, reservation_id: str, at: float, *, ends_at: float, **data: Any) -> list[Any]:
    """The events of a reservation that is held."""
    return [
        event(source, seq, "queued", reservation_id, at, None, kind="session", duration_cap=ends_at - at, **data),
        event(source, seq + 1, "held", reservation_id, at, None, ends_at=ends_at),
    ]
