"""The fake autoscaler: its signatures, its answers to the official client, its records, and its process."""

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
from fake_worker import FakeWorker

from nullworker.testing import FakeAutoscaler, Parameters, Totals

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def official(vast: FakeAutoscaler) -> AsyncIterator[Any]:
    """The official client, pointed at the stand-in."""
    sdk = importlib.import_module("vastai")
    client = sdk.CoroutineServerless("any", autoscaler_url=vast.url, webserver_url=vast.url)
    client._ssl_context = ssl.create_default_context()
    async with client:
        yield client


# ---- grants ----


async def test_a_grant_is_signed_over_the_url_alone_by_the_key_it_shows(
    vast: FakeAutoscaler, http: aiohttp.ClientSession
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


async def test_each_grant_has_numbers_of_its_own(vast: FakeAutoscaler) -> None:
    one, other = vast.grant("http://a"), vast.grant("http://a")
    assert one["reqnum"] != other["reqnum"]
    assert one["request_idx"] != other["request_idx"]
    assert one["signature"] == other["signature"]


async def test_a_key_file_keeps_the_key_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    first, second, other = FakeAutoscaler(key=path), FakeAutoscaler(key=path), FakeAutoscaler()
    url = "http://a"
    assert first.grant(url)["signature"] == second.grant(url)["signature"] != other.grant(url)["signature"]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_it_takes_its_port_again_after_a_restart() -> None:
    async with FakeAutoscaler() as vast:
        url = vast.url
    async with FakeAutoscaler(vast.port, key=vast.key) as again:
        assert again.url == url
        assert again.grant("http://a")["signature"] == vast.grant("http://a")["signature"]


async def test_a_taken_port_is_an_error(vast: FakeAutoscaler) -> None:
    with pytest.raises(OSError, match="in use"):
        async with FakeAutoscaler(vast.port):
            pass


# ---- the official client ----


async def test_the_official_client_reads_the_endpoint_and_its_parameters(vast: FakeAutoscaler) -> None:
    vast.parameters.max_workers = 3
    async with official(vast) as client:
        endpoint = await client.get_endpoint("null")
        fetched = await client.fetch_endpoint(endpoint.id)
    assert endpoint.data == fetched
    assert (fetched.config.max_workers, fetched.config.max_queue_time, fetched.config.min_load) == (3, 1.0, 0.0)


async def test_the_official_client_reads_the_workers(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url, number=5) as worker, official(vast) as client:
        endpoint = await client.get_endpoint("null")
        (ready,) = await endpoint.get_workers()
        await worker.report(error_msg="broken")
        (broken,) = await endpoint.get_workers()
    assert (ready.id, ready.status, ready.perf, broken.status) == (5, "IDLE", 100.0, "ERROR")


async def test_the_official_client_is_led_to_a_worker_and_its_end_is_recorded(vast: FakeAutoscaler) -> None:
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


async def test_a_client_that_waits_keeps_its_request_idx_and_is_listed_as_waiting(vast: FakeAutoscaler) -> None:
    async with official(vast) as client:
        endpoint = await client.get_endpoint("null")
        first = await endpoint._route(cost=100)
        assert (first.status, vast.waiting) == ("WAITING", [first.request_idx])
        async with FakeWorker(vast.url):
            second = await endpoint._route(cost=100, req_idx=first.request_idx)
    assert (second.status, second.request_idx, vast.waiting) == ("READY", first.request_idx, [])


# ---- records ----


async def test_totals_are_sums_over_what_was_accepted(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url) as worker:
        await worker.report(new_load=100, rej_load=200, cur_perf=50)
        vast.fail("worker_status", 500, times=1)
        await worker.report(new_load=1000)
        await worker.report(new_load=100)
    assert vast.totals() == Totals(new_load=200, rej_load=200, cur_perf=50)


async def test_outcomes_are_flat_and_batches_whole(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url, number=3) as worker:
        await worker.tell({"request_idx": 1, "status": "Success"}, {"request_idx": 2, "status": "Rejected"})
        await worker.tell({"request_idx": 1, "status": "Success"})
    assert [len(batch["requests"]) for batch in vast.batches] == [2, 1]
    assert [(each["request_idx"], each["worker_id"]) for each in vast.outcomes] == [(1, 3), (2, 3), (1, 3)]
    assert len(vast.outcomes_of(1)) == 2


async def test_a_report_with_another_mtoken_is_refused_and_not_counted() -> None:
    async with FakeAutoscaler(mtoken="token") as vast, FakeWorker(vast.url) as worker:
        assert await worker.report(mtoken="forged") == 403
        assert (len(vast.seen), len(vast.statuses)) == (2, 1)
        assert vast.seen[-1].accepted is False


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"id": 1}', b'{"id": 1, "mtoken": "", "url": 5, "error_msg": ""}'])
async def test_an_invalid_message_gets_400(vast: FakeAutoscaler, http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post(f"{vast.url}/worker_status/", data=body) as response:
        assert (response.status, list(await response.json())) == (400, ["error"])
    assert vast.statuses == []


async def test_a_failed_start_is_accepted_with_the_few_fields_it_has(
    vast: FakeAutoscaler, http: aiohttp.ClientSession
) -> None:
    body = {"id": 1, "mtoken": "", "version": "0", "error_msg": "no GPU", "url": "http://a"}  # of start_server.sh
    async with http.post(f"{vast.url}/worker_status/", json=body) as response:
        assert response.status == 200
    assert vast.totals() == Totals(0, 0, 0)


async def test_a_timeout_of_wait_for_says_what_was_received(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url):
        with pytest.raises(TimeoutError, match="1 calls seen, 1 statuses and 0 outcomes accepted"):
            await vast.wait_for(lambda: vast.outcomes, timeout=0.01)


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
    async with FakeAutoscaler(endpoint="mine", parameters=Parameters(min_load=300)) as vast, official(vast) as client:
        endpoint = await client.get_endpoint("mine")
    assert endpoint.data.config.min_load == 300
