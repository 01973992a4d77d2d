"""Overload: thousands of waiting callers, hundreds of new ones each second, and forged requests at full speed.

    python -m stress.load [--waiting 10000] [--rate 500] [--seconds 10] [--forgers 4]

One worker process with its log at sync full checks signatures and reports to a fake autoscaler. A consumer releases
without pause. Beside the honest callers there are forgers and connections that never send a whole request. At the end
all waiting callers hang up, and the log is compared with what every caller saw.

Prints the figures; exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from nullworker.http.sockets import raise_fd_limit
from nullworker.testing import FakeAutoscaler

#: Connections that are made at once, so that no listening queue overflows.
AT_ONCE = 200
PATIENCE = 120.0
FORGED = "Zm9yZ2Vk" * 40


class Caller(asyncio.Protocol):
    """One POST on a connection of its own. `answered`: a future with status and body, or None when it was cut off."""

    def __init__(self, idx: int, request: bytes) -> None:
        self.idx, self.sent_at = idx, 0.0
        self.answered: asyncio.Future[tuple[int, Any, float] | None] = asyncio.get_running_loop().create_future()
        self.hung_up = False
        self._request, self._got = request, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.line = transport
        self.sent_at = time.time()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, gap, body = self._got.partition(b"\r\n\r\n")
        if gap and len(body) >= int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self.answered.set_result((int(head.split()[1]), json.loads(body), time.time()))
            self.line.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_result(None)


class Crowd:
    """The worker, and all that comes to it."""

    def __init__(self, vast: FakeAutoscaler, url: str, control: str, process: psutil.Process) -> None:
        self.vast, self.url, self.control, self.process = vast, url, control, process
        self.callers: list[Caller] = []
        self.refused = 0
        self.releases = 0
        self.peak = 0.0
        self.over = asyncio.Event()

    async def claim(self) -> None:
        """One honest caller, who then waits."""
        grant = self.vast.grant(self.url)
        body = json.dumps({"auth_data": grant, "payload": {"duration": 3600}}).encode()
        request = b"POST /reserve HTTP/1.1\r\nHost: worker\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        port = int(self.url.rpartition(":")[2])
        _, caller = await asyncio.get_running_loop().create_connection(
            lambda: Caller(grant["request_idx"], request), "127.0.0.1", port
        )
        self.callers.append(caller)

    async def claims(self, count: int) -> None:
        for begun in range(0, count, AT_ONCE):
            await asyncio.gather(*(self.claim() for _ in range(min(AT_ONCE, count - begun))))

    async def newcomers(self, rate: int, seconds: float) -> None:
        """So many each second, in steps of a tenth."""
        start = time.perf_counter()
        for step in range(1, int(seconds * 10) + 1):
            await self.claims(rate // 10)
            await asyncio.sleep(max(0.0, start + step / 10 - time.perf_counter()))

    async def forge(self) -> None:
        """A forged request as soon as the one before was refused."""
        body = {"auth_data": {**self.vast.grant(self.url), "signature": FORGED}, "payload": {}}
        async with aiohttp.ClientSession() as http:
            while not self.over.is_set():
                async with http.post(self.url + "/reserve", json=body) as answer:
                    assert answer.status == 401, answer.status
                    self.refused += 1

    async def dawdle(self) -> None:
        """A connection that sends the beginning of a request, again and again."""
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
                try:
                    writer.write(b"POST /reserve HTTP/1.1\r\nHost: worker\r\nX: ")
                    await reader.read()
                finally:
                    writer.close()
                    await writer.wait_closed()

    async def consume(self) -> None:
        """Release without pause."""
        async with aiohttp.ClientSession() as http:
            while not self.over.is_set():
                async with http.post(self.control + "/release") as answer:
                    self.releases += bool((await answer.json())["released"])

    async def watch(self) -> None:
        """The worker's memory, at its highest."""
        while not self.over.is_set():
            self.peak = max(self.peak, self.process.memory_info().rss / 1e6)
            await asyncio.sleep(0.1)

    async def hang_up(self) -> int:
        """Everybody who still waits leaves. Returns how many did."""
        waiting = [caller for caller in self.callers if not caller.answered.done()]
        for caller in waiting:
            caller.hung_up = True
            caller.line.close()
        await asyncio.gather(*(caller.answered for caller in self.callers))
        return len(waiting)

    async def live(self, db: Path, count: int) -> None:
        """Wait until so many are held or queued: the kernel says "connected" before the worker knows of it."""
        with contextlib.closing(sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True)) as conn:
            for _ in range(int(PATIENCE * 10)):
                if conn.execute("SELECT count(*) FROM live").fetchone() == (count,):
                    return
                await asyncio.sleep(0.1)
        raise SystemExit(f"there are not {count} live reservations")

    def wrong(self, db: Path) -> list[str]:
        """Every caller, held against the log."""
        with contextlib.closing(sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True)) as conn:
            ends = {row[0]: row[1:] for row in conn.execute("SELECT request_idx, state, reason, id FROM reservations")}
            count = conn.execute("SELECT count(*) FROM reservations").fetchone()[0]
        found = [] if len(ends) == count else [f"{count} reservations have {len(ends)} numbers"]
        for caller in self.callers:
            answer, end = caller.answered.result(), ends.pop(caller.idx, None)
            if answer is not None:
                right = end is not None and (answer[0], answer[1].get("reservation_id")) == (200, end[2])
                right = right and end is not None and end[:2] == ("released", "explicit")
            else:  # a release may have met the very moment in which it left
                right = caller.hung_up and end is not None and end[0] in ("cancelled", "released")
            if not right:
                found.append(f"request {caller.idx}: answered {answer}, in the log {end}")
        return found + [f"nobody has sent what is in the log as {idx}" for idx in ends]

    def seconds_to_queue(self, db: Path) -> list[float]:
        """From the first byte of a claim to its event, as the worker's clock has it."""
        with contextlib.closing(sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True)) as conn:
            at = dict(conn.execute("SELECT data ->> 'request_idx', at FROM events WHERE kind = 'queued'"))
        return [at[caller.idx] - caller.sent_at for caller in self.callers if caller.idx in at]

    def seconds_to_answer(self, db: Path) -> list[float]:
        """From a release to the answer in the caller's hand."""
        with contextlib.closing(sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True)) as conn:
            at = dict(conn.execute("SELECT reservation_id, at FROM events WHERE kind = 'released'"))
        answers = [answer for caller in self.callers if (answer := caller.answered.result()) is not None]
        return [answer[2] - at[answer[1]["reservation_id"]] for answer in answers if answer[0] == 200]


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [float("nan")]
    p99 = ordered[int(len(ordered) * 0.99)]
    return f"p50 {statistics.median(ordered) * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, worst {ordered[-1] * 1000:.1f} ms"


def worker_env(vast: FakeAutoscaler, folder: Path) -> dict[str, str]:
    """The environment of a worker that reports to this autoscaler, with its log in the folder, on ports of its own."""
    return {
        **os.environ,
        "CONTAINER_ID": "7",
        "REPORT_ADDR": vast.url,
        "WORKER_PORT": "0",
        "NULL_CONTROL_PORT": "0",
        "WORKER_HTTP_PORT": "0",
        "NULL_EVENT_LOG": str(folder / "nullworker.db"),
        "NULL_LOG_FORMAT": "json",
    }


async def run(folder: Path, *, waiting: int, rate: int, seconds: float, forgers: int) -> int:
    db = folder / "nullworker.db"
    async with FakeAutoscaler() as vast:
        with (folder / "lines").open("wb") as lines:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nullworker", "serve"),
                env={
                    **worker_env(vast, folder),
                    "NULL_MAX_QUEUED": str(waiting + int(rate * seconds) + 1000),
                    "NULL_MAX_QUEUE_SECONDS": "3600",
                },
                stderr=lines,
            )
        try:
            started = await line_of(folder / "lines", "worker_started")
            await line_of(folder / "lines", "key_loaded")
            crowd = Crowd(
                vast,
                f"http://127.0.0.1:{started['external_port']}",
                f"http://127.0.0.1:{started['control_port']}",
                psutil.Process(worker.pid),
            )
            ready = crowd.process.memory_info().rss / 1e6
            began = time.perf_counter()
            await crowd.claims(waiting)
            await crowd.live(db, waiting)
            filled, full = time.perf_counter() - began, crowd.process.memory_info().rss / 1e6
            others = [crowd.consume(), crowd.watch(), *(crowd.forge() for _ in range(forgers)), crowd.dawdle()]
            tasks = [asyncio.ensure_future(each) for each in others]
            cpu, began = sum(crowd.process.cpu_times()[:2]), time.perf_counter()
            await crowd.newcomers(rate, seconds)
            took, cpu = time.perf_counter() - began, sum(crowd.process.cpu_times()[:2]) - cpu
            crowd.over.set()
            left = await crowd.hang_up()
            tasks[-1].cancel()
            await asyncio.gather(*tasks[:-1])
            await asyncio.gather(tasks[-1], return_exceptions=True)
            await crowd.live(db, 0)
            idle = crowd.process.memory_info().rss / 1e6
            await vast.wait_for(lambda: len({o["request_idx"] for o in vast.outcomes}) >= len(crowd.callers))
            told = {outcome["request_idx"] for outcome in vast.outcomes} == {caller.idx for caller in crowd.callers}
        finally:
            worker.terminate()
            code = await worker.wait()
        wrong = crowd.wrong(db)
        bad = Counter(line["event"] for line in _lines(folder / "lines") if line["level"] in ("warning", "error"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}")
    print(f"waiting                  {waiting} connections, all there after {filled:.1f} s")
    print(f"newcomers                {rate} a second for {took:.1f} s")
    print(f"forged, refused          {crowd.refused} ({crowd.refused / took:.0f} a second, {forgers} at once)")
    print(f"released                 {crowd.releases} ({crowd.releases / took:.0f} a second)")
    print(f"claim -> in the log      {spread(crowd.seconds_to_queue(db)[waiting:])}")
    print(f"release -> answer        {spread(crowd.seconds_to_answer(db))}")
    print(f"worker's cpu             {cpu / took:.0%}")
    memory = f"ready {ready:.0f}, {waiting} waiting {full:.0f}, peak {crowd.peak:.0f}, after {idle:.0f}"
    print(f"worker's memory, MB      {memory}")
    print(f"hung up at the end       {left}")
    print(f"warnings and errors      {dict(bad) or 'none'}")
    print(f"outcomes to autoscaler   {'each' if told else 'NOT each'}")
    print(f"wrong                    {len(wrong)}")
    for each in wrong[:10]:
        print("   ", each)
    return int(bool(wrong) or not told or code != 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


async def line_of(path: Path, event: str) -> dict[str, Any]:
    for _ in range(int(PATIENCE * 20)):
        for line in _lines(path):
            if line["event"] == event:
                return line
        await asyncio.sleep(0.05)
    raise SystemExit(f"no line {event}: {_lines(path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--forgers", type=int, default=4)
    arguments = parser.parse_args()
    needed = arguments.waiting + int(arguments.rate * arguments.seconds) + 1000
    if raise_fd_limit() < needed:
        parser.error(f"this needs {needed} open files: ulimit -Hn {needed}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(asyncio.run(run(Path(folder), **vars(arguments))))


if __name__ == "__main__":
    main()
