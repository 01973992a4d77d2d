"""nullworker.consumer.reservations with a simulated worker: how long it waits, for what, and what it says of that."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Any

import pytest
from simulated_time import simulated
from simulated_worker import URL, SimulatedWorker, first, held, now

from nullworker.consumer import current, reservations
from stress.simulated_world import BEGINNING


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimulatedWorker:
    return SimulatedWorker(monkeypatch)


def epoch(iso: str) -> float:
    return datetime.fromisoformat(iso.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()


# -- waiting for one ------------------------------------------------------------------------------------------------


@simulated
async def test_one_that_is_held_after_several_long_polls_is_taken(worker: SimulatedWorker) -> None:
    found = asyncio.ensure_future(first(reservations(URL)))
    await asyncio.sleep(100)
    assert len(worker.times("GET /reservation?wait=30")) == 4
    worker.hold("r1", metadata={"job": 1})
    reservation = await found
    assert (reservation.id, reservation.metadata) == ("r1", {"job": 1})
    assert now() == pytest.approx(100, abs=0.2)


@simulated
async def test_a_worker_that_is_away_is_logged_once_and_at_once_when_it_is_back(
    worker: SimulatedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.silent = True
    found = asyncio.ensure_future(first(reservations(URL)))
    await asyncio.sleep(100)
    assert caplog.messages == ["no worker answers on the simulated machine; trying again"]
    assert len(worker.asked) == pytest.approx(200, abs=2), "twice a second"
    worker.silent = False
    await asyncio.sleep(1)  # although it holds nothing
    assert caplog.messages[1:] == [f"the worker on {URL} answers again"]
    worker.hold("r1")
    await found
    assert len(caplog.messages) == 2


@simulated
async def test_one_that_ends_before_it_is_attached_to_is_passed_over(worker: SimulatedWorker) -> None:
    worker.attachment = "over"
    worker.hold("r1")
    found = asyncio.ensure_future(first(reservations(URL)))
    await asyncio.sleep(1)
    assert worker.connections[0].closed
    worker.attachment = "attached"
    worker.hold("r2")
    assert (await found).id == "r2"


@simulated
async def test_the_place_of_another_consumer_is_waited_for_and_logged_once(
    worker: SimulatedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.attachment = "connecting"
    worker.hold("r1")
    found = asyncio.ensure_future(first(reservations(URL)))
    await asyncio.sleep(20)
    assert not caplog.messages
    (connection,) = worker.connections
    connection.become("taken")
    await asyncio.sleep(60)
    assert caplog.messages == ["another consumer is attached to reservation r1: waiting until it has ended"]
    assert not found.done()
    connection.become("attached")
    began = now()
    assert ((await found).id, now()) == ("r1", began)


@pytest.mark.parametrize(("arguments", "extend"), [({}, "1"), ({"extend": True}, "all")])
@simulated
async def test_requests_are_extended_only_when_asked_for(worker: SimulatedWorker, arguments: Any, extend: str) -> None:
    worker.hold("r1")
    await first(reservations(URL, **arguments))
    assert [connection.extend for connection in worker.connections] == [extend]


# -- while the body runs --------------------------------------------------------------------------------------------


@simulated
async def test_an_attached_body_may_take_as_long_as_it_likes(worker: SimulatedWorker) -> None:
    async with await held(worker) as reservation:
        await asyncio.sleep(500)
    assert (reservation.released, worker.ended["r1"]["reason"]) == (True, "explicit")
    assert reservation.metadata == {}, "as there are none"


@simulated
async def test_the_place_may_seem_taken_for_three_seconds_and_is_lost_after_them(worker: SimulatedWorker) -> None:
    async with await held(worker) as reservation:
        for _ in range(4):
            await asyncio.sleep(4.5)  # so that the last poll is long ago
            worker.connections[0].become("taken")
            await asyncio.sleep(2.9)
            worker.connections[0].become("attached")
        began = now()
        worker.connections[0].become("taken")
        await asyncio.Event().wait()
    assert reservation.gone_because == "another consumer has attached to it"
    assert 3 < now() - began < 8.1, "seen at the next poll"


@simulated
async def test_one_that_another_consumer_has_taken_is_taken_again_when_that_is_gone(worker: SimulatedWorker) -> None:
    found = reservations(URL)
    worker.hold("r1")
    async with await first(found):
        worker.connections[0].become("taken")
        await asyncio.Event().wait()
    worker.attachment = "taken"
    again = asyncio.ensure_future(first(found))
    await asyncio.sleep(60)
    assert not again.done()
    worker.connections[-1].become("attached")
    async with await again as reservation:
        assert reservation.id == "r1"
    assert reservation.released


@pytest.mark.parametrize(
    ("kind", "seconds", "patience", "gone_after"),
    [("session", 10, {}, 30), ("request", 10, {}, 10), ("request", 600, {}, 30), ("session", 600, {"patience": 2}, 2)],
)
@simulated
async def test_a_silent_worker_is_waited_for_as_long_as_it_may_come_back_with_the_reservation(
    worker: SimulatedWorker, kind: str, seconds: float, patience: Any, gone_after: float
) -> None:
    worker.hold("r1", kind=kind, seconds=seconds)
    async with await first(reservations(URL, **patience)) as reservation:
        await asyncio.sleep(0)  # it is asked for once
        worker.silent = True
        worker.connections[0].become("connecting")
        await asyncio.Event().wait()
    assert reservation.gone_because == "the worker is gone: no worker answers on the simulated machine"
    assert gone_after < now() <= gone_after + 0.6


@simulated
async def test_a_worker_that_is_back_in_time_is_the_same_again(worker: SimulatedWorker) -> None:
    async with await held(worker) as reservation:
        for _ in range(3):
            worker.silent = True
            await asyncio.sleep(29)
            worker.silent = False
            await asyncio.sleep(6)
    assert reservation.released


@simulated
async def test_a_worker_that_takes_the_question_and_never_answers_is_gone_too(
    worker: SimulatedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> Any:
        await asyncio.Event().wait()

    async with await held(worker) as reservation:
        monkeypatch.setattr(worker, "answer", hang)
        await asyncio.Event().wait()
    assert reservation.gone_because == f"the worker is gone: no answer from {URL}"
    assert 30 < now() <= 40


@simulated
async def test_what_makes_no_sense_is_heard_when_the_body_ends(worker: SimulatedWorker) -> None:
    reservation = await held(worker)
    assert worker.held is not None
    with pytest.raises(KeyError, match="ends_at"):  # noqa: PT012
        async with reservation:
            del worker.held["ends_at"]
            await asyncio.sleep(10)


@simulated
async def test_a_deadline_that_others_move_is_noted(worker: SimulatedWorker) -> None:
    async with await held(worker, seconds=60) as reservation:
        await asyncio.sleep(10)
        assert reservation.seconds_left() == pytest.approx(50)
        await worker.answer("POST", "/extend", {"reservation_id": "r1", "seconds": 500})
        await asyncio.sleep(6)
        assert reservation.seconds_left() == pytest.approx(494)
        assert epoch(reservation.ends_at) == BEGINNING + 510


@simulated
async def test_it_is_extended_by_itself_until_it_has_ended(worker: SimulatedWorker) -> None:
    worker.hold("r1", seconds=60)
    async with await first(reservations(URL, cancel=False)) as reservation:
        await asyncio.sleep(20)
        assert await reservation.extend(100)
        ends_at = reservation.ends_at
        assert epoch(ends_at) == BEGINNING + 120
        assert reservation.seconds_left() == pytest.approx(100)
        worker.silent = True
        assert await reservation.extend(1000) is False
        worker.silent = False
        worker.end("expired", "duration_elapsed")
        assert await reservation.extend(1000) is False
    assert reservation.ends_at == ends_at
    assert reservation.seconds_left() == pytest.approx(100)


@simulated
async def test_another_job_may_begin_in_the_first_half_of_the_longest_hold(worker: SimulatedWorker) -> None:
    worker.max_hold = 100.0
    worker.hold("r1")
    await asyncio.sleep(20)  # it has been held for so long when the consumer comes
    async with await first(reservations(URL)) as reservation:
        await asyncio.sleep(29)
        assert reservation.may_begin() is True
        await asyncio.sleep(2)
        assert reservation.may_begin() is False


@simulated
async def test_another_job_may_begin_at_any_time_of_an_endless_hold_but_not_when_it_has_ended(
    worker: SimulatedWorker,
) -> None:
    worker.hold("r1")
    async with await first(reservations(URL, cancel=False)) as reservation:
        await asyncio.sleep(10_000)
        assert reservation.may_begin() is True
        current.stopping.set()
        try:
            assert reservation.may_begin() is False
        finally:
            current.stopping.clear()
        worker.end("released", "explicit")
        await reservation.gone.wait()
        assert reservation.may_begin() is False


@simulated
async def test_what_a_stop_from_another_thread_would_release_is_what_is_held(worker: SimulatedWorker) -> None:
    for reservation_id in ("r1", "r2"):
        worker.hold(reservation_id)
        async with await first(reservations(URL, cancel=False)) as reservation:
            assert current.held() == [(URL, reservation_id)]
            if reservation_id == "r2":
                worker.end("expired", "duration_elapsed")
                await reservation.gone.wait()
                assert current.held() == []
        assert current.held() == []


@simulated
async def test_a_job_that_runs_on_after_its_reservation_is_overdue_after_a_quarter_of_a_minute(
    worker: SimulatedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current, "stopwatch", now)
    worker.hold("r1")
    async with await first(reservations(URL, cancel=False)) as reservation:
        await asyncio.sleep(100)
        assert current.overdue() is None
        worker.end("expired", "duration_elapsed")
        await reservation.gone.wait()
        await asyncio.sleep(14.9)
        assert current.overdue() is None
        await asyncio.sleep(0.2)
        assert current.overdue() == "the job of reservation r1, which ended 15 s ago, still runs"
    assert current.overdue() is None
