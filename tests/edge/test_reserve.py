"""POST /reserve of a real worker: each end of a reservation as its caller, log, metrics and autoscaler see it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from claims import data_of, reserve
from harness import WorkerProcess, post, secured, signed

from nullworker.testing import FakeAutoscaler

HEADER = "Nullworker-Reservation"
QUEUED, HELD = ("queued", None), ("held", None)


async def ended(worker: WorkerProcess, state: str, reason: str) -> float:
    return await worker.metric("nullworker_reservations_total", kind="request", state=state, reason=reason)


async def answered(worker: WorkerProcess, status: int) -> float:
    return await worker.metric("nullworker_http_requests_total", port="external", route="/reserve", status=str(status))


async def test_a_claim_is_held_until_its_release(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    claim = await reserve(worker, vast)
    held = await worker.get("/reservation")
    assert (held["id"], held["state"], held["duration_cap"]) == (claim.id, "held", 3600)
    assert await worker.metric("nullworker_reservations", state="held") == 1
    assert await worker.release() == {"released": True}
    answer = await claim.answer()
    assert (answer.status, answer.headers[HEADER], answer.headers["Nullworker-Instance"]) == (200, claim.id, "7")
    assert answer.headers["Content-Type"].startswith("application/json")
    seconds = {name: answer.body.pop(name) for name in ("queued_seconds", "held_seconds")}
    assert answer.body == {"released": "explicit", "duration_cap": 3600, "reservation_id": claim.id}
    assert seconds["queued_seconds"] == 0
    assert seconds["held_seconds"] >= 0
    assert worker.story() == [QUEUED, HELD, ("released", "explicit")]
    assert await claim.outcome() == "Success"
    assert (await ended(worker, "released", "explicit"), await answered(worker, 200)) == (1, 1)
    assert await worker.metric("nullworker_hold_seconds_count") == 1
    assert await worker.metric("nullworker_reservations", state="held") == 0


@pytest.mark.parametrize(
    ("cap", "asked", "held"), [("3600", (0.05,), 0.05), ("0.05", (3600, None, 1e308), 0.05), ("3600", (0,), 0)]
)
async def test_a_duration_that_passes_ends_it_with_exactly_two_keys(
    tmp_path: Path, vast: FakeAutoscaler, cap: str, asked: tuple[float | None, ...], held: float
) -> None:
    async with secured(tmp_path, vast, MAX_RESERVATION_SECONDS=cap) as worker:
        await worker.line("key_loaded")
        claims = []
        for duration in asked:
            claims.append(claim := await reserve(worker, vast, duration=duration))
            answer = await claim.answer()
            assert (answer.status, answer.body) == (200, {"released": "duration_elapsed", "duration": held})
            assert answer.headers[HEADER] == claim.id
        assert worker.story() == [QUEUED, HELD, ("expired", "duration_elapsed")] * len(asked)
        assert [await claim.outcome() for claim in claims] == ["Success"] * len(asked)
        assert await ended(worker, "expired", "duration_elapsed") == len(asked)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"NULL_MAX_QUEUE_SECONDS": "0.1"}, "queue_timeout"),
        ({"NULL_MAX_QUEUE_SECONDS": "0"}, "queue_timeout"),
        ({"NULL_MAX_QUEUED": "0"}, "queue_full"),
    ],
)
async def test_a_queue_timeout_gets_429(tmp_path: Path, vast: FakeAutoscaler, env: dict[str, Any], reason: str) -> None:
    async with secured(tmp_path, vast, **env) as worker:
        await worker.line("key_loaded")
        await reserve(worker, vast)
        claim = await reserve(worker, vast)
        answer = await claim.answer()
        assert (answer.status, answer.headers[HEADER]) == (429, claim.id)
        assert int(answer.headers["Retry-After"]) > 0
        assert set(answer.body) == {"error", "reservation_id", "reason"}
        assert (answer.body["reservation_id"], answer.body["reason"]) == (claim.id, reason)
        assert worker.story() == [QUEUED, HELD, QUEUED, ("expired", reason)]
        assert await claim.outcome() == "Rejected"
        assert (await ended(worker, "expired", reason), await answered(worker, 429)) == (1, 1)


async def test_a_queue_has_exactly_as_many_places_as_it_should(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, NULL_MAX_QUEUED="2") as worker:
        await worker.line("key_loaded")
        claims = [await reserve(worker, vast) for _ in range(4)]
        assert (await claims[3].answer()).body["reason"] == "queue_full"
        assert await worker.metric("nullworker_reservations", state="queued") == 2
        for claim in claims[:3]:
            assert (await worker.release(reservation_id=claim.id))["released"] is True
            assert (await claim.answer()).status == 200


async def test_first_come_first_served_each_as_soon_as_the_one_before_has_ended(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    claims = [await reserve(worker, vast) for _ in range(25)]
    for claim in claims:
        assert await worker.release() == {"released": True}
        assert (await claim.answer()).body["reservation_id"] == claim.id
    pairs = [HELD if n % 2 else ("released", "explicit") for n in range(49)]
    assert worker.story() == [QUEUED, HELD, *[QUEUED] * 24, *pairs]
    order = [row[0] for row in worker.sql("SELECT reservation_id FROM events WHERE kind = 'held' ORDER BY seq")]
    assert order == [claim.id for claim in claims]
    await vast.wait_for(lambda: len(vast.outcomes) == 25)
    assert [outcome["request_idx"] for outcome in vast.outcomes] == [claim.idx for claim in claims]
    assert {outcome["status"] for outcome in vast.outcomes} == {"Success"}


@pytest.mark.parametrize("stream", [False, True])
async def test_who_hangs_up_while_queued_leaves_the_queue(
    worker: WorkerProcess, vast: FakeAutoscaler, stream: bool
) -> None:
    first, gone, last = [await reserve(worker, vast, stream=stream) for _ in range(3)]
    await gone.hang_up()
    await worker.release(reservation_id=first.id)
    await last.held()
    rows = worker.sql("SELECT kind, reason FROM events WHERE reservation_id = ? ORDER BY seq", gone.id)
    assert rows == [QUEUED, ("cancelled", "client_disconnect")]
    assert await gone.outcome() == "Cancelled"
    assert (await ended(worker, "cancelled", "client_disconnect"), await answered(worker, 499)) == (1, 1)
    assert (await worker.line("reservation_cancelled"))["status"] == 499


@pytest.mark.parametrize("stream", [False, True])
async def test_who_hangs_up_while_held_frees_the_slot_for_the_next(
    worker: WorkerProcess, vast: FakeAutoscaler, stream: bool
) -> None:
    gone, last = [await reserve(worker, vast, stream=stream) for _ in range(2)]
    await gone.hang_up()
    await last.held()
    assert worker.story() == [QUEUED, HELD, QUEUED, ("cancelled", "client_disconnect"), HELD]
    assert await gone.outcome() == "Cancelled"
    assert (await ended(worker, "cancelled", "client_disconnect"), await answered(worker, 499)) == (1, 1)
    assert (await worker.line("reservation_cancelled"))["status"] == 499


async def test_metadata_reach_the_consumer_and_its_result_reaches_the_caller(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    metadata, result = {"job": 12, "text": "größer ✓"}, {"rows": [1, None, "x"]}
    claim = await reserve(worker, vast, metadata=metadata)
    assert (await worker.get("/reservation"))["metadata"] == metadata
    assert await worker.release(result=result) == {"released": True, "reservation_id": claim.id}
    assert (await claim.answer()).body["result"] == result
    (kept,) = (await worker.get("/reservations"))["reservations"]
    assert (kept["metadata"], kept["result"], kept["request_idx"]) == (metadata, result, claim.idx)


async def test_falsy_results_are_returned_as_results(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    results: list[Any] = [None, 0, False, "", [], {}]
    for result in results:
        claim = await reserve(worker, vast)
        await worker.release(result=result)
        body = (await claim.answer()).body
        assert "result" in body
        assert body["result"] == result


async def test_unknown_fields_are_ignored_and_absent_ones_may_be_null(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    claim = await reserve(worker, vast, duration=0, metadata=None, stream=None, priority="high")
    assert (await claim.answer()).status == 200


async def test_a_stream_tells_each_event_and_ends_with_the_plain_answer(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    before = await reserve(worker, vast)
    claim = await reserve(worker, vast, stream=True)
    await worker.release(reservation_id=before.id)
    await claim.held()
    await worker.release(reservation_id=claim.id, result=3)
    answer = await claim.answer()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
    assert (answer.headers[HEADER], answer.headers["Nullworker-Instance"]) == (claim.id, "7")
    *events, last = [json.loads(data) for data in data_of(answer.body)]
    assert [event["kind"] for event in events] == ["queued", "held", "released"]
    assert {event["reservation_id"] for event in events} == {claim.id}
    assert set(last) == {"released", "duration_cap", "reservation_id", "queued_seconds", "held_seconds", "result"}
    assert (last["released"], last["reservation_id"], last["result"]) == ("explicit", claim.id, 3)
    assert await claim.outcome() == "Success"


@pytest.mark.parametrize("duration", [0.05, 0])
async def test_a_stream_whose_time_passes_ends_with_exactly_two_keys(
    worker: WorkerProcess, vast: FakeAutoscaler, duration: float
) -> None:
    claim = await reserve(worker, vast, stream=True, duration=duration)
    answer = await claim.answer()
    assert answer.headers["Content-Type"] == "text/event-stream"
    *events, last = [json.loads(data) for data in data_of(answer.body)]
    assert [event["kind"] for event in events] == ["queued", "held", "expired"]
    assert last == {"released": "duration_elapsed", "duration": duration}


async def test_a_stream_that_is_refused_is_a_plain_answer(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, NULL_MAX_QUEUE_SECONDS="0.1") as worker:
        await worker.line("key_loaded")
        await reserve(worker, vast)
        claim = await reserve(worker, vast, stream=True)
        answer = await claim.answer()
        assert (answer.status, answer.body["reason"]) == (429, "queue_timeout")
        assert (answer.headers[HEADER], answer.headers["Retry-After"]) == (claim.id, "1")


async def test_the_next_is_held_in_the_same_commit(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    first, second = [await reserve(worker, vast) for _ in range(2)]
    await worker.release(reservation_id=first.id)
    await second.held()
    (released_at, held_at) = [at for (at,) in worker.sql("SELECT at FROM events ORDER BY seq DESC LIMIT 2")]
    assert released_at == held_at


async def test_an_unsecured_worker_takes_a_bare_payload_and_says_so_loudly(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        assert (await worker.line("unsecured"))["level"] == "warning"
        assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
        assert (await post(worker.url + "/reserve", {"payload": {"duration": 0}})).status == 200
        forged = {"cost": 1, "endpoint": "e", "reqnum": 1, "request_idx": 5, "signature": "x", "url": "y"}
        body = {"auth_data": forged, "payload": {"duration": 0}, "session_id": None}
        assert (await post(worker.url + "/reserve", body)).status == 200
        assert [row[0] for row in worker.sql("SELECT request_idx FROM reservations")] == [None, None, 5]


async def test_one_request_idx_after_the_other_is_a_reservation_each(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    bodies = [signed(vast, worker.url, {"duration": 0}, request_idx=70) for _ in range(3)]  # a new reqnum each
    answers = await asyncio.gather(*(post(worker.url + "/reserve", body) for body in bodies))
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert len({answer.headers[HEADER] for answer in answers}) == 3
    await vast.wait_for(lambda: len(vast.outcomes_of(70)) == 3)
