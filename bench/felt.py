"""Latency as users notice it: how long until each side knows of an event. Real processes with default settings."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

from bench.peers import ROOT, Peer
from nullworker.testing import FakeAutoscaler

Figures = dict[str, float]

#: Times that each is measured in one round.
TIMES = 20
#: Longest pause between two, in seconds: jobs do not come in step with the reports.
PAUSE_SECONDS = 2.5
#: Seconds of patience for any of them.
PATIENCE = 30.0


async def told(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """From a claim to its consumer and to the autoscaler, and from the release to the autoscaler."""
    if name not in ("nullworker", "SDK"):
        return {}
    consumer, claimed, released = list[float](), list[float](), list[float]()
    rng = random.Random(7)
    async with Peer(name, vast, folder) as peer:
        for _ in range(TIMES):
            await asyncio.sleep(rng.uniform(0.0, PAUSE_SECONDS))
            poll = asyncio.ensure_future(_held(peer)) if name == "nullworker" else None
            await asyncio.sleep(0.05)  # the consumer waits for it
            began = time.perf_counter()
            waiting = asyncio.ensure_future(peer.reserve(peer.body()))
            if poll is not None:
                consumer.append(await poll - began)
            await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] > 0, PATIENCE)
            claimed.append(time.perf_counter() - began)
            await asyncio.sleep(rng.uniform(0.0, PAUSE_SECONDS))
            outcomes = len(vast.outcomes)
            began = time.perf_counter()
            assert await peer.release()
            await vast.wait_for(lambda before=outcomes: len(vast.outcomes) > before, PATIENCE)  # type: ignore[misc]
            released.append(time.perf_counter() - began)
            await waiting
    figures = {
        "reserve -> autoscaler knows, p50, ms": statistics.median(claimed) * 1e3,
        "release -> autoscaler knows, p50, ms": statistics.median(released) * 1e3,
    }
    if consumer:
        figures["reserve -> consumer knows, p50, ms"] = statistics.median(consumer) * 1e3
    return figures


async def _held(peer: Peer) -> float:
    """When the consumer's long poll has told it that something is held."""
    async with peer.http.get(f"{peer.control}/reservation?wait={PATIENCE:g}") as answer:
        await answer.read()
        assert answer.status == 200
        return time.perf_counter()


async def consumer_killed(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """kill -9 of a consumer that is attached, to the end of its reservation."""
    if name != "nullworker":
        return {}
    figures = {}
    for grace in (5, 0):
        async with Peer(name, vast, folder, NULL_CONSUMER_GRACE_SECONDS=str(grace)) as peer:
            consumer = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nullworker", "work", "--control-url", peer.control, "--", "sleep", "60"),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            waiting = asyncio.ensure_future(peer.reserve(peer.body()))
            await _attached(peer)
            began = time.perf_counter()
            os.killpg(consumer.pid, signal.SIGKILL)
            assert await waiting == 503
            figures[f"consumer killed -> hold ended, {grace} s of grace, s"] = time.perf_counter() - began
            await consumer.wait()
    return figures


async def _attached(peer: Peer) -> None:
    until = time.perf_counter() + PATIENCE
    while time.perf_counter() < until:
        async with peer.http.get(f"{peer.control}/metrics") as answer:
            if "nullworker_consumer_attached 1.0" in await answer.text():
                return
        await asyncio.sleep(0.02)
    raise TimeoutError("no consumer has attached")
