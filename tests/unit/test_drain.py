"""nullworker.consumer.drain with jobs in memory: leases, failures, a queue that is away, and what is given back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from simulated_time import simulated

from nullworker.consumer import Job, Lost, Reservation, drain, jobs

#: For what must not end by itself.
FOREVER = 1000.0


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


def now() -> float:
    return asyncio.get_running_loop().time()


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


@simulated
async def test_one_after_another_until_there_is_none() -> None:
    seen: list[Any] = []

    async def work(job: Any) -> None:
        seen.append(job)

    messages = [Message('{"id": 1}'), Message('{"id": 2}')]
    assert await run(*messages, work=work) == {"done": 2, "failed": 0}
    assert seen == [{"id": 1}, {"id": 2}]
    assert [message.story for message in messages] == [["done"], ["done"]]


@pytest.mark.parametrize("body", ["", "no JSON", "{", "[" * 100_000, b"\xff"])
@simulated
async def test_what_is_no_json_ends_in_the_failed_list_and_the_next_one_is_done(body: Any) -> None:
    bad, good = Message(body), Message()
    result = await run(bad, good)
    assert (result["done"], result["failed"], len(result["error"]) < 1100) == (1, 1, True)
    assert bad.story[0].startswith("failed: the message is not JSON")
    assert good.story == ["done"]


@simulated
async def test_what_the_work_raises_is_the_reason_of_the_failure() -> None:
    async def work(job: Any) -> None:
        job["url"]

    message = Message()
    assert (await run(message, work=work))["error"] == "KeyError: 'url'"
    assert message.story == ["failed: KeyError: 'url'"]


@simulated
async def test_failures_with_a_success_between_them_are_the_jobs_fault() -> None:
    async def work(job: Any) -> None:
        job["url"]

    nine_in_ten = [Message('{"url": 1}' if number % 10 == 9 else "{}") for number in range(40)]
    result = await run(*nine_in_ten, work=work)
    assert (result["done"], result["failed"]) == (4, 36)


@simulated
async def test_ten_failures_in_a_row_are_not_the_jobs_fault() -> None:
    async def work(job: Any) -> None:
        raise RuntimeError("no GPU")

    messages = [Message() for _ in range(12)]
    assert (await run(*messages, work=work))["failed"] == 10
    assert [len(message.story) for message in messages[-2:]] == [0, 0]


@simulated
async def test_no_job_begins_when_the_reservation_allows_none_any_more() -> None:
    assert (await run(Message(), Message(), Message(), held=Held(2)))["done"] == 2


@simulated
async def test_a_queue_that_is_away_is_asked_again() -> None:
    assert await run(ConnectionError("reset"), OSError("away"), Message()) == {"done": 1, "failed": 0}


@simulated
async def test_a_queue_that_stays_away_ends_the_reservation_in_words() -> None:
    times: list[float] = []

    async def take() -> Job | None:
        times.append(now())
        raise ConnectionError("reset")

    result = await drain(cast(Reservation, Held()), take, well)
    assert result == {"done": 0, "failed": 0, "error": "the queue cannot be read: ConnectionError: reset"}
    assert times[:7] == [0.0, 0.5, 1.5, 3.5, 7.5, 12.5, 17.5]
    assert jobs.AWAY_SECONDS <= times[-1] == now() <= jobs.AWAY_SECONDS + 5


@simulated
async def test_an_empty_queue_is_asked_again_while_idle_lasts() -> None:
    """After 1 s, doubling to 10 s; from a job on anew."""
    left: list[Job | None] = [None, None, Message(), *[None] * 10]
    times: list[float] = []

    async def take() -> Job | None:
        times.append(now())
        return left.pop(0)

    assert await drain(cast(Reservation, Held()), take, well, idle=40.0) == {"done": 1, "failed": 0}
    assert times == [0.0, 1.0, 3.0, *(3.0 + seconds for seconds in (0.0, 1.0, 3.0, 7.0, 15.0, 25.0, 35.0, 40.0))]


@simulated
async def test_a_lease_is_renewed_while_the_work_goes_on() -> None:
    async def work(_: Any) -> None:
        await asyncio.sleep(0.45)

    message = Message(lease=0.3)
    assert (await run(message, work=work))["done"] == 1
    await asyncio.sleep(10)
    assert message.story == [*["renew"] * 4, "done"], "and no longer"


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
    message = Message(lease=30.0)
    message.broken["renew"] = ConnectionError("reset")

    async def work(_: Any) -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            ended.set()

    result = await run(message, work=work)
    assert ended.is_set()
    assert now() == pytest.approx(0.9 * 30.0, abs=0.1)
    assert result["error"].startswith(
        "the job was lost to another consumer: its lease ran out and could not be renewed"
    )
    assert message.story == []


@simulated
async def test_a_lease_counts_from_the_last_renewal() -> None:
    message = Message(lease=30.0)

    async def work(_: Any) -> None:
        await asyncio.sleep(25)  # it was renewed after 10 s and 20 s
        message.broken["renew"] = ConnectionError("reset")
        await asyncio.sleep(FOREVER)

    assert "its lease ran out" in (await run(message, work=work))["error"]
    assert message.story == ["renew", "renew"]
    assert now() == pytest.approx(20 + 0.9 * 30, abs=0.1)


@simulated
async def test_a_renewal_that_hangs_cancels_the_work_when_the_lease_has_run_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Hangs(Message):
        async def renew(self) -> None:
            await asyncio.Event().wait()

    async def work(_: Any) -> None:
        await asyncio.sleep(FOREVER)

    assert "its lease ran out" in (await run(Hangs(lease=30.0), work=work))["error"]
    assert now() == pytest.approx(0.9 * 30, abs=0.1)
    assert [record.message.partition(":")[0] for record in caplog.records[:2]] == ["a lease was not renewed yet"] * 2


@simulated
async def test_a_lost_right_cancels_the_work_at_once_and_says_why() -> None:
    async def work(_: Any) -> None:
        claimed.is_lost.set()
        await asyncio.sleep(FOREVER)

    claimed = Message()
    result = await asyncio.wait_for(run(claimed, work=work), 10)
    assert result == {"done": 0, "failed": 1, "error": "the job was lost to another consumer: the channel is closed"}
    assert claimed.story == []


@simulated
async def test_a_renewal_that_finds_the_job_claimed_cancels_the_work() -> None:
    claimed = Message(lease=0.3)
    claimed.broken["renew"] = Lost("another consumer has claimed it")

    async def work(_: Any) -> None:
        await asyncio.sleep(FOREVER)

    result = await asyncio.wait_for(run(claimed, work=work), 10)
    assert result["error"] == "the job was lost to another consumer: another consumer has claimed it"
    assert claimed.story == []


@simulated
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
    result = await run(message)
    assert jobs.AWAY_SECONDS <= now() <= jobs.AWAY_SECONDS + 5
    assert "it could not be acknowledged: ConnectionError: reset" in result["error"]
    assert (result["done"], message.story) == (0, [])


@simulated
async def test_an_acknowledgement_that_hangs_is_tried_again() -> None:
    class Hangs(Message):
        async def done(self) -> None:
            if not self.story:
                self.story.append("hangs")
                await asyncio.Event().wait()
            await super().done()

    message = Hangs()
    assert await run(message) == {"done": 1, "failed": 0}
    assert message.story == ["hangs", "done"]
    assert now() == pytest.approx(jobs.CALL_SECONDS, abs=1)


@simulated
async def test_one_that_is_lost_before_it_is_acknowledged_is_not_done() -> None:
    message = Message()
    message.broken["done"] = Lost("another consumer has claimed it")
    assert await run(message) == {
        "done": 0,
        "failed": 1,
        "error": "the job was lost to another consumer: another consumer has claimed it",
    }


@simulated
async def test_one_that_waits_for_another_to_stop_begins_later() -> None:
    assert (await run(Message(wait=0.3)))["done"] == 1
    assert now() == 0.3


@simulated
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


@simulated
async def test_a_queue_that_does_not_take_a_job_back_does_not_hold_up_the_end() -> None:
    class Hangs(Message):
        async def give_back(self) -> None:
            await asyncio.Event().wait()

    async def work(_: Any) -> None:
        await asyncio.sleep(FOREVER)

    task = asyncio.ensure_future(run(Hangs(), work=work))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert (task.cancelled(), now()) == (True, 1 + jobs.GIVE_BACK_SECONDS)


@simulated
async def test_an_end_that_comes_while_lost_work_still_stops_is_heard() -> None:
    message, following, stopped = Message(), Message(), asyncio.Event()

    async def work(_: Any) -> None:
        message.is_lost.set()
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(5)
            stopped.set()

    task = asyncio.ensure_future(run(message, following, work=work))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert (task.cancelled(), stopped.is_set(), following.story) == (True, True, [])
