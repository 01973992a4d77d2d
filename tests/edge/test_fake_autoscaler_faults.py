"""Faults of the fake autoscaler: refusals, late and slow answers, and how they are set."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from fake_worker import FakeWorker

from nullworker.testing import FakeAutoscaler, Fault
from nullworker.testing.faults import How


@pytest.mark.parametrize(("how", "answer"), [("down", None), (500, 500), (400, 400)])
async def test_a_refused_call_is_recorded_but_not_delivered(vast: FakeAutoscaler, how: How, answer: int | None) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("delete_requests", how, times=2)
        outcome = {"request_idx": 4, "status": "Success"}
        assert [await worker.tell(outcome) for _ in range(3)] == [answer, answer, 200]
    calls = [each.accepted for each in vast.seen if each.call == "delete_requests"]
    assert calls == [False, False, True]
    assert (len(vast.batches), len(vast.outcomes_of(4))) == (1, 1)


async def test_a_fault_lasts_until_it_is_cleared(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("worker_status", 503)
        assert [await worker.report() for _ in range(3)] == [503, 503, 503]
        vast.clear("worker_status")
        assert await worker.report() == 200


@pytest.mark.parametrize("clear", [True, False])
async def test_a_late_answer_never_comes_though_the_message_is_delivered(vast: FakeAutoscaler, clear: bool) -> None:
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


async def test_a_late_answer_is_dropped_at_the_end_of_the_block() -> None:
    async with FakeAutoscaler() as vast, FakeWorker(vast.url) as worker:
        vast.fail("worker_status", "late")
        waiting = asyncio.create_task(worker.report(cur_load=7))
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 7)
        await vast.__aexit__(None, None, None)
        assert await waiting is None


async def test_a_slow_answer_comes_after_the_message_is_delivered(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url) as worker:
        vast.fail("worker_status", "slow", seconds=0.2, times=1)
        began = asyncio.get_running_loop().time()
        waiting = asyncio.create_task(worker.report(cur_load=7))
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 7)
        assert not waiting.done()
        assert await waiting == 200
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_the_key_and_the_routing_fail_on_demand(vast: FakeAutoscaler, http: aiohttp.ClientSession) -> None:
    vast.fail("pubkey", 503, times=1)
    vast.fail("route", 502, times=1)
    async with http.get(f"{vast.url}/pubkey/") as response:
        assert response.status == 503
    async with http.get(f"{vast.url}/pubkey/") as response:
        assert response.status == 200
    async with http.post(f"{vast.url}/route/", json={}) as response:
        assert response.status == 502


async def test_faults_are_set_and_taken_back_over_http(vast: FakeAutoscaler, http: aiohttp.ClientSession) -> None:
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
async def test_a_wrong_fault_is_refused_with_422(vast: FakeAutoscaler, http: aiohttp.ClientSession, body: Any) -> None:
    async with http.post(f"{vast.url}/faults", json=body) as response:
        assert response.status == 422
    assert vast.faults.active == {}
