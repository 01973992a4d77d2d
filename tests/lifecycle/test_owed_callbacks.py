"""Pending callbacks are kept in the log, not in memory, in order, however large and many they are."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE

from nullworker import session_callbacks
from nullworker.clock import SystemClock
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Limits
from nullworker.fsm.events import Ended, Event, Held, Queued, SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.session_callbacks import Callbacks, Post


def owe(path: Path, *payloads: Any) -> None:
    """A log with a session for each payload, `s0` and so on, that has just ended and whose owner is to be told."""
    now, events = SystemClock().now(), list[Event]()
    for number, payload in enumerate(payloads):
        terms = SessionTerms(60, "http://192.0.2.1/", payload)
        queued = Queued(kind="session", duration_cap=60, give_up_at=now + 30, session=terms)
        events.append(Event(now, f"s{number}", "queued", None, queued))
        events.append(Event(now, f"s{number}", "held", None, Held(now + 60)))
        events.append(Event(now, f"s{number}", "released", "session_end", Ended()))
    with contextlib.closing(open_log(path)) as log:
        log.append(list(enumerate(events, 1)))


@contextlib.asynccontextmanager
async def delivering(log: EventLog, post: Post, count: Callable[[str], None]) -> AsyncIterator[None]:
    """What is owed is being delivered."""
    service = Service(log, SystemClock(), Limits(), Readiness())
    running = asyncio.ensure_future(Callbacks(service, log, post, count).run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Owner:
    """Keeps who it was told of, and answers what `on` makes of the body."""

    def __init__(self, on: Callable[[Any], str | None]) -> None:
        self._told: asyncio.Queue[str] = asyncio.Queue()
        self._on = on

    async def __call__(self, route: str, body: dict[str, Any]) -> str | None:
        self._told.put_nowait(body["session_id"])
        return self._on(body)

    async def told(self) -> str:
        """The next session that it is told of."""
        return await asyncio.wait_for(self._told.get(), PATIENCE)


async def test_pending_callbacks_are_in_the_log_and_not_in_memory(path: Path) -> None:
    count, size = 200, 64 * 1024
    owe(path, *("x" * size for _ in range(count)))
    owner = Owner(lambda _: "down")
    tracemalloc.start()
    try:
        with contextlib.closing(open_log(path)) as log:
            async with delivering(log, owner, lambda _: None):
                told = [await owner.told() for _ in range(count)]
                _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told == [f"s{number}" for number in range(count)]  # in the order of their ends
    assert most < count * size / 5


async def test_a_log_that_cannot_be_read_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owe(path, None)
    owner, read, troubles = Owner(lambda _: None), queries.callbacks, [sqlite3.OperationalError("disk I/O error")]

    def fails_once(*args: Any, **kw: Any) -> Any:
        if troubles:
            raise troubles.pop()
        return read(*args, **kw)

    monkeypatch.setattr(session_callbacks, "FIRST_PAUSE_SECONDS", 0.0)
    with contextlib.closing(open_log(path)) as log:
        monkeypatch.setattr(queries, "callbacks", fails_once)
        async with delivering(log, owner, lambda _: None):
            assert await owner.told() == "s0"


async def test_what_an_older_log_holds_that_is_larger_is_still_delivered(path: Path) -> None:
    large, bodies = {"x": "x" * 900 * 1024}, list[Any]()
    owe(path, large)
    owner = Owner(bodies.append)
    with contextlib.closing(open_log(path)) as log:
        async with delivering(log, owner, lambda _: None):
            await owner.told()
    assert bodies == [{**large, "session_id": "s0", "state": "released", "reason": "session_end"}]


async def test_a_callback_that_cannot_be_read_now_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_callbacks, "FIRST_PAUSE_SECONDS", 0.0)
    owe(path, {"job": 12})
    counted: list[str] = []
    owner = Owner(lambda _: None)

    def readable(action: int, table: str | None, column: str | None, *_: object) -> int:
        unreadable = not counted and (action, table, column) == (sqlite3.SQLITE_READ, "events", "data")
        return sqlite3.SQLITE_DENY if unreadable else sqlite3.SQLITE_OK

    with contextlib.closing(open_log(path)) as log:
        async with delivering(log, owner, counted.append):
            log.conn.set_authorizer(readable)
            await owner.told()
            assert counted[0] == "failed"
