"""A claim from its opening to its end, at a worker that plays the contract: lost answers, silence, crashes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from contract_worker import ContractWorker
from programs import free_port

from nullworker.client import session
from nullworker.clock import SystemClock
from nullworker.dispatch import driver as driving
from nullworker.dispatch.book import Book
from nullworker.dispatch.claims import Claim
from nullworker.dispatch.decision import Counts
from nullworker.dispatch.driver import Driver, Terms
from nullworker.dispatch.ledger import open_ledger
from nullworker.dispatch.vast import Grant, Routed, Unreachable
from nullworker.errors import LogUnavailable

REQNUMS = itertools.count(1)
TERMS = Terms(lifetime=60.0, attach=0.0)


class Engine:
    """Names the workers that it is told to, in turn; the last one for ever."""

    def __init__(self, *urls: str) -> None:
        self.urls = list(urls)
        self.asked = self.looked = 0  # how often for a worker, and for the list of the instances
        self.idxs: list[int] = []  # of the requests for a worker
        self.down = False
        self.instances: frozenset[int] = frozenset()

    async def route(self, cost: float, request_idx: int) -> Routed:
        self.asked += 1
        self.idxs.append(request_idx)
        if self.down:
            raise Unreachable("the engine is down")
        if not self.urls:
            return Routed(None, 7)
        url = self.urls.pop(0) if len(self.urls) > 1 else self.urls[0]
        return Routed(Grant(url, {"url": url, "signature": "c2VjcmV0", "reqnum": next(REQNUMS), "cost": cost}), 7)

    async def running(self) -> frozenset[int]:
        self.looked += 1
        if self.down:
            raise Unreachable("the engine is down")
        return self.instances


class Life:
    """One life of a dispatcher over the ledger of a folder."""

    def __init__(self, folder: Path, engine: Engine, http: aiohttp.ClientSession, terms: Terms) -> None:
        self.ledger = open_ledger(folder / "ledger.db")
        self.clock = SystemClock()
        self.book = Book(self.ledger, self.clock)
        self.driver = Driver(self.book, self.ledger, self.clock, engine, http, terms, lambda: Counts(1, 0))
        for claim in self.book.claims.values():
            self.driver.start(claim)

    def open(self) -> Claim:
        claim = self.book.claim(Counts(1, 0), metadata={"for": "tests"})
        self.driver.start(claim)
        return claim

    async def stop(self) -> None:
        """As a kill: nothing is told to anybody."""
        await self.driver.stop()
        self.ledger.close()

    async def until(self, what: Callable[[], Any], seconds: float = 10.0) -> None:
        for _ in range(int(seconds / 0.02)):
            if what():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {self.rows()}")

    def state(self, claim: Claim) -> str:
        now = self.book.claims.get(claim.id)
        return "ended" if now is None else now.state

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.ledger.path)) as conn:
            conn.row_factory = sqlite3.Row
            return [dict(row) for row in conn.execute("SELECT * FROM claims")]


@pytest.fixture
async def worker() -> AsyncIterator[ContractWorker]:
    async with ContractWorker().serve() as served:
        yield served


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Life]]:
    lives: list[Life] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        def begin(engine: Engine, terms: Terms = TERMS) -> Life:
            lives.append(Life(tmp_path, engine, http, terms))
            return lives[-1]

        yield begin
        for life in lives:
            await life.stop()


async def test_a_claim_is_held_until_its_consumer_releases_it(worker: ContractWorker, start: Any) -> None:
    life = start(Engine(worker.url))
    claim = life.open()
    await life.until(lambda: life.state(claim) == "held" and worker.calls["/reserve"])
    assert worker.bodies[0]["payload"] == {"lifetime": 60.0, "metadata": {"for": "tests", "claim": claim.id}}
    worker.end("released", "consumer_exit", {"exit_code": 3})
    await life.until(lambda: life.state(claim) == "ended")
    (row,) = life.rows()
    assert (row["reason"], row["result"], row["held_seconds"]) == ("consumer_exit", '{"exit_code":3}', 60.0)
    assert row["session_id"] == "s1"
    assert row["url"] == worker.url


async def test_a_lost_answer_is_asked_for_again_with_the_same_body(worker: ContractWorker, start: Any) -> None:
    worker.lose = 3
    life = start(Engine(worker.url))
    claim = life.open()
    await life.until(lambda: life.state(claim) == "held")
    assert len(worker.bodies) == 4
    assert all(body == worker.bodies[0] for body in worker.bodies)
    assert life.rows()[0]["session_id"] == "s1"


async def test_a_dispatcher_killed_while_it_asks_goes_on_with_the_same_session(
    worker: ContractWorker, start: Any
) -> None:
    worker.lose = 10**6
    life = start(Engine(worker.url))
    claim = life.open()
    await life.until(lambda: worker.session is not None)
    assert life.state(claim) == "granted"
    await life.stop()
    worker.lose = 0
    life = start(Engine())
    await life.until(lambda: life.state(claim) == "held")
    assert [row["session_id"] for row in life.rows()] == ["s1"]


async def test_a_session_that_ended_while_no_dispatcher_ran_is_told_how_it_ended(
    worker: ContractWorker, start: Any
) -> None:
    for asked_before in (True, False):
        worker.lose = 0 if asked_before else 10**6
        life = start(Engine(worker.url))
        claim = life.open()
        await life.until(lambda: worker.session is not None)
        if asked_before:
            await life.until(lambda life=life, claim=claim: life.state(claim) == "held")
        await life.stop()
        worker.lose = 0
        worker.end("cancelled", "consumer_lost")
        life = start(Engine())
        await life.until(lambda life=life, claim=claim: life.state(claim) == "ended")
        assert [row["reason"] for row in life.rows()] == ["consumer_lost"] * len(life.rows())
        await life.stop()


async def test_a_granted_claim_that_is_refused_after_a_restart_has_ended(worker: ContractWorker, start: Any) -> None:
    life = start(Engine(worker.url))
    claim = life.book.claim(Counts(1, 0))
    life.book.granted(claim.id, worker.url, '{"auth_data": {"reqnum": 1}, "payload": {"lifetime": 9}}')
    await life.stop()
    worker.refuse = 503
    life = start(Engine())
    await life.until(lambda: life.state(claim) == "ended")
    (row,) = life.rows()
    assert (row["reason"], "answered 503" in row["why"]) == ("refused", True)
    assert life.ledger.credential(claim.id) is None


async def test_a_refused_claim_is_pending_again_and_asks_for_another_worker(worker: ContractWorker, start: Any) -> None:
    async with ContractWorker().serve() as taken:
        taken.refuse = 429
        life = start(Engine(taken.url, f"http://127.0.0.1:{free_port()}", worker.url))
        claim = life.open()
        await life.until(lambda: life.state(claim) == "held")
    (row,) = life.rows()
    assert (row["refusals"], row["url"]) == (2, worker.url)
    assert row["granted_at"] > row["opened_at"]


async def test_an_engine_that_is_down_is_waited_out(worker: ContractWorker, start: Any) -> None:
    engine = Engine(worker.url)
    engine.down = True
    life = start(engine)
    claim = life.open()
    await life.until(lambda: engine.asked >= 2)
    assert life.state(claim) == "pending"
    engine.down = False
    await life.until(lambda: life.state(claim) == "held")


async def test_a_pending_claim_that_is_given_up_reaches_no_worker(start: Any) -> None:
    engine = Engine()
    life = start(engine)
    claim = life.open()
    await life.until(lambda: engine.asked)
    life.book.ended(claim.id, "not_needed")
    life.driver.abandon(claim)
    await life.driver.idle()
    assert life.rows()[0]["reason"] == "not_needed"


async def test_a_session_is_renewed_at_a_third_of_the_lifetime_that_the_worker_allows(start: Any) -> None:
    async with ContractWorker(lifetime_cap=0.6).serve() as worker:
        life = start(Engine(worker.url))
        claim = life.open()
        await life.until(lambda: worker.calls["/ping"] >= 6)
        assert life.state(claim) == "held"
        assert life.ledger.renewed_at(claim.id) is not None


async def test_a_session_to_which_no_consumer_attaches_is_not_renewed(worker: ContractWorker, start: Any) -> None:
    life = start(Engine(worker.url), Terms(lifetime=0.9, attach=0.5))
    claim = life.open()
    await life.until(lambda: life.state(claim) == "ended")
    (row,) = life.rows()
    assert (row["reason"], row["attached_at"]) == ("duration_elapsed", None)
    assert worker.calls["/ping"] <= 2


async def test_a_session_to_which_a_consumer_has_attached_is_renewed_also_after_a_restart(
    worker: ContractWorker, start: Any
) -> None:
    terms = Terms(lifetime=0.9, attach=0.5)
    life = start(Engine(worker.url), terms)
    claim = life.open()
    await life.until(lambda: worker.calls["/reserve"])
    worker.attach()
    await life.until(lambda: life.book.claims[claim.id].attached_at)
    await life.stop()
    life = start(Engine(), terms)
    pings = worker.calls["/ping"]
    await life.until(lambda: worker.calls["/ping"] >= pings + 4)
    assert life.state(claim) == "held"


async def test_a_worker_that_falls_silent_without_a_consumer_is_lost_a_lifetime_after_the_last_renewal(
    worker: ContractWorker, start: Any
) -> None:
    life = start(Engine(worker.url), Terms(lifetime=1.2, attach=0.0))
    claim = life.open()
    await life.until(lambda: life.ledger.renewed_at(claim.id))
    worker.cut()
    await life.until(lambda: life.state(claim) == "ended")
    (row,) = life.rows()
    assert row["reason"] == "lost"
    assert 1.2 <= row["held_seconds"] <= 3.0


async def test_a_silent_worker_with_a_consumer_stays_held_until_it_answers_or_is_gone(
    worker: ContractWorker, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SILENT_SECONDS", 0.2)
    engine = Engine(worker.url)
    engine.instances = frozenset((17, 18))
    life = start(engine, Terms(lifetime=0.9, attach=0.0))
    claim = life.open()
    await life.until(lambda: worker.calls["/reserve"])
    worker.attach()
    await life.until(lambda: life.book.claims[claim.id].attached_at)
    life.book.priced(claim.id, 0.4, 17)
    worker.cut()
    await life.until(lambda: claim.id in life.driver.silent)
    looked = engine.looked
    await life.until(lambda: engine.looked >= looked + 2)
    assert life.state(claim) == "held"
    worker.silent = False
    await life.until(lambda: claim.id not in life.driver.silent)
    worker.cut()
    await life.until(lambda: claim.id in life.driver.silent)
    engine.instances = frozenset((18,))
    await life.until(lambda: life.state(claim) == "ended")
    assert life.rows()[0]["reason"] == "gone"


@pytest.mark.parametrize("state", ["granted", "held"])
async def test_what_is_told_to_end_ends_with_the_reason_of_who_told_it(
    worker: ContractWorker, start: Any, state: str
) -> None:
    worker.lose = 0 if state == "held" else 10**6
    life = start(Engine(worker.url))
    claim = life.open()
    await life.until(lambda: life.state(claim) == state)
    life.driver.end(claim, "end_all")
    worker.lose = 0
    await life.until(lambda: life.state(claim) == "ended")
    (row,) = life.rows()
    assert (row["reason"], worker.session) == ("end_all", None)
    assert '"session_end"' in row["final_status"]


async def test_no_worker_is_asked_while_the_ledger_cannot_be_written(
    worker: ContractWorker, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "POLL_SECONDS", 0.1)
    engine = Engine(worker.url)
    life = start(engine)
    claim = life.book.claim(Counts(1, 0))
    append, tries = life.ledger.append, []

    def full(*_: Any) -> None:
        tries.append(claim)
        raise LogUnavailable("the disk is full")

    monkeypatch.setattr(life.ledger, "append", full)
    life.driver.start(claim)
    await life.until(lambda: len(tries) >= 3)
    assert (life.state(claim), worker.bodies) == ("pending", [])
    assert engine.idxs[:3] == [0, 7, 7]  # one request for one claim
    monkeypatch.setattr(life.ledger, "append", append)
    await life.until(lambda: life.state(claim) == "held")


async def test_what_happens_while_the_ledger_cannot_be_written_is_written_later(
    worker: ContractWorker, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = start(Engine(worker.url))
    claim = life.open()
    await life.until(lambda: worker.calls["/reserve"])
    append = life.ledger.append

    def full(*_: Any) -> None:
        raise LogUnavailable("the disk is full")

    monkeypatch.setattr(life.ledger, "append", full)
    worker.end("released", "explicit")
    await life.until(lambda: life.state(claim) == "ended")
    assert [row["state"] for row in life.rows()] == ["held"]
    monkeypatch.setattr(life.ledger, "append", append)
    life.book.write()
    assert [row["reason"] for row in life.rows()] == ["explicit"]
