"""Drains a Redis list by `nullworker dispatch` while it, workers and consumers are killed, then checks the accounts.

    python -m stress.dispatch_kills --jobs 200 --kills 50 --workers 8

Jobs of 1 to 5 s. The dispatcher is killed with -9 KILLS times and started again; workers and consumers are killed in
between. Each consumer takes a job with a lease, which it renews, and a job whose lease has run out goes back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LIFETIME, LEASE = 12.0, 3.0
#: Seconds that a slow machine may need beyond what the jobs take.
PATIENCE = 180.0

CONSUMER = f"""
import json, os, sys, time
from redis import Redis

redis = Redis.from_url(os.environ["REDIS_URL"])
me = os.environ["NULLWORKER_RESERVATION_ID"] + "/" + str(os.getpid())
lease = {LEASE}
take = redis.register_script('''
for _, job in ipairs(redis.call("LRANGE", KEYS[2], 0, -1)) do
    if redis.call("EXISTS", "lease:" .. job) == 0 then
        redis.call("LREM", KEYS[2], 1, job)
        redis.call("LPUSH", KEYS[1], job)
    end
end
local job = redis.call("LMOVE", KEYS[1], KEYS[2], "LEFT", "RIGHT")
if job then redis.call("SET", "lease:" .. job, ARGV[1], "PX", ARGV[2]) end
return job
''')
renew = redis.register_script('''
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
redis.call("PEXPIRE", KEYS[1], ARGV[2])
return 1
''')
finish = redis.register_script('''
if redis.call("GET", KEYS[2]) ~= ARGV[1] then return 0 end
redis.call("DEL", KEYS[2])
redis.call("LREM", KEYS[1], 1, ARGV[2])
redis.call("RPUSH", "done", ARGV[2])
return 1
''')

def note(what):
    redis.rpush("runs", json.dumps([job, me, what, time.time()]))

job = take(keys=["jobs", "jobs:busy"], args=[me, int(lease * 1000)])
if job is None:
    redis.incr("empty")
    sys.exit(0)
job = job.decode()
note("begin")
end = time.monotonic() + float(job.partition(":")[2])
while (left := end - time.monotonic()) > 0:
    time.sleep(min(0.5, left))
    if not renew(keys=["lease:" + job], args=[me, int(lease * 1000)]):
        sys.exit(3)
    note("alive")
note("done" if finish(keys=["jobs:busy", "lease:" + job], args=[me, job]) else "lost")
"""


class Account(NamedTuple):
    """What a run came to; `faults` must be empty."""

    jobs: int
    killed: Counter[str]
    runs: int  # times that a consumer took a job
    holds: int
    empty: int  # holds that found no job
    most_held: int
    seconds: float
    faults: list[str]


class Run:
    """One run over a folder."""

    def __init__(
        self, folder: Path, *, jobs: int, kills: int, workers: int, seed: int, others_each: float = 2.0
    ) -> None:
        self.folder, self.jobs, self.kills, self.workers = folder, jobs, kills, workers
        self.random = random.Random(seed)
        self.others_each = others_each  # seconds between two kills of workers and consumers, on average
        self.killed: Counter[str] = Counter()
        self.faults: list[str] = []
        self.lives = 0
        self.port = _free_port()
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("NULL_")},
            "REDIS_URL": f"redis://127.0.0.1:{self.port}/0",
            "PYTHONPATH": str(ROOT),
            "NULL_LOG_FORMAT": "json",
            "NULL_DRAIN_SECONDS": "1",
        }

    async def run(self) -> Account:
        from redis.asyncio import Redis

        began = time.monotonic()
        (self.folder / "consumer.py").write_text(CONSUMER)
        (self.folder / "dev").mkdir()
        consumer = (sys.executable, "-m", "nullworker", "work", "--", sys.executable, str(self.folder / "consumer.py"))
        dev = ["dev", "--port", "0", "--worker-port", "0", "--control-port", "0", "--folder", str(self.folder / "dev")]
        dev += ["--max-workers", str(self.workers), "--inactivity-timeout", "20", "--", *consumer]
        server = ("redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--save", "")
        async with (
            self.process("redis", *server),
            self.process("dev", sys.executable, "-m", "nullworker", *dev) as vast,
        ):
            url = await self.url()
            redis: Any = Redis.from_url(self.env["REDIS_URL"], decode_responses=True)
            names = [f"{number}:{self.random.uniform(1, 5):.2f}" for number in range(self.jobs)]
            await redis.rpush("jobs", *names)
            try:
                await asyncio.wait_for(self.drain(redis, url, vast), self.jobs * 5 / self.workers + PATIENCE)
            except asyncio.TimeoutError:
                self.faults.append(f"{await redis.llen('done')} of {self.jobs} jobs are done: it takes too long")
            done = Counter(await redis.lrange("done", 0, -1))
            runs = [json.loads(each) for each in await redis.lrange("runs", 0, -1)]
            empty = int(await redis.get("empty") or 0)
            await redis.aclose()
        if missing := set(names) - set(done):
            self.faults.append(f"jobs that were not done: {sorted(missing)}")
        if twice := [job for job, times in done.items() if times > 1]:
            self.faults.append(f"jobs that were done twice: {twice}")
        self.check_runs(runs)
        holds, most = self.check_holds()
        begun = sum(what == "begin" for _, _, what, _ in runs)
        return Account(self.jobs, self.killed, begun, holds, empty, most, time.monotonic() - began, self.faults)

    async def drain(self, redis: Any, url: str, vast: asyncio.subprocess.Process) -> None:
        """Until every job is done and nothing is open, with kills in between."""
        killing = asyncio.ensure_future(self.kill_others(vast))
        try:
            for _ in range(self.kills):
                async with self.dispatch(url) as process:
                    await self.until_connected(process)
                    await asyncio.sleep(self.random.uniform(0.0, 4.0))
                    if process.returncode is not None:
                        self.faults.append(f"the dispatcher has ended with {process.returncode}")
                    process.kill()
                    self.killed["dispatcher"] += 1
                if await redis.llen("done") >= self.jobs:
                    break
            async with self.dispatch(url):
                while await redis.llen("done") < 0.8 * self.jobs:
                    await asyncio.sleep(0.2)
        finally:
            killing.cancel()
            await asyncio.wait({killing})
            if not killing.cancelled() and (error := killing.exception()) is not None:
                raise error
        async with self.dispatch(url) as process:
            while await redis.llen("done") < self.jobs:
                await asyncio.sleep(0.2)
            end = time.monotonic() + LIFETIME + 15
            while opened := self.ledger("SELECT count(*) FROM open_claims")[0][0]:
                if time.monotonic() > end:
                    self.faults.append(f"{opened} claims are open more than a lifetime after the end")
                    break
                await asyncio.sleep(0.2)
            process.terminate()
            if await process.wait():
                self.faults.append(f"SIGTERM ended the dispatcher with {process.returncode}")

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
            what = self.random.choice(["serve", "consumer.py"])
            victims = []
            for child in psutil.Process(vast.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    command = child.cmdline()
                    if command and command[-1].endswith(what) and (what == "serve" or "work" not in command):
                        victims.append(child)
            if victims:
                with contextlib.suppress(psutil.Error):
                    self.random.choice(victims).kill()
                    self.killed[what] += 1

    @contextlib.asynccontextmanager
    async def dispatch(self, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
        options = ["--queue", f"{self.env['REDIS_URL']}?list=jobs&busy=jobs:busy", "--max", str(self.workers)]
        options += ["--interval", "0.5", "--settle", "4", "--lifetime", str(LIFETIME), "--attach", "0", "--port", "0"]
        command = ("dispatch", "--endpoint", "null", "--autoscaler", url, *options)
        async with self.process("dispatch", sys.executable, "-W", "ignore", "-m", "nullworker", *command) as process:
            yield process

    @contextlib.asynccontextmanager
    async def process(self, name: str, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=self.folder, env=self.env, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
            )
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

    async def url(self) -> str:
        for _ in range(300):
            for line in (self.folder / "dev.log").read_text().splitlines():
                if "a stand-in for Vast Serverless" in line or "Vast Serverless" in line:
                    return line.split()[-1]
            await asyncio.sleep(0.1)
        raise AssertionError("nullworker dev does not start")

    # -- the accounts ----------------------------------------------------------------------------------------------

    def ledger(self, query: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.folder / "nullworker-dispatch.db", timeout=20)) as conn:
            return conn.execute(query).fetchall()

    def check_runs(self, runs: list[Any]) -> None:
        """No job is worked on by two at once."""
        spans: dict[tuple[str, str], tuple[float, float]] = {}
        for job, who, _, at in runs:
            begin, _ = spans.get((job, who), (at, at))
            spans[job, who] = begin, at
        by_job: dict[str, list[tuple[float, float]]] = {}
        for (job, _), span in spans.items():
            by_job.setdefault(job, []).append(span)
        for job, of_job in by_job.items():
            of_job.sort()
            for (_, end), (begin, _) in itertools.pairwise(of_job):
                if begin < end:
                    self.faults.append(f"job {job} was worked on twice at once")

    def check_holds(self) -> tuple[int, int]:
        """Every session is in the ledger, once; never more than the maximum are held."""
        edges: list[tuple[float, int]] = []
        sessions: set[str] = set()
        still_open = {each for (each,) in self.ledger("SELECT session_id FROM open_claims")}
        for path in sorted((self.folder / "dev").glob("nullworker-*.db")):
            with contextlib.closing(sqlite3.connect(path)) as conn:
                if not conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'events'").fetchone():
                    continue  # killed before it had made its log
                held = dict(conn.execute("SELECT reservation_id, at FROM events WHERE kind = 'held'"))
                ends = "SELECT reservation_id, at FROM events WHERE kind IN ('released', 'expired', 'cancelled')"
                ended = dict(conn.execute(ends))
            for reservation, at in held.items():
                sessions.add(reservation)
                # a worker that was killed, and not started again, has no end in its log
                edges += [(at, 1), (ended[reservation], -1)] if reservation in ended else []
                if reservation not in ended and reservation in still_open:
                    self.faults.append(f"{reservation} is still held in {path.name}")
        known = Counter(each for (each,) in self.ledger("SELECT session_id FROM claims WHERE held_at IS NOT NULL"))
        if unknown := sessions - set(known):
            self.faults.append(f"sessions that the ledger does not know: {sorted(unknown)}")
        if twice := [session for session, times in known.items() if times > 1]:
            self.faults.append(f"sessions that the ledger has twice: {twice}")
        now = most = 0
        for _, step in sorted(edges):
            now += step
            most = max(most, now)
        if most > self.workers:
            self.faults.append(f"{most} were held at once, of {self.workers}")
        return len(sessions), most


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="nullworker-kills-")
    run = Run(Path(folder), jobs=options.jobs, kills=options.kills, workers=options.workers, seed=options.seed)
    account = asyncio.run(run.run())
    print(account._asdict())
    if account.faults or options.keep:
        print(f"its files are in {folder}")
    else:
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(folder).rmdir()
    sys.exit(bool(account.faults))


if __name__ == "__main__":
    main()
