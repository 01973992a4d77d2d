"""The fleet harness: destroys workers whose events go to a collector that fails, then checks what outlived them.

Real workers send to a real collector through a gate that refuses a third of the POSTs, while the collector is killed
with SIGKILL again and again. Each worker makes its reservations, is told to stop, and its folder is removed when it has
exited. Every event that its log had then must be in the fleet's database once and in order. At last, with a collector
that is well, one worker is killed with SIGKILL in mid-work and its folder removed: what is missing must be younger than
FRESH_SECONDS.

    python -m stress.fleet --workers 5 --reservations 2000 --seed 1

Exit code 1 means that a check failed; the folder with the database is then kept and named.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from stress.crash_worker import ROOT, free_ports

#: Seconds that a start, and an exit, may take.
PATIENCE = 60.0
#: NULL_DRAIN_SECONDS: so long, and 3 s more, a worker tries to hand over the rest while the collector comes and goes.
DRAIN_SECONDS = 20
#: Seconds in which an event is with a collector that is well: some POSTs, on a machine that is busy.
FRESH_SECONDS = 2.0
#: How long the collector lives, from its start to its kill, in times of what its start took (a second at least): it is
#: there most of the time, also on a machine that is busy.
LIVES = (1.0, 4.0)
TOKEN = "of-the-fleet"

Row = tuple[int, float, str, str, "str | None"]


class Gate:
    """A proxy in front of the collector: refuses a third of the POSTs, and 502 while nobody is behind it."""

    def __init__(self, behind: str, rng: random.Random) -> None:
        self.refused = self.passed = self.dead = 0
        self.is_well = False
        self._behind, self._rng = behind, rng

    async def start(self) -> str:
        """Listen. The URL for the workers."""
        app = web.Application(client_max_size=4 << 20)
        app.router.add_post("/events", self._forward)
        self._http = aiohttp.ClientSession()
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/events"

    async def stop(self) -> None:
        """Close."""
        await self._runner.cleanup()
        await self._http.close()

    async def _forward(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not self.is_well and self._rng.random() < 1 / 3:
            self.refused += 1
            return web.Response(status=503)
        kept = {name: request.headers[name] for name in ("Authorization", "Content-Type", "Nullworker-Log-Key")}
        try:
            async with self._http.post(self._behind, data=body, headers=kept) as answer:
                self.passed += 1
                return web.Response(status=answer.status, body=await answer.read())
        except (aiohttp.ClientError, OSError):
            self.dead += 1
            return web.Response(status=502)


class Command:
    """A command of nullworker as a process."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._arguments = arguments
        self._env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NULL_LOG_FORMAT": "json", **env}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, url: str) -> None:
        """Start it, and wait until it answers there.

        Raises:
            RuntimeError: it does not.
        """
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nullworker", *self._arguments, env=self._env, stderr=asyncio.subprocess.DEVNULL
        )
        end = time.monotonic() + PATIENCE
        async with aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with http.get(url) as answer:
                        if answer.status < 500:
                            return
                if self.process.returncode is not None or time.monotonic() > end:
                    raise RuntimeError(f"{self._arguments[0]} does not start")
                await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals) -> int:
        """Tell it to end, and wait for that; its exit code."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), PATIENCE)


async def reserve(port: int, number: int) -> None:
    """Make reservations that end at once, one after the other; an error ends it."""
    async with aiohttp.ClientSession() as http:
        for job in range(number):
            payload = {"duration": 0, "metadata": {"job": job}}
            async with http.post(f"http://127.0.0.1:{port}/reserve", json={"payload": payload}) as answer:
                await answer.read()


def log_of(folder: Path) -> list[Row]:
    """The events of a worker's log."""
    with contextlib.closing(sqlite3.connect(folder / "log.db")) as conn:
        return conn.execute("SELECT seq, at, reservation_id, kind, reason FROM events ORDER BY seq").fetchall()


def collected(db: Path, instance: int) -> list[Row]:
    """The events of a worker in the fleet's database, in the order in which they came."""
    query = "SELECT log_seq, at, reservation_id, kind, reason FROM events WHERE instance = ? ORDER BY seq"
    with contextlib.closing(sqlite3.connect(db)) as conn:
        return conn.execute(query, (str(instance),)).fetchall()


class Run:
    """One run in a folder. `problems` must stay empty."""

    def __init__(self, folder: Path, workers: int, reservations: int, seed: int) -> None:
        self.problems: list[str] = []
        self.kills = self.events = self.lost = 0
        self.slowest_exit = self.lost_seconds = 0.0
        self.db = folder / "fleet.db"
        self._folder, self._workers, self._reservations = folder, workers, reservations
        self._rng = random.Random(seed)
        self._ports = free_ports(1 + 3 * (workers + 1))
        self._collector_url = f"http://127.0.0.1:{self._ports.pop()}"
        port = self._collector_url.rpartition(":")[2]
        self._started: list[Command] = []
        self._collector = Command("collect", "--db", str(self.db), "--port", port, NULL_COLLECT_TOKEN=TOKEN)
        self.gate = Gate(f"{self._collector_url}/events", self._rng)

    async def go(self) -> None:
        """Run all of it.

        Raises:
            RuntimeError, asyncio.TimeoutError: something does not start, or does not end.
        """
        self._sink = await self.gate.start()
        await self._collector.start(f"{self._collector_url}/readyz")
        killing = asyncio.ensure_future(self._kill())
        try:
            await asyncio.gather(*(self._orderly(number) for number in range(self._workers)))
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
            await self._collector.end(signal.SIGKILL)
            await self._collector.start(f"{self._collector_url}/readyz")
            self.gate.is_well = True
            await self._destroyed(self._workers)
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
            for command in (self._collector, *self._started):
                if command.process is not None and command.process.returncode is None:
                    await command.end(signal.SIGKILL)
            await self.gate.stop()

    async def _kill(self) -> None:
        took = 1.0
        while True:
            await asyncio.sleep(self._rng.uniform(*LIVES) * max(took, 1.0))
            await self._collector.end(signal.SIGKILL)
            self.kills += 1
            begun = time.monotonic()
            await self._collector.start(f"{self._collector_url}/readyz")
            took = time.monotonic() - begun

    def _worker(self, number: int) -> tuple[Path, int, Command, str]:
        folder = self._folder / f"worker-{number}"
        folder.mkdir()
        port, control, http = (str(each) for each in self._ports[3 * number : 3 * number + 3])
        env = {
            "CONTAINER_ID": str(100 + number),
            "REPORT_ADDR": "http://127.0.0.1:9",
            "UNSECURED": "true",
            "WORKER_PORT": port,
            "NULL_CONTROL_PORT": control,
            "WORKER_HTTP_PORT": http,
            "NULL_EVENT_LOG": str(folder / "log.db"),
            "NULL_LOG_SYNC": "normal",
            "NULL_SINK": self._sink,
            "NULL_SINK_TOKEN": TOKEN,
            "NULL_DRAIN_SECONDS": str(DRAIN_SECONDS),
        }
        self._started.append(Command("serve", **env))
        return folder, int(port), self._started[-1], f"http://127.0.0.1:{control}/status"

    async def _orderly(self, number: int) -> None:
        """Work, stop in order, and check; then the machine is gone."""
        folder, port, worker, url = self._worker(number)
        await worker.start(url)
        await reserve(port, self._reservations)
        begun = time.monotonic()
        code = await worker.end(signal.SIGTERM)
        took = time.monotonic() - begun
        self.slowest_exit = max(self.slowest_exit, took)
        if code != 0:
            self.problems.append(f"worker {number} ended with {code}")
        if took > DRAIN_SECONDS + 3.5:
            self.problems.append(f"worker {number} took {took:.1f} s to exit")
        written = log_of(folder)
        shutil.rmtree(folder)
        there = collected(self.db, 100 + number)
        self.events += len(written)
        if there != written:
            same = [each[0] for each in there] == sorted({each[0] for each in there})
            self.problems.append(
                f"worker {number} had {len(written)} events, and {len(there)} are there"
                f"{'' if same else ', not in order or not once'}"
            )

    async def _destroyed(self, number: int) -> None:
        """Killed in mid-work, with its disk: how much is missing."""
        folder, port, worker, url = self._worker(number)
        await worker.start(url)
        load = asyncio.ensure_future(reserve(port, self._reservations))
        await asyncio.sleep(self._rng.uniform(1, 3))
        killed_at = time.time()
        await worker.end(signal.SIGKILL)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        written = log_of(folder)
        shutil.rmtree(folder)
        await asyncio.sleep(0.5)
        there = collected(self.db, 100 + number)
        self.lost = len(written) - len(there)
        self.lost_seconds = killed_at - written[len(there)][1] if self.lost else 0.0
        if self.lost_seconds > FRESH_SECONDS:
            self.problems.append(f"events of {self.lost_seconds:.1f} s before the kill are missing")
        if there != written[: len(there)]:
            self.problems.append("what is there of the destroyed worker is not the beginning of what it wrote")


def report(run: Run, seconds: float) -> None:
    """Print the figures."""
    gate: Any = run.gate
    print(f"workers          {run._workers} stopped in order, 1 destroyed, in {seconds:.0f} s")
    print(f"events           {run.events} written at orderly exits")
    print(f"kills            {run.kills} of the collector")
    print(f"POSTs            {gate.passed} passed, {gate.refused} refused, {gate.dead} into a dead collector")
    print(f"slowest exit     {run.slowest_exit:.1f} s")
    print(f"lost             {run.lost} events of the destroyed worker, of its last {run.lost_seconds:.2f} s")
    print(f"wrong            {len(run.problems)}")
    for problem in run.problems:
        print(f"  {problem}")


async def main(workers: int, reservations: int, seed: int) -> int:
    """Run, judge, print. The exit code."""
    folder = Path(tempfile.mkdtemp(prefix="nullworker-fleet-"))
    begun = time.monotonic()
    run = Run(folder, workers, reservations, seed)
    await run.go()
    report(run, time.monotonic() - begun)
    if run.problems:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--reservations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.workers, options.reservations, options.seed)))
