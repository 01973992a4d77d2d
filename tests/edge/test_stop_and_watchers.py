"""Readers of streams do not delay the stop of a worker, and miss no event."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
from claims import data_of
from harness import PATIENCE, WorkerProcess
from programs import caller


async def test_a_stop_ends_the_event_streams_after_their_last_event(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, NULL_DRAIN_SECONDS="0") as worker,
        aiohttp.ClientSession() as http,
        caller(worker),
        http.get(worker.control + "/events") as events,
    ):
        await worker.line("reservation_held")
        assert await worker.terminate() == 0
        said = await asyncio.wait_for(events.text(), PATIENCE)  # it raises for a stream that was cut off
    assert [json.loads(data)["kind"] for data in data_of(said)] == ["queued", "held", "cancelled"]
