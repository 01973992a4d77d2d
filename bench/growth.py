"""What grows with the number of callers, watchers, events, sessions and workers: CPU, memory and latency, in one table.

    python -m bench --only queued,watchers,events,sessions,workers

Each process is measured with few and with many, `SAMPLES` times, one after the other, while nothing else goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil

from bench import fleet, long_log
from bench.children import PATIENCE, ROOT, running, until
from bench.figures import p50_p99, short
from bench.many_workers import ManyWorkers
from bench.peers import Peer
from nullworker.eventlog import cloudevents
from nullworker.testing import FakeAutoscaler

QUEUED, WATCHERS, EVENTS, SESSIONS, WORKERS = (1_000, 10_000), 1_000, 10_000_000, (200, 1_000), 500
SAMPLES = 200
#: Connections that are made at once.
AT_ONCE = 200
#: Seconds in which an idle dispatcher is looked at. Each session is renewed once in them: a third of its lifetime.
AT_REST_SECONDS = 10.0
#: Seconds for a thousand sessions to be held.
HELD_SECONDS = 120.0


class Row(NamedTuple):
    """One line of the table. Latencies in seconds."""

    what: str
    number: int
    cpu: str
    memory: float  # MB, of the process
    took: list[float]

    def cells(self) -> list[str]:
        """As text, with milliseconds."""
        latencies = [short(each * 1e3) for each in p50_p99(self.took)]
        return [self.what, f"{self.number:,}", self.cpu, f"{self.memory:.0f}", *latencies]


HEADS = ("with so many", "n", "CPU", "memory, MB", "p50, ms", "p99, ms")


@contextlib.asynccontextmanager
async def _worker(**env: str) -> AsyncIterator[Peer]:
    with tempfile.TemporaryDirectory(prefix="nullworker-bench-", ignore_cleanup_errors=True) as folder:
        async with FakeAutoscaler() as vast, Peer("nullworker", vast, Path(folder), **env) as peer:
            yield peer


class _Cpu:
    """CPU of a process for each of so many things."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._before = self._seconds()

    def each(self, number: int) -> str:
        """In milliseconds."""
        return f"{short((self._seconds() - self._before) / number * 1e3)} ms"

    def share(self, seconds: float) -> str:
        """Of one core."""
        return f"{100 * (self._seconds() - self._before) / seconds:.1f} %"

    def _seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


class _Events:
    """A reader of /events: when the next event of a kind came."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self, kind: str) -> float:
        """The moment in which it was read."""
        while line := await asyncio.wait_for(self._response.content.readline(), PATIENCE):
            if line.startswith(b"data:") and json.loads(line[5:])["kind"] == kind:
                return time.perf_counter()
        raise ConnectionError("the stream of events has ended")


# -- callers in the queue ----------------------------------------------------------------------------------------------


async def queued() -> list[Row]:
    """The last claims of a queue, and the first hand-overs from it."""
    return [row for count in (SAMPLES, *QUEUED) for row in await _queued(count)]


async def _queued(count: int) -> list[Row]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with _worker() as peer, peer.http.get(peer.control + "/events", timeout=timeout) as response:
        events = _Events(response)
        waiting = [asyncio.ensure_future(peer.reserve(peer.body()))]  # this one is held
        await events.next("held")
        for begun in range(0, count - SAMPLES, AT_ONCE):
            waiting += [asyncio.ensure_future(peer.reserve(peer.body())) for _ in range(AT_ONCE)]
            await _queue_is(peer, begun + AT_ONCE)
        for _ in range(count - SAMPLES):  # the events of those
            await events.next("queued")
        await peer.idle()
        claims, cpu = list[float](), _Cpu(peer.stats)
        for _ in range(SAMPLES):
            body, began = peer.body(), time.perf_counter()
            waiting.append(asyncio.ensure_future(peer.reserve(body)))
            claims.append(await events.next("queued") - began)
        rows = [Row("queued callers: a claim -> a watcher has it from the log", count, cpu.each(SAMPLES), 0.0, claims)]
        await peer.idle()
        memory = peer.memory()
        hand_overs, cpu = list[float](), _Cpu(peer.stats)
        for _ in range(SAMPLES):
            began = time.perf_counter()
            assert await peer.release()
            hand_overs.append(await events.next("held") - began)
        rows.append(Row("queued callers: a release -> the next holds", count, cpu.each(SAMPLES), memory, hand_overs))
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
    return [row._replace(memory=memory) for row in rows]


async def _queue_is(peer: Peer, length: int) -> None:
    give_up_at = time.perf_counter() + PATIENCE
    while time.perf_counter() < give_up_at:
        async with peer.http.get(peer.control + "/status") as answer:
            if (await answer.json())["queue"]["length"] >= length:
                return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"the queue does not reach {length}")


# -- watchers ----------------------------------------------------------------------------------------------------------


class _Watcher(asyncio.Protocol):
    """A reader of /events that only notes when bytes came."""

    def __init__(self, came: list[float]) -> None:
        self._came = came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._came.append(time.perf_counter())


async def watchers() -> list[Row]:
    """Claims that end at once, which each watcher sees."""
    return [row for count in (1, WATCHERS) for row in await _watched(count)]


async def _watched(count: int) -> list[Row]:
    loop, samples = asyncio.get_running_loop(), SAMPLES // 4
    async with _worker() as peer:
        came, transports = list[float](), list[asyncio.Transport]()
        for _ in range(count):
            watcher = await loop.create_connection(lambda: _Watcher(came), "127.0.0.1", peer.control_port)
            transports.append(watcher[0])
        await _arrived(came, count)  # each has the head, and a comment
        await peer.idle()
        delivered, answered, cpu = list[float](), list[float](), _Cpu(peer.stats)
        for _ in range(samples):
            came.clear()
            body, began = {**peer.body(), "payload": {"duration": 0}}, time.perf_counter()
            assert await peer.reserve(body) == 200
            answered.append(time.perf_counter() - began)
            await _arrived(came, count)
            delivered += [at - began for at in came]
        used, memory = cpu.each(samples), peer.memory()
        for transport in transports:
            transport.close()
    return [
        Row("watchers of `/events`: a claim -> its events at each of them", count, used, memory, delivered),
        Row("watchers of `/events`: the answer to that claim", count, used, memory, answered),
    ]


async def _arrived(came: list[float], count: int) -> None:
    """Wait until something has come to each, and nothing more for a twentieth of a second."""
    give_up_at, before = time.perf_counter() + PATIENCE, -1
    while len(came) < count or len(came) != before:
        if time.perf_counter() > give_up_at:
            raise TimeoutError(f"of {count} watchers {len(came)} have got something")
        before = len(came)
        await asyncio.sleep(0.05)


# -- events in the log -------------------------------------------------------------------------------------------------


async def events() -> list[Row]:
    """A worker on a log with ten million events, and on an empty one."""
    with tempfile.TemporaryDirectory(prefix="nullworker-bench-", ignore_cleanup_errors=True) as name:
        await asyncio.to_thread(long_log.make, Path(name) / "long.db", EVENTS)
        await asyncio.to_thread(long_log.read_once, Path(name) / "long.db")
        return [row for count in (0, EVENTS) for row in await _logged(Path(name) / "long.db" if count else None, count)]


async def _logged(path: Path | None, count: int) -> list[Row]:
    env = {} if path is None else {"NULL_EVENT_LOG": str(path)}
    starts, what = list[float](), "events in the log"
    for _ in range(4):
        async with _worker(**env) as peer:
            starts.append(peer.seconds_to_port)
            spent = peer.cpu()
    async with _worker(**env) as peer:
        memory = peer.memory()
        rows = [Row(f"{what}: spawn -> port open", count, f"{short(spent * 1e3)} ms", memory, starts)]
        took, cpu = list[float](), _Cpu(peer.stats)
        for _ in range(SAMPLES):
            body, began = {**peer.body(), "payload": {"duration": 0}}, time.perf_counter()
            assert await peer.reserve(body) == 200
            took.append(time.perf_counter() - began)
        rows.append(Row(f"{what}: a claim that ends at once", count, cpu.each(SAMPLES), peer.memory(), took))
        for route in ("/metrics", "/reservations?limit=50"):
            took, cpu = list[float](), _Cpu(peer.stats)
            for _ in range(SAMPLES):
                began = time.perf_counter()
                async with peer.http.get(peer.control + route) as answer:
                    await answer.read()
                took.append(time.perf_counter() - began)
            rows.append(Row(f"{what}: `GET {route}`", count, cpu.each(SAMPLES), peer.memory(), took))
    return rows


# -- sessions in one dispatcher ----------------------------------------------------------------------------------------


async def sessions() -> list[Row]:
    """`nullworker dispatch` with so many sessions held, each renewed every ten seconds: at rest, and one job more."""
    return [row for count in (1, *SESSIONS) for row in await _dispatched(count)]


async def _dispatched(count: int) -> list[Row]:
    lifetime, interval, samples = 3 * AT_REST_SECONDS, 0.2, SAMPLES // 10
    with tempfile.TemporaryDirectory(prefix="nullworker-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        async with FakeAutoscaler() as vast, ManyWorkers(vast, count + 5) as workers:
            with contextlib.closing(sqlite3.connect(folder / "queue.db", isolation_level=None)) as queue:
                queue.execute("PRAGMA journal_mode = WAL")
                queue.execute("PRAGMA synchronous = OFF")
                queue.execute("CREATE TABLE queue (waiting, in_flight)")
                queue.execute("INSERT INTO queue VALUES (?, 0)", (count,))
                begun = "UPDATE queue SET waiting = waiting - 1, in_flight = in_flight + 1"
                workers.on_begin = lambda: queue.execute(begun)
                workers.on_end = lambda: queue.execute("UPDATE queue SET in_flight = in_flight - 1")
                command: tuple[str, ...] = (
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "nullworker",
                    "dispatch",
                    "--endpoint",
                    vast.endpoint,
                )
                command += ("--autoscaler", vast.url, "--max", str(count + 5), "--port", "0")
                command += ("--queue", f"sqlite:///{folder / 'queue.db'}?query=SELECT waiting, in_flight FROM queue")
                command += ("--interval", str(interval), "--lifetime", str(lifetime), "--log-format", "json")
                async with running(*command, folder=folder, out="dispatch.log", env={"PYTHONPATH": str(ROOT)}) as child:
                    await until(
                        f"{count} sessions", lambda: _sees(child.output(), 0, count), child, HELD_SECONDS, interval
                    )
                    process = psutil.Process(child.pid)
                    await asyncio.sleep(2.0)
                    cpu = _Cpu(process)
                    await asyncio.sleep(AT_REST_SECONDS)
                    at_rest, memory = cpu.share(AT_REST_SECONDS), process.memory_info().rss / 1e6
                    took = list[float]()
                    for _ in range(samples):
                        workers.begun_at = 0.0
                        began = time.perf_counter()
                        queue.execute("UPDATE queue SET waiting = waiting + 1")
                        await until("the session of a job", lambda: workers.begun_at, child)
                        took.append(workers.begun_at - began)
                        await until("its stream", lambda: workers.newest in workers.followed, child)
                        workers.followed[workers.newest].set()
                        # A job that comes before the dispatcher has seen the end of the last one may have to wait.
                        await until("its end", lambda: _sees(child.output(), 0, count), child, pause=interval / 2)
    what = f"sessions in one dispatcher: a job -> a worker is asked, `--interval {interval}`"
    return [Row(what, count, f"{at_rest} of a core at rest", memory, took)]


def _sees(output: str, waiting: int, held: int) -> bool:
    """Whether the last decision was made with so many."""
    line = next((line for line in reversed(output.splitlines()) if '"decided"' in line and line.endswith("}")), "{}")
    decided = json.loads(line)
    return decided.get("waiting") == waiting and decided.get("held") == held and not decided.get("opened")


# -- workers into one collector ----------------------------------------------------------------------------------------


async def workers() -> list[Row]:
    """`nullworker collect` with so many workers, each on a connection of its own: batches of nine events."""
    return [await _collected(count) for count in (1, WORKERS)]


async def _collected(count: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="nullworker-bench-", ignore_cleanup_errors=True) as name:
        made = fleet.batches(count, (count + SAMPLES) * 9, 9)
        command = ("collect", "--db", str(Path(name) / "fleet.db"), "--port", "0", "--log-format", "json")
        async with fleet.started(*command, folder=Path(name)) as (process, line):
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
            async with aiohttp.ClientSession(connector=connector) as http:

                async def post(worker: int, body: bytes) -> float:
                    headers = {"Content-Type": cloudevents.BATCH_TYPE, cloudevents.KEY_HEADER: str(worker)}
                    began = time.perf_counter()
                    async with http.post(line["events"], data=body, headers=headers) as answer:
                        assert answer.status == 200, await answer.text()
                    return time.perf_counter() - began

                await asyncio.gather(*(post(worker, body) for worker, body, _ in made[:count]))
                cpu = _Cpu(process)
                took = [await post(worker, body) for worker, body, _ in made[count : count + SAMPLES]]
                used, memory = cpu.each(SAMPLES), process.memory_info().rss / 1e6
    return Row("workers into one collector: a POST of nine events, on disk", count, used, memory, took)


MEASURES: dict[str, Callable[[], Awaitable[list[Row]]]] = {
    "queued": queued,
    "watchers": watchers,
    "events": events,
    "sessions": sessions,
    "workers": workers,
}
