"""Clients behind a bad network: their answers are true, and nothing stays held for a client that is gone."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from random import Random

import aiohttp
import pytest
from claims import data_of
from fault_proxy import FaultProxy
from harness import PATIENCE, WorkerProcess

pytestmark = pytest.mark.slow

#: Seconds of bad network. Set FAULT_SECONDS for a longer run.
SECONDS = float(os.environ.get("FAULT_SECONDS", "5"))


async def caller(proxy: FaultProxy, random: Random, heard: dict[str, str], over: asyncio.Event) -> None:
    """Reserves again and again, plain or as a stream, and notes what it was told for sure."""
    timeout = aiohttp.ClientTimeout(total=4)
    while not over.is_set():
        body = {"duration": random.choice((0.05, 0.3, 30)), "stream": random.random() < 0.5}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.post(proxy.url + "/reserve", json=body) as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            continue  # cut off: it knows nothing
        if "Nullworker-Reservation" not in answer.headers:
            assert answer.status in (400, 408), "what arrived was no whole request"
            continue
        verdict = json.loads(data_of(text)[-1] if answer.content_type == "text/event-stream" else text)
        heard[answer.headers["Nullworker-Reservation"]] = verdict.get("released") or verdict["reason"]


async def consumer(worker: WorkerProcess, random: Random, over: asyncio.Event) -> None:
    """Releases what is held, by its id."""
    async with aiohttp.ClientSession() as http:
        while not over.is_set():
            async with http.get(worker.control + "/reservation?wait=1") as answer:
                if answer.status == 204:
                    continue
                held = await answer.json()
            await asyncio.sleep(random.uniform(0.0, 0.2))
            async with http.post(worker.control + "/release", json={"reservation_id": held["id"]}) as answer:
                assert answer.status == 200


async def nothing_live(worker: WorkerProcess) -> None:
    """Ask until nothing is held and nobody waits."""
    while True:
        status = await worker.get("/status")
        if status["held"] is None and status["queue"]["length"] == 0:
            return


async def test_behind_a_bad_network_answers_are_true_and_nothing_is_held_for_nobody(tmp_path: Path) -> None:
    random, over, heard = Random(7), asyncio.Event(), dict[str, str]()
    async with WorkerProcess(tmp_path, NULL_MAX_QUEUE_SECONDS="1", NULL_LOG_LEVEL="info") as worker:
        async with FaultProxy(worker.port, random) as proxy:
            tasks = [asyncio.ensure_future(caller(proxy, random, heard, over)) for _ in range(12)]
            tasks.append(asyncio.ensure_future(consumer(worker, random, over)))
            asyncio.get_running_loop().call_later(SECONDS, over.set)
            await asyncio.gather(*tasks)
            faults = proxy.faults
        # all connections are closed now: whatever is live was left behind by the network
        await asyncio.wait_for(nothing_live(worker), PATIENCE)
        assert await worker.terminate() == 0
        ends = {
            reservation_id: (state, reason)
            for reservation_id, state, reason in worker.sql("SELECT id, state, reason FROM reservations")
        }
        assert worker.sql("SELECT count(*) FROM open_reservations") == [(0,)]
        bugs = [line for line in worker.lines if line["level"] in ("error", "critical")]
    assert not bugs
    assert {reason for _, reason in ends.values()} >= {"explicit", "duration_elapsed", "client_disconnect"}
    for reservation_id, reason in heard.items():
        assert ends[reservation_id][1] == reason
    assert min(faults.values()) > 3, "each fault was there"
    assert len(heard) > 20
    print(f"{sum(faults.values())} connections, {dict(faults)}; {len(ends)} reservations, {len(heard)} answers")
