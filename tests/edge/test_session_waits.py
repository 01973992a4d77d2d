"""/reserve with a session_id waits for the end of that session without affecting it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

import aiohttp
import pytest
from harness import WorkerProcess, post, signed

from nullworker.testing import FakeAutoscaler

HEADER = "Nullworker-Reservation"


class Session(NamedTuple):
    """An open session."""

    worker: WorkerProcess
    id: str
    auth: dict[str, Any]

    async def end(self) -> None:
        named = {"session_id": self.id, "session_auth": self.auth}
        assert (await post(self.worker.url + "/session/end", named)).status == 200


@pytest.fixture
async def session(vast: FakeAutoscaler, worker: WorkerProcess) -> Session:
    body = signed(vast, worker.url, {"lifetime": 60})
    created = await post(worker.url + "/session/create", body)
    return Session(worker, created.body["session_id"], body["auth_data"])


async def metrics(worker: WorkerProcess) -> str:
    async with aiohttp.ClientSession() as http, http.get(worker.control + "/metrics") as answer:
        return await answer.text()


async def test_reserve_with_a_session_id_waits_for_its_end(
    vast: FakeAutoscaler, worker: WorkerProcess, session: Session
) -> None:
    session_id = session.id
    plain = await Waiting.begin(vast, worker, session_id)
    stream = await Waiting.begin(vast, worker, session_id, stream=True)
    await worker.release(reservation_id=session_id, result={"rows": 3})
    head, body = await plain.answer()
    assert " 200 " in head[0]
    assert f"{HEADER}: {session_id}" in head
    verdict = json.loads(body)
    assert (verdict["released"], verdict["reservation_id"]) == ("explicit", session_id)
    assert verdict["result"] == {"rows": 3}
    _, streamed = await stream.answer()
    assert [line for line in streamed.splitlines() if line.startswith("data: ")][-1] == f"data: {body}"
    assert worker.sql("SELECT count(*) FROM reservations") == [(1,)]


class Waiting:
    """A /reserve that the worker is known to have read, since it has answered what came in after it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def begin(cls, vast: FakeAutoscaler, worker: WorkerProcess, session_id: str, **payload: Any) -> Waiting:
        body = json.dumps(signed(vast, worker.url, payload, session_id=session_id)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        head = "POST /reserve HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        for _ in range(3):
            await worker.get("/status")
        return cls(reader, writer)

    async def answer(self) -> tuple[list[str], str]:
        head, _, body = (await self._reader.read()).decode().partition("\r\n\r\n")
        self._writer.close()
        return head.splitlines(), body


async def test_hanging_up_while_waiting_for_a_session_does_not_end_it(
    vast: FakeAutoscaler, worker: WorkerProcess, session: Session
) -> None:
    waiting = await Waiting.begin(vast, worker, session.id)
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            worker.url + "/reserve", json=signed(vast, worker.url, {"stream": True}, session_id=session.id)
        ) as answer,
    ):
        await answer.content.readline()  # it is heard, and hangs up
    while 'route="/reserve",status="499"' not in await metrics(worker):
        pass
    assert (await worker.get("/reservation"))["id"] == session.id
    await session.end()
    assert '"session_end"' in (await waiting.answer())[1]


async def test_to_wait_for_an_unknown_session_is_410(
    vast: FakeAutoscaler, worker: WorkerProcess, session: Session
) -> None:
    unknown = signed(vast, worker.url, session_id="never-was")
    assert (await post(worker.url + "/reserve", unknown)).status == 410
    await session.end()
    assert (await post(worker.url + "/reserve", signed(vast, worker.url, session_id=session.id))).status == 410
    assert worker.sql("SELECT count(*) FROM reservations") == [(1,)]
