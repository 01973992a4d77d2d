"""nullworker.consumer.drain with jobs in memory: leases, failures, a queue that is away, and what is given back."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import pytest

from nullworker.consumer import Job, Lost, Reservation, drain, jobs
from stress.simulated_world import SimulatedLoop

#: For what must not end by itself.
FOREVER = 1000.0


def simulated(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop whose time passes at once when nobody has anything to do."""

    def run_it() -> None:
        with contextlib.closing(SimulatedLoop()) as loop:
            loop.run_until_complete(test())

    return run_it


class Message(Job):
    """A job that writes down what becomes of it, and whose calls fail as long as their names are in `broken`."""

    def __init__(self, body: str = "{}", *, lease: float = math.inf, wait: float = 0.0) -> None:
        self.body, self.lease, self.wait = body, lease, wait
        self.story: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.is_lost = asyncio.Event()

    async def done(self) -> None:
        self._call("done")

    async def failed(self, why: str) -> None:
        self._call("failed", why)

    async def give_back(self) -> None:
        self._call("give_back")

    async def renew(self) -> None:
        self._call("renew")

    async def lost(self) -> str:
        await self.is_lost.wait()
        return "the channel is closed"

    def _call(self, name: str, *more: str) -> None:
        if name in self.broken:
            raise self.broken[name]
        self.story.append(": ".join((name, *more)))


class Held:
    """A reservation that lets jobs begin for so long."""

    def __init__(self, jobs: float = math.inf) -> None:
        self.jobs = jobs

    def may_begin(self) -> bool:
        self.jobs -= 1
        return self.jobs >= 0


Work = Callable[[Any], Awaitable[object]]


async def well(_: Any) -> None:
    """Work that takes no time."""


async def run(*queue: Any, work: Work = well, idle: float = 0.0, held: Held | None = None) -> dict[str, Any]:
    """Drain a queue: messages, None for nothing yet, exceptions for a queue that is away."""
    left = list(queue)

    async def take() -> Job | None:
        following = left.pop(0) if left else None
        if isinstance(following, Exception):
            raise following
        return cast("Job | None", following)

    return await drain(cast(Reservation, held or Held()), take, work, idle=idle)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes half a second between two tries takes a hundredth."""
    monkeypatch.setattr(jobs, "FIRST_RETRY_SECONDS", 0.01)


async def test_one_after_another_until_there_is_none() -> None:
    seen: list[Any] = []

    async def work(job: Any) -> None:
        seen.append(job)

    messages = [Message('{"id": 1}'), Message('{"id": 2}')]
    assert await run(*messages, work=work) == {"done": 2, "failed": 0}
    assert seen == [{"id": 1}, {"id": 2}]
    assert [message.story for message in messages] == [["done"], ["done"]]


@pytest.mark.parametrize("body", ["", "no JSON", "{", "[" * 100_000, b"\xff"])
async def test_what_is_no_json_ends_in_the_failed_list_and_the_next_one_is_done(body: Any) -> None:
    bad, good = Message(body), Message()
    result = await run(bad, good)
    assert (result["done"], result["failed"], len(result["error"]) < 1100) == (1, 1, True)
    assert bad.story[0].startswith("failed: the message is not JSON")
    assert good.story == ["done"]


async def test_what_the_work_raises_is_the_reason_of_the_failure() -> None:
    async def work(job: Any) -> None:
        job["url"]

    message = Message()
    assert (await run(message, work=work))["error"] == "KeyError: 'url'"
    assert message.story == ["failed: KeyError: 'url'"]


async def test_ten_failures_in_a_row_are_not_the_jobs_fault() -> None:
    async def work(job: Any) -> None:
        raise RuntimeError("no GPU")

    messages = [Message() for _ in range(12)]
    assert (await run(*messages, work=work))["failed"] == 10
    assert [len(message.story) for message in messages[-2:]] == [0, 0]


async def test_no_job_begins_when_the_reservation_allows_none_any_more() -> None:
    assert (await run(Message(), Message(), Message(), held=Held(2)))["done"] == 2


async def test_a_queue_that_is_away_is_asked_again() -> None:
    assert await run(ConnectionError("reset"), OSError("away"), Message()) == {"done": 1, "failed": 0}


async def test_a_queue_that_stays_away_ends_the_reservation_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "AWAY_SECONDS", 0.0)
    result = await run(ConnectionError("reset"), Message())
    assert result == {"done": 0, "failed": 0, "error": "the queue cannot be read: ConnectionError: reset"}


@simulated
async def test_an_empty_queue_is_asked_again_while_idle_lasts() -> None:
    assert await run(None, Message(), idle=1.5) == {"done": 1, "failed": 0}


@simulated
async def test_a_lease_is_renewed_while_the_work_goes_on() -> None:
    async def work(_: Any) -> None:
        await asyncio.sleep(0.5)

    message = Message(lease=0.3)
    assert (await run(message, work=work))["done"] == 1
    assert message.story.count("renew") >= 3


@simulated
async def test_a_renewal_that_fails_for_a_while_costs_nothing() -> None:
    message = Message(lease=3.0)
    message.broken["renew"] = ConnectionError("reset")

    async def work(_: Any) -> None:
        await asyncio.sleep(1.3)
        message.broken.clear()
        await asyncio.sleep(1.2)

    assert await run(message, work=work) == {"done": 1, "failed": 0}
    assert "renew" in message.story


@simulated
async def test_a_lease_that_has_run_out_cancels_the_work() -> None:
    ended = asyncio.Event()
    began = asyncio.get_running_loop().time()
    message = Message(lease=30.0)
    message.broken["renew"] = ConnectionError("reset")

    async def work(_: Any) -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            ended.set()

    result = await run(message, work=work)
    assert ended.is_set()
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.9 * 30.0, abs=0.1)
    assert result["error"].startswith(
        "the job was lost to another consumer: its lease ran out and could not be renewed"
    )
    assert message.story == []


async def test_a_lost_right_cancels_the_work_at_once_and_says_why() -> None:
    async def work(_: Any) -> None:
        claimed.is_lost.set()
        await asyncio.sleep(FOREVER)

    claimed = Message()
    result = await asyncio.wait_for(run(claimed, work=work), 10)
    assert result == {"done": 0, "failed": 1, "error": "the job was lost to another consumer: the channel is closed"}
    assert claimed.story == []


async def test_a_renewal_that_finds_the_job_claimed_cancels_the_work() -> None:
    claimed = Message(lease=0.3)
    claimed.broken["renew"] = Lost("another consumer has claimed it")

    async def work(_: Any) -> None:
        await asyncio.sleep(FOREVER)

    result = await asyncio.wait_for(run(claimed, work=work), 10)
    assert result["error"] == "the job was lost to another consumer: another consumer has claimed it"
    assert claimed.story == []


async def test_an_acknowledgement_that_fails_is_tried_again() -> None:
    message = Message(lease=FOREVER)
    message.broken["done"] = ConnectionError("reset")
    asyncio.get_running_loop().call_later(0.2, message.broken.clear)
    assert await run(message) == {"done": 1, "failed": 0}
    assert message.story == ["done"]


@simulated
async def test_an_acknowledgement_that_fails_for_too_long_is_given_up_in_words() -> None:
    message = Message(lease=FOREVER)
    message.broken["done"] = ConnectionError("reset")
    began = asyncio.get_running_loop().time()
    result = await run(message)
    assert asyncio.get_running_loop().time() - began >= jobs.AWAY_SECONDS
    assert "it could not be acknowledged: ConnectionError: reset" in result["error"]
    assert (result["done"], message.story) == (0, [])


async def test_one_that_waits_for_another_to_stop_begins_later() -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert (await run(Message(wait=0.3)))["done"] == 1
    assert loop.time() - begun >= 0.29


async def test_a_job_whose_reservation_is_gone_is_given_back() -> None:
    message, inside = Message(), asyncio.Event()

    async def work(_: Any) -> None:
        inside.set()
        await asyncio.sleep(FOREVER)

    task = asyncio.ensure_future(run(message, work=work))
    await asyncio.wait_for(inside.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert message.story == ["give_back"]
