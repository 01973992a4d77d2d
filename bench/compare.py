"""The same work by each peer: start, cycles, a queue, refusals, and a command."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import statistics
import sys
import time
from pathlib import Path

from bench.children import PATIENCE
from bench.figures import Figures
from bench.peers import BARE, Peer
from nullworker.testing import FakeAutoscaler

CYCLES, QUEUED, FORGED = 400, 1000, 4000
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")


async def cycles(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """Start, then one client and one consumer, one after the other."""
    async with Peer(name, vast, folder) as peer:
        figures = {
            "spawn -> port open, s": peer.seconds_to_port,
            "spawn -> ready reported, s": peer.seconds_to_ready,
            "memory when ready, MB": peer.memory(),
        }
        latencies: list[float] = []

        async def cycle() -> None:
            waiting = asyncio.ensure_future(peer.reserve(peer.body()))
            for _ in range(3):
                await asyncio.sleep(0)  # it is sent first
            while not await peer.release():
                pass
            released = time.perf_counter()
            assert await waiting == 200
            latencies.append(time.perf_counter() - released)

        for _ in range(50):
            await cycle()
        latencies.clear()
        cpu, started = peer.cpu(), time.perf_counter()
        for _ in range(CYCLES):
            await cycle()
        seconds = time.perf_counter() - started
        figures["reserve -> release cycles, /s"] = CYCLES / seconds
        figures["worker CPU per cycle, ms"] = (peer.cpu() - cpu) / CYCLES * 1e3
        figures["release -> answer, p50, ms"], figures["release -> answer, p99, ms"] = await answers(peer)
        return figures


async def answers(peer: Peer) -> tuple[float, float]:
    """From the moment in which the consumer asks for the release to the caller's answer."""
    seen = list[float]()
    for _ in range(CYCLES):
        waiting = asyncio.ensure_future(peer.reserve(peer.body()))
        await asyncio.sleep(0.003)  # it is held by now
        asked = time.perf_counter()
        answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        waiting.add_done_callback(functools.partial(_stamp, answered))
        while not await peer.release():
            asked = time.perf_counter()
        seen.append((await answered - asked) * 1e3)
    return statistics.median(seen), statistics.quantiles(seen, n=100)[98]


def _stamp(answered: asyncio.Future[float], _: asyncio.Future[int]) -> None:
    answered.set_result(time.perf_counter())


async def queue(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """Many wait; each release hands the slot on."""
    async with Peer(name, vast, folder) as peer:
        before = peer.memory()
        waiting = [asyncio.ensure_future(peer.reserve(peer.body())) for _ in range(QUEUED)]
        while len(peer.stats.net_connections()) < QUEUED:
            await asyncio.sleep(0.05)
        await peer.idle()  # all are read and queued
        memory = (peer.memory() - before) / QUEUED * 1e3
        started, released = time.perf_counter(), 0
        while released < QUEUED:
            released += await peer.release()
        await asyncio.gather(*waiting)
        seconds = (time.perf_counter() - started) / QUEUED * 1e3
    return {f"memory per queued, {QUEUED:,} queued, kB": memory, f"hand-over with {QUEUED:,} queued, ms": seconds}


async def forged(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """Requests with a signature that is nobody's, from eight connections that write and read bytes, and no more."""
    if name in (*BARE, "normal"):
        return {}
    async with Peer(name, vast, folder) as peer:
        body = peer.body()
        signature = body["auth_data"]["signature"]
        body["auth_data"]["signature"] = ("B" if signature[0] == "A" else "A") + signature[1:]
        request = raw_post("/reserve", body)

        async def refused(count: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
            for _ in range(count):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401 "), head
                await reader.readexactly(int(_LENGTH.findall(head)[0]))
            writer.close()

        await refused(20)
        started = time.perf_counter()
        await asyncio.gather(*(refused(FORGED // 8) for _ in range(8)))
        return {"forged requests refused, /s": FORGED / (time.perf_counter() - started)}


def raw_post(path: str, body: object) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def command(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """`nullworker release` as a whole process, and Python's own start."""
    if name != "nullworker":
        return {}
    async with Peer(name, vast, folder) as peer:
        figures = {}
        for label, words in (
            ("`nullworker release`, ms", ["-m", "nullworker", "release", "--control-url", peer.control]),
            ("Python's own start, ms", ["-c", "pass"]),
        ):
            started = time.perf_counter()
            process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.DEVNULL)
            await asyncio.wait_for(process.wait(), PATIENCE)
            figures[label] = (time.perf_counter() - started) * 1e3
        return figures
