"""The asyncio client of the control port: what it makes of each answer, and of none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from programs import dead_address
from strangers import answering

from nullworker.consumer import control_port
from nullworker.consumer.control_port import AsyncControlClient
from nullworker.errors import WorkerUnreachable


def answer(status: int, body: str = "") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body.encode())


class Worker:
    """Gives this answer, or none while it is None."""

    def __init__(self) -> None:
        self.gives: bytes | None = None
        self.asked: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode().partition(" HTTP")[0])
        if self.gives is None:
            await asyncio.Event().wait()
        writer.write(self.gives or b"")
        await writer.drain()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def client(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncControlClient]:
    monkeypatch.setattr(control_port, "ANSWER_SECONDS", 0.5)
    async with answering(worker.answer) as place:
        client = AsyncControlClient(f"http://{place}/")
        async with client.http:
            yield client


@pytest.mark.parametrize(
    ("gives", "held"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (answer(200, '{"id": "r1"}'), {"id": "r1"}),
    ],
)
async def test_what_is_held_or_none(worker: Worker, client: AsyncControlClient, gives: bytes, held: Any) -> None:
    worker.gives = gives
    assert await client.held() == held
    assert await client.held(wait=30.0) == held
    assert worker.asked == ["GET /reservation?wait=0", "GET /reservation?wait=30"]


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        (answer(404, '{"error": "no"}'), "URL/reservation answers 404: {'error': 'no'}"),
        (answer(500, '{"error": "a fault"}'), "URL/reservation?wait=0 answers 500: {'error': 'a fault'}"),
        (answer(503, ""), "URL/reservation?wait=0 answers 503: None"),
        (answer(200, "<html>"), "no worker answers on URL (Expecting value: line 1 column 1 (char 0))"),
        (b"", "no worker answers on URL (Server disconnected)"),
        (None, "no worker answers on URL (TimeoutError)"),
    ],
    ids=["another program", "a fault", "a proxy", "no JSON", "no answer", "no answer in time"],
)
async def test_what_is_no_answer_of_a_worker(
    worker: Worker, client: AsyncControlClient, gives: bytes | None, why: str
) -> None:
    worker.gives = gives
    with pytest.raises(WorkerUnreachable, match=f"^{re.escape(why.replace('URL', client.url))}$"):
        await client.held()


async def test_a_port_where_nobody_listens() -> None:
    client = AsyncControlClient(dead_address())
    place = re.escape(client.url.removeprefix("http://"))
    why = rf"^no worker answers on http://{place} \(Cannot connect to host {place} \[.*\]\)$"
    async with client.http:
        with pytest.raises(WorkerUnreachable, match=why):
            await client.held()


async def test_refusals_are_answers(worker: Worker, client: AsyncControlClient) -> None:
    worker.gives = answer(422, '{"result": "too large"}')
    assert await client.post("/release", {"result": "x"}) == (422, {"result": "too large"})


@pytest.mark.parametrize("body", [{"result": float("nan")}, {"result": {1, 2}}])
async def test_what_is_no_json_is_not_sent(worker: Worker, client: AsyncControlClient, body: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        await client.post("/release", body)
    assert worker.asked == []


@pytest.mark.parametrize(
    ("gives", "known", "fate"),
    [
        (
            answer(200, '{"reservations": [{"id": "r2"}, {"id": "r 1", "state": "expired", "reason": "busy"}]}'),
            {"id": "r 1", "state": "expired", "reason": "busy"},
            "expired, busy",
        ),
        (answer(200, '{"reservations": []}'), None, "the worker does not hold it any more"),
        (answer(404, ""), None, "the worker does not hold it any more"),
    ],
)
async def test_how_one_has_ended(
    worker: Worker, client: AsyncControlClient, gives: bytes, known: Any, fate: str
) -> None:
    worker.gives = gives
    assert await client.known("r 1") == known
    assert await client.fate("r 1") == fate
    assert set(worker.asked) == {"GET /reservations?id=r%201"}
