"""Compares this worker with one on the official SDK, with bare aiohttp, and with the bound: in turns, in one run.

    python -m bench [--rounds 5] [--only cycles,...]

Prints medians and spread, ratios first. docs/performance.md says how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path

from bench import felt, quiet
from bench.peers import BARE, Peer
from nullworker.testing import FakeAutoscaler

Figures = dict[str, float]
Measure = Callable[[str, FakeAutoscaler, Path], Awaitable[Figures]]

CYCLES, QUEUED, FORGED = 400, 1000, 4000
PAGES = 16 * 1024  # bytes of a commit
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


async def queue(name: str, vast: FakeAutoscaler, folder: Path, queued: int = QUEUED) -> Figures:
    """Many wait; each release hands the slot on."""
    async with Peer(name, vast, folder) as peer:
        before = peer.memory()
        waiting = [asyncio.ensure_future(peer.reserve(peer.body())) for _ in range(queued)]
        while len(peer.stats.net_connections()) < queued:
            await asyncio.sleep(0.05)
        await peer.idle()  # all are read and queued
        memory = (peer.memory() - before) / queued * 1e3
        started, released = time.perf_counter(), 0
        while released < queued:
            released += await peer.release()
        await asyncio.gather(*waiting)
        seconds = (time.perf_counter() - started) / queued * 1e3
    if queued == QUEUED:
        return {f"memory per queued, {queued} queued, kB": memory, f"hand-over with {queued} queued, ms": seconds}
    return {f"hand-over with {queued} queued, ms": seconds}


async def long_queue(name: str, vast: FakeAutoscaler, folder: Path) -> Figures:
    """Ten times as many."""
    return await queue(name, vast, folder, 10 * QUEUED) if name == "nullworker" else {}


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
            await process.wait()
            figures[label] = (time.perf_counter() - started) * 1e3
        return figures


def fdatasync(rest: float) -> float:
    """Median milliseconds of what a commit asks of the disk: pages written over and synced, every `rest` seconds."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1024 * PAGES))
        os.fsync(file.fileno())
        took = []
        for number in range(200):
            time.sleep(rest)
            started = time.perf_counter()
            os.pwrite(file.fileno(), bytes([number]) * PAGES, number % 1024 * PAGES)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - started) * 1e3)
    return statistics.median(took)


MEASURES: dict[str, Measure] = {
    "cycles": cycles,
    "queue": queue,
    "long_queue": long_queue,
    "forged": forged,
    "command": command,
    "told": felt.told,
    "killed": felt.consumer_killed,
}
#: In the order of the first round; each later one begins with the next.
PEERS = ("nullworker", "normal", "SDK", "bound", "floor")
#: Columns of ratios: ours, theirs, and the head.
RATIOS = (
    ("nullworker", "SDK", "x SDK"),
    ("nullworker", "bound", "x bound"),
    ("normal", "SDK", "at sync normal, x SDK"),
)


async def run(rounds: int, names: list[str]) -> tuple[dict[str, dict[str, list[float]]], str]:
    """All figures of all rounds: figure, peer, values; and one line that says whether the machine was quiet."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    others = []
    async with FakeAutoscaler() as vast:
        for number in range(rounds):
            others.append(await quiet.others())
            first = number % len(PEERS)
            for measure in names:
                for peer in PEERS[first:] + PEERS[:first]:
                    print(f"round {number + 1}/{rounds}: {measure}, {peer:<12}", end="\r", file=sys.stderr, flush=True)
                    with tempfile.TemporaryDirectory() as folder:
                        for figure, value in (await MEASURES[measure](peer, vast, Path(folder))).items():
                            table[figure][peer].append(value)
    print(" " * 60, end="\r", file=sys.stderr)
    return table, quiet.verdict(others)


def show(table: dict[str, dict[str, list[float]]], quiet_or_not: str) -> None:
    """A markdown table: the ratios to the SDK and to the bound, then medians with the least, the most and n."""
    print(quiet_or_not)
    versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "vastai", "cryptography"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    at_once, rested = fdatasync(0.0), fdatasync(0.003)
    print(f"One fdatasync of 16 kB: {at_once:.2f} ms, and {rested:.2f} ms when the disk has rested for 3 ms")
    print()
    heads = ["figure", *(head for _, _, head in RATIOS), "nullworker", "at sync normal", *PEERS[2:]]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for figure, values in table.items():
        middle = {peer: statistics.median(seen) for peer, seen in values.items()}
        ratios = [_ratio(middle, ours, theirs) for ours, theirs, _ in RATIOS]
        cells = [_cell(values.get(peer)) for peer in PEERS]
        print("| " + " | ".join([figure, *ratios, *cells]) + " |")


def _ratio(middle: dict[str, float], ours: str, theirs: str) -> str:
    known = all(middle.get(peer, 0) > 0 for peer in (ours, theirs))
    return f"{middle[ours] / middle[theirs]:.2f}" if known else ""


def _cell(seen: list[float] | None) -> str:
    return (
        f"{statistics.median(seen):.3g} ({min(seen):.3g} - {max(seen):.3g}, n {len(seen)})"
        if seen and min(seen) > 0
        else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(MEASURES), help="of " + ", ".join(MEASURES))
    options = parser.parse_args()
    show(*asyncio.run(run(options.rounds, options.only.split(","))))


if __name__ == "__main__":
    main()
