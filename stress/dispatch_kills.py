"""Drains a queue by `nullworker dispatch` while it, workers and consumers are killed, then checks the accounts.

    python -m stress.dispatch_kills --queue redis --jobs 200 --kills 50 --workers 8

Jobs of 1 to 5 s: 40 % of them are there at first, the others come while the dispatcher is killed with -9 KILLS times
and started again, once only after all workers have gone. Workers (`serve`), `nullworker work` and its commands are
killed in between. `stress.dispatch_audit` says what must be true in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from io import FileIO
from pathlib import Path

from stress import dispatch_queues
from stress.dispatch_audit import Account, Terms, audit, ledger, read_runs, unfinished

ROOT = Path(__file__).parents[1]
LIFETIME = 12.0
#: Seconds after which an idle worker is stopped.
IDLE = 20
#: Seconds between two looks at the queue.
INTERVAL = 0.5
#: Seconds that a slow machine may need beyond what the jobs take.
PATIENCE = 300.0
#: Seconds for one poll and for the start of a consumer on a busy machine.
SLACK = 5.0


class Run:
    """One run over a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        jobs: int,
        kills: int,
        workers: int,
        seed: int,
        queue: str = "redis",
        others_each: float = 2.0,
    ) -> None:
        self.folder, self.jobs, self.kills, self.workers = folder, jobs, kills, workers
        self.random = random.Random(seed)
        self.others_each = others_each  # seconds between two kills of workers and consumers, on average
        self.queue = queue
        self.faults: list[str] = []
        self.killed: Counter[str] = Counter()
        self.lives = 0
        self.seconds = jobs * 8 / workers + kills * 20 + PATIENCE  # within which it must come to its end
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("NULL_")},
            "PYTHONPATH": str(ROOT),
            "NULL_LOG_FORMAT": "json",
            "NULL_DRAIN_SECONDS": "1",
            "LEASE": str(dispatch_queues.LEASE),
            "RUNS": str(folder / "runs.jsonl"),
        }

    async def run(self) -> Account:
        began = time.monotonic()
        (self.folder / "dev").mkdir()
        with dispatch_queues.running(self.queue, self.folder / "queue") as kind:
            self.kind = kind
            self.env |= kind.jobs.env
            (self.folder / "consumer.py").write_text(kind.consumer)
            consumer = ("work", "--", sys.executable, str(self.folder / "consumer.py"))
            dev = ["dev", "--port", "0", "--worker-port", "0", "--control-port", "0"]
            dev += ["--folder", str(self.folder / "dev"), "--max-workers", str(self.workers)]
            dev += ["--inactivity-timeout", str(IDLE), "--", sys.executable, "-m", "nullworker", *consumer]
            async with self.process("dev", sys.executable, "-m", "nullworker", *dev) as vast:
                url = await self.url()
                jobs = [{"id": str(n), "seconds": round(self.random.uniform(1, 5), 2)} for n in range(self.jobs)]
                self.names = [str(job["id"]) for job in jobs]
                (self.folder / "jobs.json").write_text(json.dumps(self.names))
                try:
                    await asyncio.wait_for(self.drain(jobs, url, vast), self.seconds)
                except asyncio.TimeoutError:
                    self.faults.append(f"{await self.left()} of {self.jobs} jobs are left: it takes too long")
        account = audit(self.folder, Terms(self.workers, LIFETIME, SLACK), time.monotonic() - began)
        return account._replace(faults=self.faults + account.faults)

    async def left(self) -> int:
        """Jobs that are not done, or may come again."""
        return len(unfinished(self.names, read_runs(self.folder))) or await self.kind.jobs.left()

    async def drain(self, jobs: list[dict[str, object]], url: str, vast: asyncio.subprocess.Process) -> None:
        """Until every job is done and nothing is open, with kills in between."""
        at_first = int(0.4 * self.jobs)
        each = -(-(self.jobs - at_first) // max(self.kills, 1))
        await self.put(jobs, at_first)
        killing = asyncio.ensure_future(self.kill_others(vast))
        try:
            for life in range(self.kills):
                async with self.dispatch(url) as process:
                    await self.until_connected(process)
                    await self.put(jobs, each)
                    await asyncio.sleep(self.random.uniform(0.0, 4.0))
                    if process.returncode is not None:
                        self.faults.append(f"the dispatcher has ended with {process.returncode}")
                    self.kill(process.pid, "dispatcher", "")
                if life == 5:  # longer than a worker idles: nobody is left who could tell how its holds have ended
                    await asyncio.sleep(IDLE + 15)
            async with self.dispatch(url):
                while await self.left() > 0.2 * self.jobs:
                    await asyncio.sleep(0.5)
        finally:
            killing.cancel()
            await asyncio.wait({killing})
            if not killing.cancelled() and (error := killing.exception()) is not None:
                raise error
        async with self.dispatch(url) as process:
            while await self.left():
                await asyncio.sleep(0.5)
            end = time.monotonic() + LIFETIME + 15
            while opened := ledger(self.folder, "SELECT count(*) FROM open_claims")[0][0]:
                if time.monotonic() > end:
                    self.faults.append(f"{opened} claims are open more than a lifetime after the end")
                    break
                await asyncio.sleep(0.2)
            process.terminate()
            if await process.wait():
                self.faults.append(f"SIGTERM ended the dispatcher with {process.returncode}")

    async def put(self, jobs: list[dict[str, object]], number: int) -> None:
        for job in jobs[:number]:
            await self.kind.jobs.put(job)
        del jobs[:number]

    async def until_connected(self, process: asyncio.subprocess.Process) -> None:
        """Until it has found its endpoint: to kill it before that tries nothing."""
        self.lives += 1
        while process.returncode is None:
            if (self.folder / "dispatch.log").read_text().count('"endpoint_found"') >= self.lives:
                return
            await asyncio.sleep(0.05)

    async def kill_others(self, vast: asyncio.subprocess.Process) -> None:
        """Workers and consumers, now and then."""
        import psutil

        while True:
            await asyncio.sleep(self.random.uniform(0.5, 1.5) * self.others_each)
            what = self.random.choice(["serve", "work", "consumer.py"])
            victims = []
            for child in psutil.Process(vast.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, KeyError):  # it has ended since, or not begun yet
                    if _role(child.cmdline()) == what:
                        victims.append((child.pid, Path(child.environ()["NULL_EVENT_LOG"]).name))
            if victims:
                pid, log = self.random.choice(victims)
                self.kill(pid, what, log)

    def kill(self, pid: int, what: str, log: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed[what] += 1
            with (self.folder / "kills.jsonl").open("a") as file:
                print(json.dumps([time.time(), what, pid, log]), file=file)

    @contextlib.asynccontextmanager
    async def dispatch(self, url: str, *more: str) -> AsyncIterator[asyncio.subprocess.Process]:
        options = [*more, "--queue", self.kind.url, "--max", str(self.workers), "--interval", str(INTERVAL)]
        options += ["--settle", "4", "--lifetime", str(LIFETIME), "--port", "0"]
        command = ("dispatch", "--endpoint", "null", "--autoscaler", url, *options)
        async with self.process("dispatch", sys.executable, "-W", "ignore", "-m", "nullworker", *command) as process:
            yield process

    @contextlib.asynccontextmanager
    async def process(self, name: str, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            env=self.env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            stdin=asyncio.subprocess.DEVNULL,
        )
        copying = asyncio.ensure_future(self.copy(process, (self.folder / f"{name}.log").open("ab", buffering=0)))
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
            await asyncio.wait({copying}, timeout=1.0)  # somebody whom it has started may have the pipe still
            copying.cancel()

    @staticmethod
    async def copy(process: asyncio.subprocess.Process, file: FileIO) -> None:
        """Copy what it prints into a file, which it may not be able to write itself."""
        assert process.stdout is not None
        with file:
            while said := await process.stdout.read(65536):
                file.write(said)

    async def url(self) -> str:
        for _ in range(600):
            for line in (self.folder / "dev.log").read_text().splitlines():
                if "a stand-in for Vast Serverless" in line or "Vast Serverless" in line:
                    return line.split()[-1]
            await asyncio.sleep(0.1)
        raise AssertionError("nullworker dev does not start")


def _role(command: list[str]) -> str:
    """Which part of a worker's machine a process is."""
    if command[-1:] == ["serve"]:
        return "serve"
    if command[-1:] and command[-1].endswith("consumer.py"):
        return "work" if "work" in command else "consumer.py"
    return ""


def report(kind: Callable[..., Run], parser: argparse.ArgumentParser) -> None:
    """Run it with the options that the parser finds, print its account, and exit with 1 if anything is wrong."""
    options = vars(parser.parse_args())
    keep = options.pop("keep")
    folder = Path(tempfile.mkdtemp(prefix="nullworker-kills-"))
    account = asyncio.run(kind(folder, **options).run())
    print(options)
    for name, value in account._asdict().items():
        print(f"{name}: {value}")
    print(f"load: {os.getloadavg()}")
    if account.faults or keep:
        print(f"its files are in {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(bool(account.faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", choices=dispatch_queues.NAMES, default="redis")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the files also when nothing is wrong")
    report(Run, parser)


if __name__ == "__main__":
    main()
