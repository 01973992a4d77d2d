"""A real worker and the official `vastai` client, with the fake autoscaler between them."""

from __future__ import annotations

import asyncio
import importlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, WorkerProcess, secured

from nullworker.testing import FakeAutoscaler, Parameters


@pytest.fixture
async def vast() -> AsyncIterator[FakeAutoscaler]:
    """One that sends up to three requests to a worker at once."""
    async with FakeAutoscaler(parameters=Parameters(max_queue_time=3)) as vast:
        yield vast


@pytest.fixture
async def worker(vast: FakeAutoscaler, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    """A worker that the stand-in knows to be ready."""
    async with secured(tmp_path, vast) as worker:
        await vast.wait_for(lambda: vast.fleet.ready(vast.statuses[-1]["received_at"]) if vast.statuses else None)
        yield worker


@pytest.fixture
async def endpoint(vast: FakeAutoscaler, worker: WorkerProcess) -> AsyncIterator[Any]:
    sdk = importlib.import_module("vastai")
    client = sdk.Serverless("any", autoscaler_url=vast.url, webserver_url=vast.url)
    client._ssl_context = ssl.create_default_context()  # else it downloads a certificate
    async with client:
        yield await client.get_endpoint("null")


async def within_patience(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, PATIENCE)


async def answered(worker: WorkerProcess, route: str, status: int) -> float:
    return await worker.metric("nullworker_http_requests_total", port="external", route=route, status=str(status))


async def test_a_request_is_held_until_the_release(endpoint: Any, worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    request = asyncio.ensure_future(endpoint.request("/reserve", {"metadata": {"job": 12}}))
    line = await worker.line("reservation_held")
    assert (await worker.get("/reservation"))["metadata"] == {"job": 12}
    assert await worker.release(result={"rows": 3}) == {"released": True, "reservation_id": line["reservation_id"]}
    done = await within_patience(request)
    assert (done["ok"], done["status"], done["url"]) == (True, 200, worker.url)
    assert done["response"]["released"] == "explicit"
    assert done["response"]["reservation_id"] == line["reservation_id"]
    assert done["response"]["result"] == {"rows": 3}
    (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(done["request_idx"]))
    assert outcome["status"] == "Success"


async def test_a_stream_holds_for_longer_than_the_clients_request_timeout(
    endpoint: Any, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    streamed = await within_patience(
        endpoint.client.queue_endpoint_request(
            endpoint=endpoint,
            worker_route="/reserve",
            worker_payload={"duration": 1.5, "stream": True},
            stream=True,
            worker_timeout=1.0,
        )
    )
    assert streamed["ok"]
    told = [data async for data in streamed["response"]]
    assert [event["kind"] for event in told[:-1]] == ["queued", "held", "expired"]
    assert told[-1] == {"released": "duration_elapsed", "duration": 1.5}
    assert worker.story() == [("queued", None), ("held", None), ("expired", "duration_elapsed")]
    assert await answered(worker, "/reserve", 200) == 1
    assert {seen.payload["request_idx"] for seen in vast.seen if seen.call == "route"} == {0}


async def test_a_client_that_is_cancelled_frees_the_worker(endpoint: Any, worker: WorkerProcess) -> None:
    request = asyncio.ensure_future(endpoint.request("/reserve", {}))
    await worker.line("reservation_held")
    request.cancel()
    assert (await worker.line("reservation_cancelled"))["reason"] == "client_disconnect"


async def test_a_session_lives_in_its_block_and_no_longer(
    endpoint: Any, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    async with await within_patience(endpoint.session(lifetime=30)) as session:
        assert (await worker.get("/reservation"))["id"] == session.session_id
        assert await within_patience(session.is_open()) is True
        again = await within_patience(endpoint.get_session(session.session_id, session.auth_data))
        assert (again.session_id, again.lifetime, again.expiration) == (session.session_id, 30, session.expiration)
        pinged = await within_patience(session.request("/ping", {}))
        assert (pinged["status"], pinged["response"]) == (200, {"result": {"ok": True}})
        assert worker.story()[-1] == ("held", None), "a ping that moves the deadline by less than a second is no event"
    assert session.open is False
    assert worker.story()[-1] == ("released", "session_end")
    with pytest.raises(ValueError, match="closed session"):
        session.request("/ping", {})
    (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(session.auth_data["request_idx"]))
    assert outcome["status"] == "Success"


async def test_sessions_live_through_an_outage_of_the_autoscaler(
    endpoint: Any, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    session = await within_patience(endpoint.session(lifetime=30))
    for call in ("worker_status", "delete_requests", "pubkey"):
        vast.fail(call, "down")
    await worker.line("report_not_delivered")
    assert (await within_patience(session.request("/ping", {})))["status"] == 200
    assert await within_patience(session.is_open()) is True
    await within_patience(session.close())
    assert worker.story()[-1] == ("released", "session_end")
    assert (await worker.get("/status"))["autoscaler"]["backlog"] == 1
    vast.clear()
    (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(session.auth_data["request_idx"]), timeout=PATIENCE)
    assert outcome["status"] == "Success"
    async with await within_patience(endpoint.session(lifetime=30)) as another:
        assert (await worker.get("/reservation"))["id"] == another.session_id


async def test_a_session_that_the_consumer_released_is_gone_for_its_owner(endpoint: Any, worker: WorkerProcess) -> None:
    session = await within_patience(endpoint.session(lifetime=30))
    assert await worker.release() == {"released": True}
    with pytest.raises(ValueError, match="closed session"):
        await within_patience(session.request("/ping", {}, retry=False))
    with pytest.raises(Exception, match="session does not exist"):
        await within_patience(endpoint.get_session(session.session_id, session.auth_data))


async def test_a_request_in_a_session_waits_for_its_end(endpoint: Any, worker: WorkerProcess) -> None:
    session = await within_patience(endpoint.session(lifetime=30))
    streamed = await within_patience(session.request("/reserve", {"stream": True}, stream=True))
    assert streamed["ok"]
    await session.close()
    last = [data async for data in streamed["response"]][-1]
    assert (last["released"], last["reservation_id"]) == ("session_end", session.session_id)
    assert (
        await worker.metric("nullworker_reservations_total", kind="session", state="released", reason="session_end")
        == 1
    )


async def test_a_session_on_a_busy_worker_is_refused(
    endpoint: Any, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = asyncio.ensure_future(endpoint.request("/reserve", {}))
    line = await worker.line("reservation_held")
    refused = await within_patience(endpoint.request("/session/create", {"lifetime": 30}, retry=False))
    assert (refused["ok"], refused["status"], refused["response"]["reason"]) == (False, 429, "busy")
    (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(refused["request_idx"]))
    assert outcome["status"] == "Rejected"
    assert (await worker.get("/reservation"))["id"] == line["reservation_id"]
    await worker.release()
    assert (await within_patience(held))["ok"]
    assert await answered(worker, "/session/create", 429) == 1
