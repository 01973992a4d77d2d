"""Who is told of a session's end, and when, on a simulated clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nullworker.errors import LogUnavailable
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.session_callbacks import FIRST_TRIES_AT_ONCE, GIVE_UP_SECONDS, SETTLE_SECONDS, Callbacks
from stress.simulated_world import SimulatedClock, SimulatedLoop

#: Seconds that a call takes whose receiver hangs (outgoing.CALL_SECONDS).
HANGS = 10.0


class Owner:
    """A worker whose sessions end, and those who are told. `answers`: why a call fails, by route; None: it does not."""

    def __init__(self, path: Path, loop: SimulatedLoop) -> None:
        self.loop, self.clock = loop, SimulatedClock(loop)
        self.log: EventLog = open_log(path, sync="normal")
        self.service = Service(self.log, self.clock, Limits(), Readiness())
        self.calls: list[tuple[float, str]] = []
        self.answers: dict[str, str | None] = {}
        self.results = Counter[str]()
        self.under_way = self.most = 0
        self.callbacks = Callbacks(self.service, self.log, self.post, lambda result: self.results.update([result]))
        self.service.observers.append(self.callbacks.observe)

    async def post(self, route: str, _: dict[str, Any]) -> str | None:
        self.calls.append((self.loop.time(), route))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        trouble = self.answers.get(route)
        await asyncio.sleep(HANGS if trouble == "hangs" else 0.01)
        self.under_way -= 1
        return trouble

    def session(self, route: str) -> None:
        """One that is held and has ended."""
        terms = SessionTerms(60.0, on_close_route=route)
        held = self.service.claim(Claim("session", 60.0, session=terms))
        self.service.release(held.id, reason="session_end")

    def settled(self) -> list[tuple[str, str | None]]:
        return self.log.conn.execute("SELECT outcome, detail FROM settled WHERE name = 'callbacks'").fetchall()

    def times(self, route: str) -> list[float]:
        return [at for at, called in self.calls if called == route]

    def live(self, story: Callable[[], Awaitable[None]]) -> None:
        """Deliver while the story is told."""

        async def both() -> None:
            running = asyncio.ensure_future(self.callbacks.run())
            await story()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await asyncio.sleep(0)

        self.loop.run_until_complete(both())


@pytest.fixture
def owner(path: Path) -> Iterator[Owner]:
    loop = SimulatedLoop()
    owner = Owner(path, loop)
    with contextlib.closing(loop), contextlib.closing(owner.log):
        yield owner


def test_who_hangs_does_not_keep_others_waiting(owner: Owner) -> None:
    async def story() -> None:
        owner.answers["http://hangs/"] = "hangs"
        for _ in range(64):
            owner.session("http://hangs/")
        owner.session("http://honest/")
        await asyncio.sleep(1.0)
        assert owner.times("http://honest/") == [0.0]
        await asyncio.sleep(600.0)
        owner.session("http://honest/")
        await asyncio.sleep(1.0)
        assert owner.times("http://honest/")[1:] == [601.0], "those that are repeated wait in a lane of their own"

    owner.live(story)


def test_so_many_are_under_way_and_no_more(owner: Owner) -> None:
    async def story() -> None:
        owner.answers["http://hangs/"] = "hangs"
        for _ in range(FIRST_TRIES_AT_ONCE + 10):
            owner.session("http://hangs/")
        await asyncio.sleep(120.0)
        assert owner.most <= 98, "aiohttp would keep the hundredth waiting"

    owner.live(story)


def test_a_callback_is_tried_again_with_growing_pauses_until_it_is_taken(owner: Owner) -> None:
    async def story() -> None:
        owner.answers["http://down/"] = "down"
        owner.session("http://down/")
        await asyncio.sleep(20.0)
        assert [round(at) for at in owner.times("http://down/")] == [0, 1, 3, 7, 15]
        assert owner.settled() == []
        owner.answers["http://down/"] = None
        await asyncio.sleep(20.0)
        assert owner.settled() == [("delivered", None)]
        assert owner.results == {"failed": 5, "delivered": 1}
        await asyncio.sleep(1000.0)
        assert len(owner.times("http://down/")) == 6

    owner.live(story)


def test_a_callback_is_given_up_a_day_after_the_end(owner: Owner) -> None:
    async def story() -> None:
        owner.answers["http://down/"] = "down"
        owner.session("http://down/")
        await asyncio.sleep(GIVE_UP_SECONDS - 600.0)
        assert owner.settled() == []
        await asyncio.sleep(1200.0)
        assert owner.settled() == [("given_up", "down")]
        tries = len(owner.calls)
        assert 280 < tries < 310, "every five minutes"
        await asyncio.sleep(GIVE_UP_SECONDS)
        assert len(owner.calls) == tries
        assert owner.results["given_up"] == 1

    owner.live(story)


def test_what_was_delivered_is_settled_when_the_log_can_be_written_and_not_sent_again(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise LogUnavailable("the disk is full")

    async def story() -> None:
        owner.session("http://honest/")
        monkeypatch.setattr(owner.log, "settle", fails)
        await asyncio.sleep(1.0)
        assert owner.settled() == []
        monkeypatch.undo()
        await asyncio.sleep(SETTLE_SECONDS)
        assert owner.settled() == [("delivered", None)]
        assert len(owner.calls) == 1

    owner.live(story)


def test_an_end_that_waits_for_the_log_is_told_when_it_is_in_it(owner: Owner) -> None:
    async def story() -> None:
        terms = SessionTerms(60.0, on_close_route="http://honest/")
        held = owner.service.claim(Claim("session", 60.0, session=terms))
        owner.log.conn.execute("PRAGMA query_only = ON")
        owner.service.release(held.id, reason="session_end")
        await asyncio.sleep(3.0)
        assert owner.calls == []
        owner.log.conn.execute("PRAGMA query_only = OFF")
        owner.service.tick()
        await asyncio.sleep(3.0)
        assert len(owner.calls) == 1

    owner.live(story)
