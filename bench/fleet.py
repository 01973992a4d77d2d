"""Measures the fleet's log: events a second into `nullworker collect`, and what a sink adds to a worker's cycle.

    python -m bench.fleet [--workers 500] [--events 100000] [--cycles 500] [--rounds 5]

The collector gets batches of many sources over 8 connections, both small, as during normal work, and large, as after an
outage. A worker's cycle (a claim that ends at once, three events) is measured with and without a sink, in turns. CPU
time is the figure that other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil

from bench.children import ROOT, running, until
from nullworker.eventlog import cloudevents

CONNECTIONS = 8


@contextlib.asynccontextmanager
async def started(*command: str, folder: Path, **env: str) -> AsyncIterator[tuple[psutil.Process, dict[str, str]]]:
    """A command of nullworker, once it has said that it has started: its process, and that line."""
    words = (sys.executable, "-m", "nullworker", *command)
    async with running(*words, folder=folder, out=f"{command[0]}.log", env={"PYTHONPATH": str(ROOT), **env}) as child:
        line = await until(f"`nullworker {command[0]}` starts", lambda: _started(child.output()), child)
        yield psutil.Process(child.pid), line


def _started(output: str) -> dict[str, str]:
    for line in output.splitlines():
        if line.endswith("}") and str((said := json.loads(line))["event"]).endswith("_started"):
            return dict(said)
    return {}


def batches(workers: int, events: int, size: int) -> list[tuple[int, bytes, int]]:
    """Worker, body and number of events of each batch: reservations of three events, a worker after the other."""
    made, seqs, job = list[tuple[int, bytes, int]](), [0] * workers, 0
    at = time.time() - 86_400
    while events > 0:
        for worker in range(workers):
            encoded = list[bytes]()
            for _ in range(size // 3):
                job += 1
                rid = f"{job:016x}"
                for kind, data in (
                    ("queued", {"kind": "session", "duration_cap": 3600, "metadata": {"job": job}}),
                    ("held", {"ends_at": at + 3600}),
                    ("released", {}),
                ):
                    seqs[worker] += 1
                    row = (seqs[worker], at, rid, kind, None, json.dumps(data))
                    event = cloudevents.reservation_event(cloudevents.source(str(worker), "bench"), row)
                    encoded.append(cloudevents.encode(event))
            made.append((worker, cloudevents.batch(encoded, "cloudevents")[0], len(encoded)))
            events -= len(encoded)
            if events <= 0:
                break
    return made


async def collect(folder: Path, workers: int, events: int, size: int) -> None:
    """Print events a second, CPU and memory of the collector."""
    made = batches(workers, events, size)
    total = sum(number for _, _, number in made)
    command = ("collect", "--db", str(folder / f"{size}.db"), "--port", "0", "--log-format", "json")
    async with started(*command, folder=folder) as (process, line), aiohttp.ClientSession() as http:
        before, begun = process.cpu_times(), time.perf_counter()
        rest = iter(made)

        async def send() -> None:
            for worker, body, _ in rest:
                headers = {"Content-Type": cloudevents.BATCH_TYPE, cloudevents.KEY_HEADER: str(worker)}
                async with http.post(line["events"], data=body, headers=headers) as answer:
                    assert answer.status == 200, await answer.text()

        await asyncio.gather(*(send() for _ in range(CONNECTIONS)))
        seconds, after = time.perf_counter() - begun, process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        scrape = time.perf_counter()
        async with http.get(line["page"] + "/metrics") as answer:
            await answer.read()
        scrape = time.perf_counter() - scrape
        memory = process.memory_info().rss / 1e6
    on_disk = (folder / f"{size}.db").stat().st_size / 1e6  # its end has emptied the write-ahead log
    print(
        f"collector, {workers} workers, batches of {size:>3}: {total / seconds:7.0f} events/s,"
        f" {cpu / total * 1e6:5.0f} us CPU an event, {memory:4.0f} MB of memory, a scrape {scrape * 1e3:4.0f} ms,"
        f" {on_disk:4.0f} MB on disk"
    )


async def cycle(folder: Path, sink: str | None, cycles: int) -> tuple[float, float]:
    """Milliseconds of CPU and of time that a cycle takes a worker."""
    env = {
        "UNSECURED": "true",
        "WORKER_PORT": "0",
        "NULL_CONTROL_PORT": "0",
        "NULL_LOG_FORMAT": "json",
        "NULL_EVENT_LOG": str(folder / f"{time.monotonic_ns()}.db"),
        **({} if sink is None else {"NULL_SINK": sink}),
    }
    async with started("serve", folder=folder, **env) as (process, line), aiohttp.ClientSession() as http:
        url, body = f"http://127.0.0.1:{line['external_port']}/reserve", {"payload": {"duration": 0}}

        async def run(number: int) -> list[float]:
            took = []
            for _ in range(number):
                begun = time.perf_counter()
                async with http.post(url, json=body) as answer:
                    assert answer.status == 200
                    await answer.read()
                took.append(time.perf_counter() - begun)
            return took

        await run(50)
        before = process.cpu_times()
        took = await run(cycles)
        after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return cpu / cycles * 1e3, statistics.median(took) * 1e3


async def sink(folder: Path, cycles: int, rounds: int) -> None:
    """Print what a sink costs a cycle."""
    command = ("collect", "--db", str(folder / "sink.db"), "--port", "0", "--log-format", "json")
    figures: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    async with started(*command, folder=folder) as (_, line):
        for number in range(rounds):
            for name in ("without", "with") if number % 2 else ("with", "without"):
                figures[name].append(await cycle(folder, line["events"] if name == "with" else None, cycles))
    for name, rows in figures.items():
        cpu, took = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"cycle {name:>7} a sink: {cpu:.3f} ms CPU, {took:.3f} ms")
    for column, what in enumerate(("CPU", "time")):
        ratios = [a[column] / b[column] for a, b in zip(figures["with"], figures["without"], strict=True)]
        print(
            f"  {what}: {100 * (statistics.median(ratios) - 1):+.1f} % ({', '.join(f'{each:.2f}' for each in ratios)})"
        )


async def main(workers: int, events: int, cycles: int, rounds: int) -> None:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="nullworker-bench-") as name:
        for size in (9, 498):
            await collect(Path(name), workers, events, size)
        await sink(Path(name), cycles, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(main(options.workers, options.events, options.cycles, options.rounds))
