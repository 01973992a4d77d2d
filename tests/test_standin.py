"""The stand-in autoscaler: what it signs, takes in, routes, records, and does wrong on demand."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from fakeworker import FakeWorker

from nullworker.testing import Fault, Parameters, StandIn, Totals
from nullworker.testing.faults import How

ROOT = Path(__file__).parent.parent


@pytest.fixture
async def vast() -> AsyncIterator[StandIn]:
    async with StandIn() as vast:
        yield vast


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


@asynccontextmanager
async def official(vast: StandIn) -> AsyncIterator[Any]:
    """The official client, pointed at the stand-in."""
    sdk = importlib.import_module("vastai")
    client = sdk.CoroutineServerless("any", autoscaler_url=vast.url, webserver_url=vast.url)
    client._ssl_context = ssl.create_default_context()
    async with client:
        yield client


# ---- grants ----


async def test_a_grant_is_signed_over_the_url_alone_by_the_key_it_shows(
    vast: StandIn, http: aiohttp.ClientSession
) -> None:
    grant = vast.grant("http://1.2.3.4:5", cost="7.5", reqnum=8, request_idx=9)
    assert {**grant, "signature": ""} == {
        "cost": "7.5",
        "endpoint": "null",
        "reqnum": 8,
        "request_idx": 9,
        "signature": "",
        "url": "http://1.2.3.4:5",
    }
    async with http.get(f"{vast.url}/pubkey/") as response:
        key = serialization.load_pem_public_key(await response.read())
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048
    signed = b'{\n    "url": "http://1.2.3.4:5"\n}'
    key.verify(base64.b64decode(grant["signature"]), signed, padding.PKCS1v15(), hashes.SHA256())  # raises if not


async def test_each_grant_has_numbers_of_its_own(vast: StandIn) -> None:
    one, other = vast.grant("http://a"), vast.grant("http://a")
    assert one["reqnum"] != other["reqnum"]
    assert one["request_idx"] != other["request_idx"]
    assert one["signature"] == other["signature"]


async def test_a_key_file_keeps_the_key_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    first, second, other = StandIn(key=path), StandIn(key=path), StandIn()
    url = "http://a"
    assert first.grant(url)["signature"] == second.grant(url)["signature"] != other.grant(url)["signature"]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_it_takes_its_port_again_after_a_restart() -> None:
    async with StandIn() as vast:
        url = vast.url
    async with StandIn(vast.port, key=vast.key) as again:
        assert again.url == url
        assert again.grant("http://a")["signature"] == vast.grant("http://a")["signature"]


async def test_a_taken_port_is_an_error(vast: StandIn) -> None:
    with pytest.raises(OSError, match="in use"):
        async with StandIn(vast.port):
            pass


# ---- the official client ----


async def test_the_official_client_reads_the_endpoint_and_its_parameters(vast: StandIn) -> None:
    vast.parameters.max_workers = 3
    async with official(vast) as client:
        endpoint = await client.get_endpoint("null")
        fetched = await client.fetch_endpoint(endpoint.id)
    assert endpoint.data == fetched
    assert (fetched.config.max_workers, fetched.config.max_queue_time, fetched.config.min_load) == (3, 1.0, 0.0)


async def test_the_official_client_reads_the_workers(vast: StandIn) -> None:
    async with FakeWorker(vast.url, number=5) as worker, official(vast) as client:
        endpoint = await client.get_endpoint("null")
        (ready,) = await endpoint.get_workers()
        await worker.report(error_msg="broken")
        (broken,) = await endpoint.get_workers()
    assert (ready.id, ready.status, ready.perf, broken.status) == (5, "IDLE", 100.0, "ERROR")


async def test_the_official_client_is_led_to_a_worker_and_its_end_is_recorded(vast: StandIn) -> None:
    async with FakeWorker(vast.url) as worker, official(vast) as client:
        endpoint = await client.get_endpoint("null")
        asked = asyncio.create_task(endpoint.request("/reserve", {"duration": 3}))
        worker.release(await worker.held.get(), released="explicit")
        answer = await asked
        (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(answer["request_idx"]))
    assert answer["response"] == {"released": "explicit"}
    assert answer["auth_data"] == vast.grant(
        worker.url, reqnum=answer["auth_data"]["reqnum"], request_idx=answer["request_idx"]
    )
    assert (outcome["status"], outcome["worker_id"]) == ("Success", 1)


async def test_a_client_that_waits_keeps_its_request_idx_and_is_listed_as_waiting(vast: StandIn) -> None:
    async with official(vast) as client:
        endpoint = await client.get_endpoint("null")
        first = await endpoint._route(cost=100)
        assert (first.status, vast.waiting) == ("WAITING", [first.request_idx])
        async with FakeWorker(vast.url):
            second = await endpoint._route(cost=100, req_idx=first.request_idx)
    assert (second.status, second.request_idx, vast.waiting) == ("READY", first.request_idx, [])


# ---- routing ----


class Routing:
    """Asks a stand-in whose clock stands still for workers."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http, self.now = http, 1000.0
        self.vast = StandIn(clock=lambda: self.now)

    async def __call__(self, idx: int = 0) -> tuple[int, str | None]:
        body = {"endpoint": "null", "api_key": "any", "cost": 100, "request_idx": idx, "replay_timeout": 60}
        async with self.http.post(f"{self.vast.url}/route/", json=body) as response:
            answer = await response.json()
        return answer["request_idx"], answer.get("url")


@pytest.fixture
async def route(http: aiohttp.ClientSession) -> AsyncIterator[Routing]:
    routing = Routing(http)
    async with routing.vast:
        yield routing


async def test_a_worker_of_one_unit_gets_one_request_and_the_next_when_that_has_ended(route: Routing) -> None:
    async with FakeWorker(route.vast.url) as worker:
        idx, url = await route()
        assert url == worker.url
        assert (await route())[1] is None
        await worker.report(cur_load=100, working_request_idxs=[idx])
        assert (await route())[1] is None
        await worker.tell({"request_idx": idx, "success": True, "status": "Success"})
        assert (await route())[1] == worker.url


async def test_a_report_from_before_the_claim_does_not_hide_the_grant(route: Routing) -> None:
    async with FakeWorker(route.vast.url) as worker:
        await route()
        await worker.report()
        assert (await route())[1] is None


async def test_a_grant_that_nobody_used_is_forgotten(route: Routing) -> None:
    async with FakeWorker(route.vast.url) as worker:
        await route()
        route.now += 5.0
        assert (await route())[1] == worker.url


async def test_a_request_that_asks_again_does_not_stand_in_its_own_way(route: Routing) -> None:
    async with FakeWorker(route.vast.url) as worker:
        idx, _ = await route()
        assert await route(idx) == (idx, worker.url)


@pytest.mark.parametrize(("max_queue_time", "grants"), [(0.0, 1), (0.5, 1), (1.0, 1), (2.0, 2), (3.0, 3)])
async def test_max_queue_time_says_how_many_a_worker_gets(route: Routing, max_queue_time: float, grants: int) -> None:
    route.vast.parameters.max_queue_time = max_queue_time
    async with FakeWorker(route.vast.url):
        urls = [(await route())[1] for _ in range(4)]
    assert sum(url is not None for url in urls) == grants


async def test_the_least_loaded_worker_is_picked(route: Routing) -> None:
    route.vast.parameters.max_queue_time = 9
    async with FakeWorker(route.vast.url, number=1) as one, FakeWorker(route.vast.url, number=2) as two:
        await one.report(cur_load=300, working_request_idxs=[91, 92, 93])
        urls = [(await route())[1] for _ in range(5)]
    assert urls[:3] == [two.url] * 3
    assert set(urls[3:]) == {one.url, two.url}


@pytest.mark.parametrize("fields", [{"max_perf": 0}, {"error_msg": "out of disk"}, {"url": ""}])
async def test_a_worker_that_is_not_ready_gets_nothing(route: Routing, fields: dict[str, Any]) -> None:
    async with FakeWorker(route.vast.url) as worker:
        await worker.report(**fields)
        assert (await route())[1] is None


async def test_a_worker_that_has_gone_silent_gets_nothing(route: Routing) -> None:
    async with FakeWorker(route.vast.url):
        route.now += 30.0
        assert (await route())[1] is None


# ---- records ----


async def test_totals_are_sums_over_what_was_accepted(vast: StandIn) -> None:
    async with FakeWorker(vast.url) as worker:
        await worker.report(new_load=100, rej_load=200, cur_perf=50)
        vast.fail("worker_status", 500, times=1)
        await worker.report(new_load=1000)
        await worker.report(new_load=100)
    assert vast.totals() == Totals(new_load=200, rej_load=200, cur_perf=50)


async def test_outcomes_are_flat_and_batches_whole(vast: StandIn) -> None:
    async with FakeWorker(vast.url, number=3) as worker:
        await worker.tell({"request_idx": 1, "status": "Success"}, {"request_idx": 2, "status": "Rejected"})
        await worker.tell({"request_idx": 1, "status": "Success"})
    assert [len(batch["requests"]) for batch in vast.batches] == [2, 1]
    assert [(each["request_idx"], each["worker_id"]) for each in vast.outcomes] == [(1, 3), (2, 3), (1, 3)]
    assert len(vast.outcomes_of(1)) == 2


async def test_a_report_with_another_mtoken_is_refused_and_not_counted() -> None:
    async with StandIn(mtoken="token") as vast, FakeWorker(vast.url) as worker:
        assert await worker.report(mtoken="forged") == 403
        assert (len(vast.seen), len(vast.statuses)) == (2, 1)
        assert vast.seen[-1].accepted is False


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"id": 1}', b'{"id": 1, "mtoken": "", "url": 5, "error_msg": ""}'])
async def test_a_message_that_is_none_gets_400(vast: StandIn, http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post(f"{vast.url}/worker_status/", data=body) as response:
        assert (response.status, list(await response.json())) == (400, ["error"])
    assert vast.statuses == []


async def test_a_failed_start_is_accepted_with_the_few_fields_it_has(
    vast: StandIn, http: aiohttp.ClientSession
) -> None:
    body = {"id": 1, "mtoken": "", "version": "0", "error_msg": "no GPU", "url": "http://a"}  # of start_server.sh
    async with http.post(f"{vast.url}/worker_status/", json=body) as response:
        assert response.status == 200
    assert vast.totals() == Totals(0, 0, 0)


async def test_waiting_in_vain_says_what_has_been_seen(vast: StandIn) -> None:
    async with FakeWorker(vast.url):
        with pytest.raises(TimeoutError, match="1 calls seen, 1 statuses and 0 outcomes accepted"):
            await vast.wait_for(lambda: vast.outcomes, timeout=0.01)


# ---- faults ----


@pytest.mark.parametrize(("how", "answer"), [("down", None), (500, 500), (400, 400)])
async def test_what_is_refused_is_seen_and_not_delivered(vast: StandIn, how: How, answer: int | None) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("delete_requests", how, times=2)
        outcome = {"request_idx": 4, "status": "Success"}
        assert [await worker.tell(outcome) for _ in range(3)] == [answer, answer, 200]
    calls = [each.accepted for each in vast.seen if each.call == "delete_requests"]
    assert calls == [False, False, True]
    assert (len(vast.batches), len(vast.outcomes_of(4))) == (1, 1)


async def test_a_fault_lasts_until_it_is_cleared(vast: StandIn) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("worker_status", 503)
        assert [await worker.report() for _ in range(3)] == [503, 503, 503]
        vast.clear("worker_status")
        assert await worker.report() == 200


@pytest.mark.parametrize("clear", [True, False])
async def test_a_late_answer_never_comes_though_the_message_is_delivered(vast: StandIn, clear: bool) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("worker_status", "late", times=1)
        waiting = asyncio.create_task(worker.report(cur_load=7))
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 7)
        if clear:
            vast.clear()
        assert await worker.report() == 200
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_late_answer_is_dropped_when_the_stand_in_closes() -> None:
    async with StandIn() as vast, FakeWorker(vast.url) as worker:
        vast.fail("worker_status", "late")
        waiting = asyncio.create_task(worker.report(cur_load=7))
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 7)
        await vast.__aexit__(None, None, None)
        assert await waiting is None


async def test_a_slow_answer_comes_after_the_message_is_delivered(vast: StandIn) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("worker_status", "slow", seconds=0.2, times=1)
        began = asyncio.get_running_loop().time()
        waiting = asyncio.create_task(worker.report(cur_load=7))
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 7)
        assert not waiting.done()
        assert await waiting == 200
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_the_key_and_the_routing_fail_on_demand(vast: StandIn, http: aiohttp.ClientSession) -> None:
    vast.fail("pubkey", 503, times=1)
    vast.fail("route", 502, times=1)
    async with http.get(f"{vast.url}/pubkey/") as response:
        assert response.status == 503
    async with http.get(f"{vast.url}/pubkey/") as response:
        assert response.status == 200
    async with http.post(f"{vast.url}/route/", json={}) as response:
        assert response.status == 502


async def test_faults_are_set_and_taken_back_over_http(vast: StandIn, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{vast.url}/faults", json={"call": "pubkey", "how": 500, "times": 2}) as response:
        assert await response.json() == {"pubkey": {"how": 500, "times": 2, "seconds": 0}}
    assert vast.faults.active == {"pubkey": Fault(500, times=2)}
    async with http.delete(f"{vast.url}/faults", params={"call": "pubkey"}) as response:
        assert await response.json() == {}


@pytest.mark.parametrize(
    "body",
    [
        {"call": "pubkey"},
        {"call": "nothing", "how": "down"},
        {"call": "pubkey", "how": "loud"},
        {"call": "pubkey", "how": 200},
        {"call": "pubkey", "how": True},
        {"call": "pubkey", "how": "slow"},
        {"call": "pubkey", "how": "down", "seconds": 1},
        {"call": "pubkey", "how": "down", "times": 0},
        {"call": "pubkey", "how": "down", "times": "1"},
        {"call": "pubkey", "how": "down", "often": 1},
    ],
)
async def test_a_wrong_fault_is_refused_with_422(vast: StandIn, http: aiohttp.ClientSession, body: Any) -> None:
    async with http.post(f"{vast.url}/faults", json=body) as response:
        assert response.status == 422
    assert vast.faults.active == {}


# ---- the process ----


async def test_the_process_says_where_it_listens_records_and_tells(tmp_path: Path) -> None:
    record, key = tmp_path / "record.jsonl", tmp_path / "key.pem"
    args = ["-W", "error", "-m", "nullworker.testing", "--port", "0", "--record", str(record), "--key", str(key)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *args, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        first = (await process.stdout.readline()).decode().strip()
        async with FakeWorker(first.split()[-1], number=6) as worker:
            await worker.tell({"request_idx": 2, "status": "Success", "work_started_at": 10, "work_completed_at": 12.5})
        lines = [json.loads(line) for line in record.read_text().splitlines()]  # while it runs: each line is flushed
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = await process.communicate()
    assert first.startswith("stand-in autoscaler for endpoint 'null' listens on http://127.0.0.1:")
    assert [line["call"] for line in lines] == ["worker_status", "delete_requests"]
    assert lines[1]["payload"]["requests"][0]["request_idx"] == 2
    assert out.decode().splitlines() == [
        "worker_status    worker 6: ready, load 0 of 100 (new 0, rejected 0, served 0)",
        "delete_requests  worker 6: request 2 Success, held 2.5 s",
    ]
    assert (process.returncode, err, key.exists()) == (0, b"", True)


async def test_parameters_can_be_given() -> None:
    async with StandIn(endpoint="mine", parameters=Parameters(min_load=300)) as vast, official(vast) as client:
        endpoint = await client.get_endpoint("mine")
    assert endpoint.data.config.min_load == 300
