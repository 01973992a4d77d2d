"""BACKEND_HEALTH_URL: a real worker and a consumer that becomes healthy, unhealthy and healthy again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from claims import reserve
from harness import PATIENCE, WorkerProcess, changed, leave_session, secured

from nullworker import __version__
from nullworker.clock import SystemClock
from nullworker.testing import FakeAutoscaler


class Consumer:
    """A health endpoint. `status` is what it answers, None for nothing at all; `polled` rings at each question."""

    def __init__(self) -> None:
        self.status: int | None = 503
        self.url = ""
        self._asked = 0
        self._polled = asyncio.Condition()

    async def __aenter__(self) -> Consumer:
        app = web.Application()
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/health"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        async with self._polled:
            self._asked += 1
            self._polled.notify_all()
        if self.status is None:
            await asyncio.Event().wait()
        assert self.status is not None
        return web.Response(status=self.status, headers={"Location": "/health"})

    async def asked(self, times: int) -> None:
        """Wait for so many further questions. The worker has then taken in all answers but the last."""
        enough = self._asked + times
        async with self._polled:
            await asyncio.wait_for(self._polled.wait_for(lambda: self._asked >= enough), PATIENCE)


@pytest.fixture
async def consumer() -> AsyncIterator[Consumer]:
    async with Consumer() as consumer:
        yield consumer


Begin = Callable[..., AbstractAsyncContextManager[WorkerProcess]]


@pytest.fixture
def begin(tmp_path: Path, vast: FakeAutoscaler, consumer: Consumer) -> Begin:
    """A worker that asks this consumer every 20 ms; `well` is whether it waits for the first good answer."""

    @asynccontextmanager
    async def begin(*, well: bool = True, **env: Any) -> AsyncIterator[WorkerProcess]:
        consumer.status = 200 if well else 503
        env = {"BACKEND_HEALTH_URL": consumer.url, "NULL_HEALTH_INTERVAL": "0.02", **env}
        async with secured(tmp_path, vast, **env) as worker:
            await worker.line("key_loaded")
            if well:
                await worker.line("consumer_healthy")
            yield worker

    return begin


async def test_before_its_first_success_the_worker_takes_nothing_and_says_why(
    begin: Begin, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    async with begin(well=False) as worker:
        await consumer.asked(2)
        ready = await worker.get("/readyz")
        assert (ready["ready"], ready["state"], ready["checks"]["consumer"]["ok"]) == (False, "starting", False)
        assert f"{consumer.url} answered 503" in ready["checks"]["consumer"]["why"]
        claim = await reserve(worker, vast)
        answer = await claim.answer()
        assert (answer.status, answer.body["reason"], answer.headers["Retry-After"]) == (503, "not_ready", "1")
        assert worker.story() == [("queued", None), ("cancelled", "not_ready")]
        assert await claim.outcome() == "Rejected"
        assert all((status["max_perf"], status["error_msg"]) == (0, "") for status in vast.statuses)
        assert await worker.metric("nullworker_consumer_healthy") == 0

        consumer.status = 200
        await worker.line("consumer_healthy")
        (status, *_) = await vast.wait_for(lambda: [status for status in vast.statuses if status["max_perf"]])
        assert (status["max_perf"], status["error_msg"]) == (100, "")
        assert (await worker.get("/readyz"))["ready"] is True
        assert await worker.metric("nullworker_consumer_healthy") == 1
        assert (await (await reserve(worker, vast, duration=0)).answer()).status == 200


async def test_a_failure_is_told_everywhere_and_a_success_takes_it_back(
    begin: Begin, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    async with begin() as worker:
        consumer.status = 500
        line = await worker.line("consumer_unhealthy")
        assert line["why"] == f"{consumer.url} answered 500"
        errored = await vast.wait_for(lambda: [status for status in vast.statuses if status["error_msg"]])
        assert errored[0]["error_msg"] == f"the consumer is unhealthy: {consumer.url} answered 500"
        ready = await worker.get("/readyz")
        assert (ready["state"], ready["checks"]["consumer"]["ok"]) == ("errored", False)
        assert ready["checks"]["consumer"]["why"] == errored[0]["error_msg"]
        assert await worker.metric("nullworker_worker_state", state="errored") == 1
        claim = await reserve(worker, vast)
        assert ((await claim.answer()).status, (await claim.answer()).body["reason"]) == (503, "errored")
        assert await claim.outcome() == "Rejected"

        seen = len(vast.statuses)
        consumer.status = 200
        await worker.line("consumer_healthy", nth=2)
        await vast.wait_for(lambda: [status for status in vast.statuses[seen:] if not status["error_msg"]])
        assert (await worker.get("/readyz"))["ready"] is True
        assert (await (await reserve(worker, vast, duration=0)).answer()).status == 200
        assert [line["event"] for line in worker.lines].count("consumer_unhealthy") == 1


async def test_what_is_held_stays_held_and_those_who_wait_are_sent_away(
    begin: Begin, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    async with begin() as worker:
        held, queued = [await reserve(worker, vast) for _ in range(2)]
        consumer.status = 500
        answer = await queued.answer()
        assert (answer.status, answer.body["reason"]) == (503, "errored")
        assert await queued.outcome() == "Rejected"
        assert (await worker.get("/reservation"))["id"] == held.id
        assert await worker.release() == {"released": True}
        assert (await held.answer()).status == 200


async def test_with_cancel_the_held_one_ends_too(begin: Begin, vast: FakeAutoscaler, consumer: Consumer) -> None:
    async with begin(NULL_UNHEALTHY_ACTION="cancel") as worker:
        held, queued = [await reserve(worker, vast) for _ in range(2)]
        consumer.status = 500
        answers = [await claim.answer() for claim in (held, queued)]
        assert [answer.status for answer in answers] == [503, 503]
        assert [answer.body["reason"] for answer in answers] == ["consumer_unhealthy", "errored"]
        ends = [event for event in worker.story() if event[0] == "cancelled"]
        assert sorted(ends) == [("cancelled", "consumer_unhealthy"), ("cancelled", "errored")]
        assert [await claim.outcome() for claim in (held, queued)] == ["Cancelled", "Rejected"]


async def test_only_so_many_failures_in_a_row_count(begin: Begin, vast: FakeAutoscaler, consumer: Consumer) -> None:
    async with begin(NULL_HEALTH_FAILURES="3") as worker:
        for _ in range(2):
            consumer.status = 500
            await consumer.asked(2)
            consumer.status = 200
            await consumer.asked(2)
        assert [line["event"] for line in worker.lines].count("consumer_unhealthy") == 0
        consumer.status = 500
        assert (await worker.line("consumer_unhealthy"))["failures"] == 3


async def test_no_answer_in_time_a_redirect_and_a_closed_port_are_failures(
    begin: Begin, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    async with begin(NULL_HEALTH_TIMEOUT="0.5") as worker:
        consumer.status = 302
        assert (await worker.line("consumer_unhealthy"))["why"] == f"{consumer.url} answered 302"
        consumer.status = 200
        await worker.line("consumer_healthy", nth=2)
        consumer.status = None
        line = await worker.line("consumer_unhealthy", nth=2)
        assert line["why"] == f"{consumer.url} did not answer in 0.5 s"
        consumer.status = 200
        await worker.line("consumer_healthy", nth=3)
        await consumer.stop()
        line = await worker.line("consumer_unhealthy", nth=3)
        assert line["why"].startswith(f"{consumer.url} cannot be reached: ")


async def http_status(worker: WorkerProcess, path: str) -> int:
    async with aiohttp.ClientSession() as http, http.get(worker.control + path) as answer:
        return answer.status


async def test_readiness_names_each_check_and_status_tells_the_rest(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    assert await http_status(worker, "/readyz") == 200
    ready = await worker.get("/readyz")
    assert (ready["ready"], ready["state"]) == (True, "ready")
    assert set(ready["checks"]) == {"log", "key", "consumer", "draining"}
    assert all(check["ok"] and check["why"] for check in ready["checks"].values())
    held, _ = [await reserve(worker, vast) for _ in range(2)]
    status = await worker.get("/status")
    assert (status["state"], status["version"], status["url"]) == ("ready", __version__, worker.url)
    assert status["held"]["id"] == held.id
    assert (status["queue"]["length"], status["queue"]["limit"]) == (1, 1000)
    assert (status["autoscaler"]["reports_to"], status["autoscaler"]["key_loaded"]) == ([vast.url], True)
    assert (status["log"]["last_seq"], status["log"]["unwritten"]) == (3, 0)
    assert status["consumer"]["healthy"] is None


@pytest.mark.parametrize("env", [{}, {"BACKEND_HEALTH_URL": "http://127.0.0.1:9/health"}])
async def test_the_stub_of_a_health_endpoint_is_there_unless_a_real_one_is_named(
    tmp_path: Path, env: dict[str, Any]
) -> None:
    async with WorkerProcess(tmp_path, **env) as worker:
        assert await http_status(worker, "/health") == (404 if env else 200)
        assert await http_status(worker, "/readyz") == (503 if env else 200)


async def test_after_a_restart_a_dead_consumer_that_was_healthy_is_unhealthy_and_not_starting(
    begin: Begin, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    async with begin() as worker:
        await worker.kill()
        consumer.status = 500
        seen = len(vast.statuses)
        await worker.start()
        await worker.line("consumer_unhealthy")
        errored = await vast.wait_for(lambda: [status for status in vast.statuses[seen:] if status["error_msg"]])
        assert errored[0]["error_msg"] == f"the consumer is unhealthy: {consumer.url} answered 500"
        assert (await worker.get("/readyz"))["state"] == "errored"
        consumer.status = 200
        await worker.line("consumer_healthy")
        assert (await worker.get("/readyz"))["state"] == "ready"


async def test_after_a_restart_a_held_session_of_a_dead_consumer_ends(tmp_path: Path, consumer: Consumer) -> None:
    """Also when nobody knows whether the consumer was ever healthy."""
    consumer.status = 503
    leave_session(tmp_path / "nullworker.db", begun=SystemClock().now())
    env = {"NULL_HEALTH_INTERVAL": "0.02", "NULL_UNHEALTHY_ACTION": "cancel", "BACKEND_HEALTH_URL": consumer.url}
    async with WorkerProcess(tmp_path, module=("-m", "nullworker", "serve"), **env) as worker:
        end = await worker.line("reservation_cancelled")
        assert (end["reservation_id"], end["reason"]) == ("old", "consumer_unhealthy")


async def test_a_start_that_takes_too_long_is_logged_and_told_to_the_autoscaler(
    tmp_path: Path, vast: FakeAutoscaler, consumer: Consumer
) -> None:
    room = "nullworker__consumer_health__"
    late = {f"{room}SLOW_START_SECONDS": 0.1, f"{room}LATE_START_SECONDS": 0.3}
    env = {"BACKEND_HEALTH_URL": consumer.url, "NULL_HEALTH_INTERVAL": "0.02"}
    async with secured(tmp_path, vast, module=changed(**late), **env) as worker:
        assert (await worker.line("consumer_starts_slowly"))["why"] == f"{consumer.url} answered 503"
        told = await vast.wait_for(lambda: [status for status in vast.statuses if status["error_msg"]])
        assert told[0]["error_msg"].startswith(f"the consumer has not been healthy yet: {consumer.url} answered 503")
        assert (await worker.get("/readyz"))["state"] == "starting"
        for event in ("consumer_starts_slowly", "consumer_is_late"):
            assert [line["event"] for line in worker.lines].count(event) == 1
        seen = len(vast.statuses)
        consumer.status = 200
        await worker.line("consumer_healthy")
        assert await vast.wait_for(lambda: [status for status in vast.statuses[seen:] if not status["error_msg"]])
