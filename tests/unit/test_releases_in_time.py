"""How nullworker.consumer.reservations releases, with a simulated worker: with what, how often, and when too late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from simulated_time import simulated
from simulated_worker import NO_RESULT, URL, SimulatedWorker, first, held, now

from nullworker.consumer import Reservation, ResultRefused, reservations


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimulatedWorker:
    return SimulatedWorker(monkeypatch)


async def _nothing(_: Reservation) -> None:
    pass


async def _result(reservation: Reservation) -> None:
    reservation.result = {"pages": 3}


async def _failure(reservation: Reservation) -> None:
    reservation.result = "half of it"
    raise ValueError("no such page")


async def _stop(_: Reservation) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (_nothing, NO_RESULT),
        (_result, {"pages": 3}),
        (_failure, {"error": "ValueError: no such page"}),
        (_stop, {"error": "the consumer was stopped"}),
    ],
)
@simulated
async def test_what_the_caller_gets(
    worker: SimulatedWorker,
    caplog: pytest.LogCaptureFixture,
    body: Callable[[Reservation], Coroutine[Any, Any, None]],
    result: Any,
) -> None:
    with contextlib.suppress(ValueError, asyncio.CancelledError):
        async with await held(worker) as reservation:
            await body(reservation)
    assert (worker.ended["r1"]["state"], worker.ended["r1"]["result"]) == ("released", result)
    assert not caplog.messages


@simulated
async def test_a_release_whose_answer_is_lost_is_made_again_and_logged_once(
    worker: SimulatedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.lost_answers = 3
    async with await held(worker) as reservation:
        reservation.result = ("a tuple is", "a list in JSON")
    assert (reservation.released, reservation.gone_because) == (True, None)
    assert worker.times("POST /release") == [0.0, 0.5, 1.0, 1.5]
    assert caplog.messages == ["reservation r1 is not released yet: the connection broke"]


@simulated
async def test_a_worker_that_hears_no_release_for_five_seconds_hears_it_when_it_is_back(
    worker: SimulatedWorker,
) -> None:
    found = reservations(URL)
    worker.hold("r1")
    async with await first(found) as reservation:
        reservation.result = "done"
        worker.silent = True
    assert reservation.state == "owed"
    assert now() == pytest.approx(5.0, abs=0.6)
    following = asyncio.ensure_future(first(found))
    await asyncio.sleep(100)
    worker.silent = False
    assert (await worker.end_of("r1"))["result"] == "done"
    worker.hold("r2")
    assert ((await following).id, reservation.released) == ("r2", True)


@simulated
async def test_one_that_has_ended_while_nobody_heard_its_release_is_not_released_again(
    worker: SimulatedWorker,
) -> None:
    found = reservations(URL)
    worker.hold("r1")
    async with await first(found) as reservation:
        worker.silent = True
    worker.end("expired", "duration_elapsed")
    worker.hold("r2")
    worker.silent = False
    tries = len(worker.times("POST /release"))
    assert (await first(found)).id == "r2"
    assert len(worker.times("POST /release")) == tries
    assert not reservation.released


@simulated
async def test_a_stop_while_a_release_is_tried_is_heard_when_that_is_over(worker: SimulatedWorker) -> None:
    async def consumer() -> None:
        async for reservation in reservations(URL):
            async with reservation:
                worker.silent = True

    worker.hold("r1")
    task = asyncio.ensure_future(consumer())
    await asyncio.sleep(2)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert now() == pytest.approx(5.0, abs=0.6)


@simulated
async def test_a_stop_is_one_also_when_the_body_looks_for_itself_whether_it_is_gone(worker: SimulatedWorker) -> None:
    seen: list[int] = []

    async def consumer() -> None:
        async for reservation in reservations(URL, cancel=False):
            try:
                async with reservation:
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                # from Python 3.11 on cancellations are counted: this one is not over
                seen.append(getattr(asyncio.current_task(), "cancelling", lambda: 1)())
                raise

    worker.hold("r1")
    task = asyncio.ensure_future(consumer())
    await asyncio.sleep(1)
    worker.end("expired", "duration_elapsed")
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert (task.cancelled(), seen) == (True, [1])


@simulated
async def test_what_a_body_raises_that_is_gone_is_raised(worker: SimulatedWorker) -> None:
    reservation = await held(worker)
    with pytest.raises(ValueError, match="in the clean-up"):  # noqa: PT012
        async with reservation:
            worker.end("cancelled", "client_disconnect")
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("in the clean-up")


@pytest.mark.parametrize(
    ("known", "why"),
    [(True, "the reservation has ended: released, explicit"), (False, "there is no reservation r1")],
)
@simulated
async def test_a_release_that_comes_too_late_is_not_ours_and_is_logged(
    worker: SimulatedWorker, caplog: pytest.LogCaptureFixture, known: bool, why: str
) -> None:
    async with await held(worker) as reservation:
        worker.end("released", "explicit")
        if not known:
            worker.ended.clear()
    assert (reservation.released, reservation.gone_because) == (False, why)
    assert caplog.messages == [f"reservation r1 was not released: {why}"]


@simulated
async def test_a_reason_that_the_worker_does_not_know_is_refused_before_anything_is_taken(
    worker: SimulatedWorker,
) -> None:
    worker.hold("r1")
    with pytest.raises(ValueError, match="reason must be explicit or consumer_exit, not 'done'"):
        await first(reservations(URL, reason=cast(Any, "done")))
    assert (worker.asked, worker.connections) == ([], [])


@simulated
async def test_a_result_that_is_refused_is_replaced_by_the_reason(
    worker: SimulatedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = worker.answer

    async def once(method: str, path: str, body: Any) -> tuple[int, Any]:
        worker.refuses_results = (body or {}).get("result") == "too large"
        return await answer(method, path, body)

    reservation = await held(worker)
    monkeypatch.setattr(worker, "answer", once)
    with pytest.raises(ResultRefused, match="must be small"):
        async with reservation:
            reservation.result = "too large"
    assert worker.ended["r1"]["result"] == {"error": "must be small"}


@simulated
async def test_a_result_that_is_no_json_is_replaced_by_the_reason(worker: SimulatedWorker) -> None:
    reservation = await held(worker)
    with pytest.raises(ResultRefused, match="not JSON"):
        async with reservation:
            reservation.result = {1, 2}
    assert "the result is not JSON" in worker.ended["r1"]["result"]["error"]


@simulated
async def test_a_worker_that_refuses_even_the_reason_is_not_asked_for_ever(worker: SimulatedWorker) -> None:
    worker.refuses_results = True
    reservation = await held(worker)
    with pytest.raises(RuntimeError, match="must be small"):
        async with reservation:
            reservation.result = "too large"
    assert len(worker.times("POST /release")) == 2
