"""The routing of the fake autoscaler: which worker a request gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from fake_worker import FakeWorker

from nullworker.testing import FakeAutoscaler


class Routing:
    """Asks a stand-in whose clock stands still for workers."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http, self.now = http, 1000.0
        self.vast = FakeAutoscaler(clock=lambda: self.now)

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


@pytest.mark.parametrize(
    ("engine", "cur_perf", "kept"), [("may-2026", 0, False), ("may-2026", 100, True), ("strict", 0, True)]
)
async def test_the_engine_of_may_2026_downgrades_who_holds_and_reports_no_perf(
    route: Routing, engine: str, cur_perf: float, kept: bool
) -> None:
    route.vast.fleet.engine = engine
    async with FakeWorker(route.vast.url) as worker:
        for _ in range(5):
            await worker.report(cur_load=100, working_request_idxs=[7], cur_perf=cur_perf)
        (known,) = route.vast.fleet.workers.values()
        assert (known.perf == 100) == kept
        assert known.perf > 0
