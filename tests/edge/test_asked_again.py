"""The same body again, after a lost answer: one reservation, and its final status once it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from claims import data_of, reserve
from harness import EACH_PING_RENEWS, Answer, WorkerProcess, post, secured, signed

from nullworker.testing import FakeAutoscaler

HEADER = "Nullworker-Reservation"
FINAL = ("state", "reason", "held_at", "ended_at", "held_seconds", "result")
HELD, ENDED = [("queued", None), ("held", None)], ("released", "explicit")


def final(answer: Answer) -> tuple[int, str, str, Any]:
    """Status of an answer that has the whole final status, and what of it is the same in each run."""
    assert set(FINAL) <= set(answer.body), answer
    held_at, ended_at = answer.body["held_at"], answer.body["ended_at"]
    assert held_at is not None
    assert held_at <= ended_at
    assert answer.body["held_seconds"] >= 0
    return answer.status, answer.body["state"], answer.body["reason"], answer.body["result"]


@contextlib.asynccontextmanager
async def healthy_server() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A health endpoint that is well while the event is set."""
    well = asyncio.Event()

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=200 if well.is_set() else 503)

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/health", well
    finally:
        await runner.cleanup()


async def create(worker: WorkerProcess, body: Any) -> Answer:
    return await post(worker.url + "/session/create", body)


# -- sessions --------------------------------------------------------------------------------------------------------


async def test_a_session_is_made_once_for_one_grant(vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with secured(tmp_path, vast, module=EACH_PING_RENEWS) as worker:
        await worker.line("key_loaded")
        body = signed(vast, worker.url, {"lifetime": 20})
        first = await create(worker, body)
        again = await create(worker, body)
        assert (first.status, again.status) == (201, 201)
        assert again.body["session_id"] == first.body["session_id"] == again.headers[HEADER]
        assert again.body["lifetime"] == 20
        assert again.body["expiration"] > first.body["expiration"], "it is renewed as by a ping"
        assert worker.story() == [*HELD, ("extended", "ping")]
        assert (await create(worker, signed(vast, worker.url))).status == 429, "another grant is another claim"


async def test_the_payload_of_a_repeated_create_is_not_looked_at(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    body = signed(vast, worker.url, {"lifetime": 60})
    first = await create(worker, body)
    for payload in ({"lifetime": 5}, {"lifetime": "soon"}, {"metadata": 7}):
        again = await create(worker, {**body, "payload": payload})
        assert (again.status, again.body["session_id"]) == (201, first.body["session_id"])
        assert again.body["lifetime"] == 60


async def test_a_grant_whose_session_has_ended_learns_how(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    body = signed(vast, worker.url, {"lifetime": 60})
    first = await create(worker, body)
    await worker.release(reason="consumer_exit", result={"exit_code": 7})
    again = await create(worker, body)
    assert final(again) == (410, "released", "consumer_exit", {"exit_code": 7})
    assert again.headers[HEADER] == first.body["session_id"]
    assert len(worker.story()) == 3


@pytest.mark.parametrize("change", [{"signature": "Zm9yZ2Vk" * 40}, {"reqnum": 99_999}, {"cost": 99}])
async def test_only_the_whole_verified_auth_is_the_same_caller(
    vast: FakeAutoscaler, worker: WorkerProcess, change: dict[str, Any]
) -> None:
    body = signed(vast, worker.url)
    first = await create(worker, body)
    other = await create(worker, {**body, "auth_data": {**body["auth_data"], **change}})
    if "signature" in change:
        assert other.status == 401
    else:  # the official client routes again with the same request_idx and another reqnum
        assert (other.status, other.body["reason"]) == (429, "duplicate")
    assert (await worker.get("/reservation"))["id"] == first.body["session_id"]


async def test_bare_payloads_and_unverified_grants_are_never_the_same(vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        assert (await create(worker, {"lifetime": 60})).status == 201
        assert (await create(worker, {"lifetime": 60})).status == 429
        await worker.release()
        body = signed(vast, worker.url, {"lifetime": 60})
        assert (await create(worker, body)).status == 201
        assert (await create(worker, body)).status == 429
        await worker.release()
        assert (await create(worker, body)).status == 201


async def test_a_restarted_worker_knows_the_grant_of_its_session(vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        body = signed(vast, worker.url)
        first = await create(worker, body)
        await worker.terminate()
        await worker.start()
        await worker.line("key_loaded")
        again = await create(worker, body)
        assert (again.status, again.body["session_id"]) == (201, first.body["session_id"])
        await worker.release(result=1)
        await worker.kill()
        await worker.start()
        await worker.line("key_loaded")
        assert final(await create(worker, body)) == (410, "released", "explicit", 1)


async def test_the_load_of_a_session_is_the_cost_of_its_grant(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    body = signed(vast, worker.url, cost="200", request_idx=77)
    await create(worker, body)
    loaded = await vast.wait_for(lambda: [s for s in vast.statuses if s["working_request_idxs"] == [77]])
    assert loaded[0]["cur_load"] == 200
    await worker.release()
    await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 0)
    assert vast.totals() == (200, 0, 200)


# -- the final status of a session -----------------------------------------------------------------------------------


async def test_an_ended_session_tells_its_owner_how_it_ended_and_nobody_else(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    body = signed(vast, worker.url, {"lifetime": 60})
    session_id = (await create(worker, body)).body["session_id"]
    await worker.release(result={"rows": 3})
    named = {"session_id": session_id, "session_auth": body["auth_data"]}
    theirs = {**named, "session_auth": vast.grant(worker.url)}
    for path, status in (("/session/get", 400), ("/session/end", 400), ("/session/health", 200)):
        own = await post(worker.url + path, named)
        assert final(own) == (status, "released", "explicit", {"rows": 3})
        assert own.headers[HEADER] == session_id
        other = await post(worker.url + path, theirs)
        assert other.status == status
        assert "state" not in other.body
        assert HEADER not in other.headers
    for path in ("/ping", "/reserve"):
        mine = {**body, "payload": {}, "session_id": session_id}
        assert final(await post(worker.url + path, mine)) == (410, *ENDED, {"rows": 3})
        other = await post(worker.url + path, signed(vast, worker.url, session_id=session_id))
        assert other.status == 410
        assert "state" not in other.body


async def test_who_waits_for_a_session_that_is_cancelled_gets_410_and_why(vast: FakeAutoscaler, tmp_path: Path) -> None:
    """The official client would repeat a 503 and lose the reason."""
    async with healthy_server() as (url, well):
        env = {"BACKEND_HEALTH_URL": url, "NULL_HEALTH_INTERVAL": "0.05", "NULL_UNHEALTHY_ACTION": "cancel"}
        async with secured(tmp_path, vast, **env) as worker:
            body = signed(vast, worker.url)
            refused = await create(worker, body)
            assert (refused.status, refused.body["reason"]) == (503, "not_ready")
            well.set()
            await worker.line("key_loaded")
            await worker.line("consumer_healthy")
            session_id = (await create(worker, body)).body["session_id"]
            wait = {**body, "payload": {}, "session_id": session_id}
            waits = asyncio.ensure_future(post(worker.url + "/reserve", wait))
            streams = asyncio.ensure_future(post(worker.url + "/reserve", {**wait, "payload": {"stream": True}}))
            await worker.get("/status")
            well.clear()
            answer = await waits
            assert final(answer) == (410, "cancelled", "consumer_unhealthy", None)
            assert answer.body["reservation_id"] == session_id
            assert json.loads(data_of((await streams).body)[-1]) == answer.body
            assert final(await create(worker, body)) == (410, "cancelled", "consumer_unhealthy", None)


# -- requests --------------------------------------------------------------------------------------------------------


async def test_a_request_whose_answer_was_lost_is_asked_for_its_end(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    body = signed(vast, worker.url, {"duration": 60})
    first = asyncio.ensure_future(post(worker.url + "/reserve", body))
    await worker.line("reservation_held")
    again = await post(worker.url + "/reserve", body)
    assert (again.status, again.body["reason"]) == (429, "duplicate")
    await worker.release(result="done")
    await first
    for _ in range(2):
        assert final(await post(worker.url + "/reserve", body)) == (410, *ENDED, "done")
    await worker.kill()
    await worker.start()
    await worker.line("key_loaded")
    assert final(await post(worker.url + "/reserve", body)) == (410, *ENDED, "done")


async def test_a_request_that_its_caller_hung_up_on_may_be_made_again(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    body = signed(vast, worker.url, {"duration": 60})
    for number in (1, 2):
        caller = asyncio.ensure_future(post(worker.url + "/reserve", body))
        await worker.line("reservation_held", nth=number)
        caller.cancel()
        await worker.line("reservation_cancelled", nth=number)


async def test_a_request_that_was_refused_may_be_made_again(vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with secured(tmp_path, vast, NULL_MAX_QUEUE_SECONDS="0") as worker:
        await worker.line("key_loaded")
        holder = await reserve(worker, vast)
        body = signed(vast, worker.url, {"duration": 0})
        assert (await post(worker.url + "/reserve", body)).status == 429
        await worker.release()
        await holder.answer()
        assert (await post(worker.url + "/reserve", body)).status == 200


async def test_a_duplicate_is_told_to_nobody_and_counted_nowhere(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    claim = await reserve(worker, vast)
    idx = (await worker.get("/reservation"))["request_idx"]
    refused = await post(worker.url + "/reserve", signed(vast, worker.url, request_idx=idx))
    assert (refused.status, refused.body["reason"]) == (429, "duplicate")
    assert int(refused.headers["Retry-After"]) > 0
    assert worker.story()[2:] == [("queued", None), ("expired", "duplicate")]
    assert (
        await worker.metric("nullworker_reservations_total", kind="request", state="expired", reason="duplicate") == 1
    )
    await worker.release()
    await claim.answer()
    assert await claim.outcome() == "Success"
    await worker.terminate()  # with its last reports
    assert [each["status"] for each in vast.outcomes_of(idx)] == ["Success"]
    assert vast.totals() == (100, 0, 100)
    assert vast.statuses[-1]["num_requests_recieved"] == 1
