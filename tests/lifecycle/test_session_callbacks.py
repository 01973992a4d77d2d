"""on_close_route: a session's owner is told of its end at least once, whatever ended it, and over restarts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from harness import Answer, WorkerProcess, leave_session, post
from strangers import answering, echo

from nullworker.clock import SystemClock

Json = dict[str, Any]
DAY = 86_400.0
LARGEST = 64 * 1024


class Receiver:
    """Somebody's server. `answers` are the next statuses, then 200; None takes the call in and never answers."""

    def __init__(self, *answers: int | None) -> None:
        self.calls: asyncio.Queue[Json] = asyncio.Queue()
        self.answers = list(answers)
        self.health = 200
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Receiver:
        app = web.Application()
        app.router.add_post("/closed", self._closed)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.url = self.base + "/closed"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        await self._runner.cleanup()

    async def call(self) -> Json:
        """The next call."""
        return await asyncio.wait_for(self.calls.get(), 20)

    async def _closed(self, request: web.Request) -> web.Response:
        answer = self.answers.pop(0) if self.answers else 200
        self.calls.put_nowait(await request.json())
        if answer is None:
            await self._closing.wait()
        return web.Response(status=answer or 500, headers={"Location": self.base + "/health"})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(tmp_path) as worker:
        yield worker


async def create(worker: WorkerProcess, route: str | None, payload: Any = None, lifetime: float = 60) -> Answer:
    body = {"lifetime": lifetime, "on_close_route": route, "on_close_payload": payload}
    sent = json.dumps(body, ensure_ascii=False).encode()
    async with aiohttp.ClientSession() as http, http.post(worker.url + "/session/create", data=sent) as answer:
        return Answer(answer.status, await answer.json(), answer.headers)


async def end(worker: WorkerProcess, session_id: str) -> None:
    answer = await post(worker.url + "/session/end", {"session_id": session_id})
    assert answer.status == 200


def owed(worker: WorkerProcess) -> list[tuple[Any, ...]]:
    return worker.sql("SELECT seq FROM callbacks")


@pytest.mark.parametrize(
    ("how", "state", "reason"),
    [
        ("its owner", "released", "session_end"),
        ("the consumer", "released", "explicit"),
        ("its lifetime", "expired", "duration_elapsed"),
        ("a sick consumer", "cancelled", "consumer_unhealthy"),
    ],
)
async def test_every_end_of_a_session_calls_its_route(
    tmp_path: Path, receiver: Receiver, how: str, state: str, reason: str
) -> None:
    env: dict[str, Any] = {
        "BACKEND_HEALTH_URL": receiver.base + "/health",
        "NULL_UNHEALTHY_ACTION": "cancel",
        "NULL_HEALTH_INTERVAL": "0.1",
    }
    async with WorkerProcess(tmp_path, **(env if how == "a sick consumer" else {})) as worker:
        if how == "a sick consumer":
            await worker.line("consumer_healthy")
        created = await create(worker, receiver.url, {"job": 12}, lifetime=0.2 if how == "its lifetime" else 60)
        session_id = created.body["session_id"]
        if how == "its owner":
            await end(worker, session_id)
        elif how == "the consumer":
            await worker.release()
        receiver.health = 500
        assert await receiver.call() == {"job": 12, "session_id": session_id, "state": state, "reason": reason}
        await worker.line("callback_delivered", where=lambda line: line["reservation_id"] == session_id)
        assert owed(worker) == []
        assert await worker.metric("nullworker_session_callbacks_total", result="delivered") == 1
        assert receiver.calls.empty()


@pytest.mark.parametrize(
    ("payload", "theirs"),
    [
        ({"session_id": "x", "state": "y", "reason": "z"}, {}),  # ours stand, whatever theirs are called
        ([1, 2], {"payload": [1, 2]}),
        (None, {}),
    ],
)
async def test_their_payload_stands_beside_our_words(
    worker: WorkerProcess, receiver: Receiver, payload: Any, theirs: Json
) -> None:
    session_id = (await create(worker, receiver.url, payload)).body["session_id"]
    await end(worker, session_id)
    told = {"session_id": session_id, "state": "released", "reason": "session_end"}
    assert await receiver.call() == {**theirs, **told}


async def test_a_session_that_was_refused_is_no_end_to_tell_of(worker: WorkerProcess, receiver: Receiver) -> None:
    first = (await create(worker, receiver.url)).body["session_id"]
    assert (await create(worker, receiver.url)).status == 429
    await end(worker, first)
    assert (await receiver.call())["session_id"] == first
    await worker.line("callback_delivered", where=lambda line: line["reservation_id"] == first)
    assert worker.sql("SELECT count(*) FROM settled") == [(1,)]
    assert owed(worker) == []


async def test_without_a_route_there_is_no_callback(worker: WorkerProcess) -> None:
    await end(worker, (await create(worker, None)).body["session_id"])
    assert owed(worker) == []


@pytest.mark.parametrize("status", [500, 404, 302])
async def test_a_call_that_fails_is_made_again(worker: WorkerProcess, receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    session_id = (await create(worker, receiver.url)).body["session_id"]
    await end(worker, session_id)
    first = await receiver.call()
    failed = await worker.line("callback_failed")
    assert str(status) in failed["why"]
    assert len(owed(worker)) == 1
    assert await receiver.call() == first
    await worker.line("callback_delivered")
    assert owed(worker) == []
    assert worker.sql("SELECT name, outcome FROM settled") == [("callbacks", "delivered")]


async def test_a_callback_that_fails_does_not_hold_up_the_next_session(
    worker: WorkerProcess, receiver: Receiver
) -> None:
    receiver.answers = [None]
    first = (await create(worker, receiver.url)).body["session_id"]
    await end(worker, first)
    assert (await receiver.call())["session_id"] == first
    second = (await create(worker, receiver.url)).body["session_id"]
    await end(worker, second)
    assert (await receiver.call())["session_id"] == second
    await worker.line("callback_delivered", where=lambda line: line["reservation_id"] == second)
    assert len(owed(worker)) == 1


@pytest.mark.parametrize("answer", [503, None])
async def test_a_callback_is_owed_over_a_kill(worker: WorkerProcess, receiver: Receiver, answer: int | None) -> None:
    receiver.answers = [answer]
    session_id = (await create(worker, receiver.url, {"job": 12})).body["session_id"]
    await end(worker, session_id)
    first = await receiver.call()
    await worker.kill()
    await worker.start()
    assert await receiver.call() == first  # at least once: the receiver knows it by its id
    await worker.line("callback_delivered")
    assert owed(worker) == []


async def test_a_session_that_ran_out_while_the_worker_was_away_is_told_at_the_start(
    tmp_path: Path, receiver: Receiver
) -> None:
    worker = WorkerProcess(tmp_path)
    leave_session(worker.db, route=receiver.url, begun=SystemClock().now() - 120, ended=None)
    async with worker:
        told = {"session_id": "old", "state": "expired", "reason": "duration_elapsed"}
        assert await receiver.call() == told


async def test_a_day_after_the_end_a_callback_is_given_up_loudly(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers = [500]
    worker = WorkerProcess(tmp_path)
    begun = SystemClock().now() - DAY - 120
    leave_session(worker.db, route=receiver.url, begun=begun, ended=begun + 60)
    async with worker:
        await receiver.call()
        line = await worker.line("callback_given_up")
        assert (line["level"], line["reservation_id"]) == ("error", "old")
        assert await worker.metric("nullworker_session_callbacks_total", result="given_up") == 1
        assert worker.sql("SELECT outcome FROM settled") == [("given_up",)]
        assert owed(worker) == []
        await worker.terminate()
        await worker.start()
        await end(worker, (await create(worker, receiver.url)).body["session_id"])
        assert (await receiver.call())["session_id"] != "old"


async def test_a_drain_keeps_pending_callbacks(worker: WorkerProcess, receiver: Receiver) -> None:
    receiver.answers = [None]
    session_id = (await create(worker, receiver.url)).body["session_id"]
    await end(worker, session_id)
    await receiver.call()
    assert await worker.terminate() == 0
    assert len(owed(worker)) == 1


async def test_a_route_to_a_port_of_the_worker_is_refused(worker: WorkerProcess) -> None:
    for port in (worker.port, worker.control_port, worker.port + 1):
        for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]", "0.0.0.0"):
            await refused(worker, f"http://{host}:{port}/release")


async def test_a_route_that_is_no_absolute_http_url_is_refused(worker: WorkerProcess) -> None:
    for route in ("/release", "release", "", "ftp://192.0.2.1/x", "http://", "http:///x", "http://192.0.2.1:99999/", 5):
        await refused(worker, route)


async def test_a_route_to_the_public_address_of_the_worker_is_refused(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, PUBLIC_IPADDR="192.0.2.7", VAST_TCP_PORT_0="41234") as worker:
        await refused(worker, "http://192.0.2.7:41234/session/end")


@pytest.mark.parametrize("payload", ["x" * (LARGEST - 2), "é" * (LARGEST // 2 - 1)])
async def test_a_payload_and_a_route_of_more_than_64_kib_are_refused(worker: WorkerProcess, payload: str) -> None:
    await refused(worker, "http://192.0.2.1/", payload + "x", name="on_close_payload")
    await refused(worker, None, payload + "x", name="on_close_payload")
    await refused(worker, "http://192.0.2.1/" + payload)
    assert (await create(worker, None, payload)).status == 201


async def refused(worker: WorkerProcess, route: Any, payload: Any = None, name: str = "on_close_route") -> None:
    answer = await create(worker, route, payload)
    assert answer.status == 422
    assert list(answer.body["payload"]) == [name]
    assert worker.story() == []


async def test_nothing_of_a_route_is_told_of_a_call_that_fails(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path)
    async with answering(echo) as place:
        begun = SystemClock().now() - DAY - 120
        leave_session(worker.db, route=f"http://{place}/done?token=SECRET", begun=begun, ended=begun + 60)
        async with worker:
            await worker.line("callback_given_up")
            assert worker.sql("SELECT detail FROM settled") == [("it does not speak HTTP",)]
            assert "SECRET" not in json.dumps(worker.lines)
