"""A whole dispatcher in one process and in virtual time: ten minutes, or a day, take a moment.

Queue, engine, workers and consumers are in memory, at the places where the dispatcher calls a library or the network:
the queue's `read`, the SDK's endpoint, and the client's `post` and `stream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from nullworker import clock as clocks
from nullworker.client import session
from nullworker.client.vastai_sdk import VastUnreachable
from nullworker.client.worker_http import INSTANCE_HEADER, NoAnswer, Refused, Reply
from nullworker.dispatch import book, dispatcher, driver, trouble, vast
from nullworker.dispatch.decision import Counts, Policy
from nullworker.dispatch.dispatcher import Dispatcher, Plan, running
from nullworker.dispatch.driver import Terms
from nullworker.dispatch.ledger import open_ledger
from nullworker.dispatch.vast import Vast

T = 1_800_000_000.0
#: Seconds from a grant's first question to its answer, where a machine has to start.
START = 30.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """Goes to the time of the next timer instead of waiting for it. Nothing in it may wait for a real socket."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.at = 1000.0

    def time(self) -> float:
        return self.at

    def _run_once(self) -> None:
        # `_ready` and `_scheduled` are asyncio's own (base_events.py, 3.10 to 3.13)
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.at = max(self.at, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class World:
    """What the dispatcher sees of the outside.

    Attributes:
        jobs: seconds of the jobs that wait, first come first served; in_flight, done: numbers of jobs.
        listed: instances that Vast lists; stopped: the urls of those whose machine is stopped; unreachable: urls that
            do not answer, although their machine runs.
        ready_at: loop time until which there is no worker; asked: the request_idx of each question for one.
        attaches: whether consumers attach; says_instance: whether workers say which instance they are.
        wall: seconds by which the wall clock has been set forward.
        prices: dollars an hour of the account's instances; prices_read: how often they were asked for.
        foreign: requests of other clients that the workers of these instances work on.
        engine_down, prices_down, loses_answers, queue_fault: faults: of the engine, of the account, of workers that are
            asked for a session, and what a read of the queue does instead.
        refuses: the status with which every worker refuses whatever it is asked.
        lifetime_cap: seconds of a session's lifetime at most, by the workers.
        bugs: whether an exception of the dispatcher is part of the test.
        held: sessions that are held now; most_held: the most at once.
        lines: log lines of the dispatcher, by their word.
    """

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.jobs: list[float] = []
        self.in_flight = self.done = self.most_held = self.claims = 0
        self.wall = self.ready_at = 0.0
        self.asked: list[int] = []
        self.attaches = self.says_instance = True
        self.listed: set[int] = set()
        self.stopped: set[str] = set()
        self.unreachable: set[str] = set()
        self.prices: dict[int, float] = {}
        self.prices_read = 0
        self.foreign: dict[int, int] = {}
        self.engine_down = self.prices_down = self.loses_answers = False
        self.refuses: int | None = None
        self.lifetime_cap = 3600.0
        self.bugs = False
        self.queue_fault: Callable[[], Coroutine[Any, Any, Counts]] | None = None
        self.held: dict[str, asyncio.Task[None]] = {}
        self.finals: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, str] = {}  # by signature
        self.reads = self.renewals = 0
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.shown = "memory"
        self.secrets: tuple[str, ...] = ()
        self.endpoint = SimpleNamespace(_route=self._route, get_workers=self._get_workers, client=self)
        self.vast_web_url = "https://console"
        self._session = SimpleNamespace(get=self._get_instances)

    def count(self, event: str) -> int:
        """How often a line was logged."""
        return sum(word == event for word, _ in self.lines)

    # -- the queue -------------------------------------------------------------------------------------------------

    async def read(self) -> Counts:
        self.reads += 1
        if self.queue_fault is not None:
            return await self.queue_fault()
        return Counts(len(self.jobs), self.in_flight)

    async def close(self) -> None:
        """Nothing is open."""

    # -- Vast ------------------------------------------------------------------------------------------------------

    async def _route(self, *, cost: float, req_idx: int, timeout: float) -> Any:
        await asyncio.sleep(0.1)
        if self.engine_down:
            raise OSError(f"connection refused, try {self.loop.at}")
        self.asked.append(req_idx)
        if self.loop.at < self.ready_at:
            return SimpleNamespace(status="WAITING", request_idx=req_idx or 1000 + len(self.asked))
        self.claims += 1
        worker = self.url(self.claims)
        self.listed.add(self.claims)
        body = {"signature": f"s{self.claims}", "reqnum": self.claims, "cost": cost}
        return SimpleNamespace(status="READY", request_idx=self.claims, body=body, get_url=lambda: worker)

    async def _get_workers(self) -> list[Any]:
        if self.engine_down:
            raise OSError("connection refused")
        states = {number: "STOPPED" if self.url(number) in self.stopped else "IDLE" for number in self.listed}
        held = {int(name.removeprefix("session-s")) for name in self.held}
        return [
            SimpleNamespace(id=number, status=state, reqs_working=(number in held) + self.foreign.get(number, 0))
            for number, state in states.items()
        ]

    @contextlib.asynccontextmanager
    async def _get_instances(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        self.prices_read += 1
        if self.prices_down:
            raise OSError("connection refused")

        async def page(content_type: str | None) -> Any:
            ports = {"3000/tcp": [{"HostPort": "80"}]}
            return {
                "instances": [
                    {"id": number, "dph_total": price, "public_ipaddr": f"worker-{number}", "ports": ports}
                    for number, price in self.prices.items()
                ]
            }

        yield SimpleNamespace(status=200, json=page)

    @staticmethod
    def url(number: int) -> str:
        """Of the worker of an instance."""
        return f"http://worker-{number}"

    async def get_ssl_context(self) -> Any:
        import ssl

        return ssl.create_default_context()

    # -- workers and consumers -------------------------------------------------------------------------------------

    async def post(self, http: Any, url: str, path: str, body: Any, *, seconds: float = 10.0) -> Reply:
        await asyncio.sleep(0.05)
        if url in self.stopped | self.unreachable:
            raise no_connection(url)
        if self.refuses is not None:
            raise Refused(url, self.refuses, "{}")
        instance = {INSTANCE_HEADER: url.rpartition("-")[2]} if self.says_instance else {}
        if path == "/session/create":
            signature = body["auth_data"]["signature"]
            if signature not in self.sessions:
                self.sessions[signature] = name = f"session-{signature}"
                self.held[name] = asyncio.ensure_future(self._consume(name))
                self.most_held = max(self.most_held, len(self.held))
            name = self.sessions[signature]
            if self.loses_answers:
                raise NoAnswer(url, asyncio.TimeoutError())
            if name in self.finals:
                return Reply(410, self.finals[name], {})
            lifetime = min(body["payload"]["lifetime"], self.lifetime_cap)
            return Reply(201, {"session_id": name, "lifetime": lifetime}, instance)
        name = body["session_id"]
        if path == "/session/end" and name in self.held:
            self.held[name].cancel()
            self._end(name, "session_end", None)
        self.renewals += path == "/ping"
        return Reply(410, self.finals[name], {}) if name in self.finals else Reply(200, {}, {})

    async def stream(
        self, http: Any, url: str, path: str, body: Any, **options: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        if url in self.stopped | self.unreachable:
            raise no_connection(url)
        if (task := self.held.get(body["session_id"])) is not None:
            if self.attaches:
                yield {"seq": 1, "kind": "extended", "reason": "attached"}
            await asyncio.wait({task})
        yield {"seq": 2, "kind": "released", "reason": "consumer_exit"}

    async def _consume(self, name: str) -> None:
        await asyncio.sleep(0.5)
        if self.jobs:
            seconds = self.jobs.pop(0)
            self.in_flight += 1
            await asyncio.sleep(seconds)
            self.in_flight -= 1
            self.done += 1
        self._end(name, "consumer_exit", {"exit_code": 0})

    def _end(self, name: str, reason: str, result: Any) -> None:
        del self.held[name]
        self.finals[name] = {"state": "released", "reason": reason, "held_seconds": None, "result": result}


def no_connection(url: str) -> NoAnswer:
    """The connection was refused, so that nothing was sent."""
    key: Any = SimpleNamespace(host=url.rpartition("/")[2], port=80, ssl=True)
    return NoAnswer(url, aiohttp.ClientConnectorError(key, ConnectionRefusedError(111, "Connection refused")))


def rows(folder: Path, query: str) -> list[Any]:
    """Ask the ledger; a query may change it too."""
    with contextlib.closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as conn:
        return conn.execute(query).fetchall()


async def until(what: Callable[[], Any], seconds: float) -> None:
    """Wait until something is so, to a second."""
    for _ in range(int(seconds)):
        if what():
            return
        await asyncio.sleep(1)
    raise AssertionError(f"not within {seconds} s")


class _Time:
    """In the place of the module `time` in nullworker/clock.py."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.loop.time()

    def time(self) -> float:
        return T + self._world.loop.time() + self._world.wall


@contextlib.asynccontextmanager
async def dispatching(world: World, folder: Path, *, runs: bool = True, **options: Any) -> AsyncIterator[Dispatcher]:
    """A dispatcher at work, as the command starts it; not `runs`: as before its start. `options`: of Plan."""
    ledger = open_ledger(folder / "ledger.db")
    ledger._conn.execute("PRAGMA synchronous = OFF")  # days of polls, each of which would wait for the disk
    clock = clocks.SystemClock(ledger.anchor(), not_before=ledger.latest())
    ledger.store_anchor(clock.anchor)
    plan = Plan(**{"policy": Policy(4), "terms": Terms(lifetime=30.0), **options})
    async with running(plan, world, Vast("null", "key", None), ledger, clock) as started:
        task = asyncio.ensure_future(started.run() if runs else asyncio.sleep(0))
        try:
            yield started
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            ledger.close()


def play(monkeypatch: pytest.MonkeyPatch, scene: Callable[[World], Coroutine[Any, Any, None]]) -> World:
    """Run a scene in a world of its own. An exception in a callback of the loop fails it too."""
    loop = VirtualLoop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    world = World(loop)
    time = _Time(world)
    monkeypatch.setattr(clocks, "time", time)
    for module in (vast, dispatcher):
        monkeypatch.setattr(module, "stopwatch", time.monotonic)
    monkeypatch.setattr(dispatcher, "wall", time.time)
    monkeypatch.setattr(session, "post", world.post)
    monkeypatch.setattr(session, "stream", world.stream)

    @contextlib.asynccontextmanager
    async def connect(*_: Any) -> AsyncIterator[Any]:
        if world.engine_down:
            raise VastUnreachable("connection refused")
        yield SimpleNamespace(sdk=world.endpoint)

    monkeypatch.setattr(vast, "connect", connect)
    for module in (dispatcher, trouble, driver, book):
        if hasattr(module, "log"):
            monkeypatch.setattr(module, "log", _Lines(world))
    try:
        loop.run_until_complete(scene(world))
    finally:
        for task in (tasks := asyncio.all_tasks(loop)):
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert unhandled == []
    return world


class _Lines:
    def __init__(self, world: World) -> None:
        self._world = world

    def info(self, event: str, **fields: Any) -> None:
        self._world.lines.append((event, fields))

    warning = error = info

    def exception(self, event: str, **fields: Any) -> None:
        assert self._world.bugs, event
        self.info(event, **fields)
