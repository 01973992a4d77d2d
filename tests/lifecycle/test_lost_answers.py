"""Answers that are lost on the way: the caller asks the same worker again, and nothing is held or run twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from harness import PATIENCE, WorkerProcess, secured
from programs import free_port

from nullworker.client import WorkerSession, hold
from nullworker.testing import FakeAutoscaler


class Cutter:
    """A TCP proxy that cuts a connection when the worker says one of `words`, before its client hears it; once each."""

    def __init__(self, *words: bytes) -> None:
        self.words, self.port, self.cuts = list(words), free_port(), 0
        self.to = 0

    async def __aenter__(self) -> Cutter:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.to)
        asking = asyncio.ensure_future(_copy(reader, back))
        with contextlib.suppress(ConnectionError):
            while data := await there.read(65536):
                if any(word in data for word in self.words):
                    self.words = [word for word in self.words if word not in data]
                    self.cuts += 1
                    break
                writer.write(data)
                await writer.drain()
        asking.cancel()
        back.close()
        writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)


@contextlib.asynccontextmanager
async def behind(cutter: Cutter, vast: FakeAutoscaler, folder: Path) -> AsyncIterator[WorkerProcess]:
    """A worker whose address, as the autoscaler has it, is the cutter's."""
    port = free_port()
    cutter.to = port
    env = {"WORKER_PORT": str(port), f"VAST_TCP_PORT_{port}": str(cutter.port), "PUBLIC_IPADDR": "127.0.0.1"}
    async with cutter, secured(folder, vast, **env) as worker:
        await vast.wait_for(lambda: vast.fleet.ready(vast.statuses[-1]["received_at"]) if vast.statuses else None)
        yield worker


async def test_a_lost_answer_to_create_makes_no_second_session(
    vast: FakeAutoscaler, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    cutter = Cutter(b"session_id")
    async with behind(cutter, vast, tmp_path) as worker:
        url = f"http://127.0.0.1:{cutter.port}"
        session = WorkerSession(url, vast.grant(url), {"lifetime": 30})
        await session.create(http)
        assert cutter.cuts == 1
        assert session.session_id == (await worker.get("/reservation"))["id"]
        assert worker.sql("SELECT count(*) FROM reservations") == [(1,)]


async def test_the_lost_last_word_of_a_request_is_asked_for(vast: FakeAutoscaler, tmp_path: Path) -> None:
    cutter = Cutter(b'"kind":"released"')
    async with behind(cutter, vast, tmp_path) as worker:
        holding = asyncio.ensure_future(hold("null", autoscaler=vast.url, duration=60, metadata={"job": 5}))
        held = await worker.line("reservation_held")
        await worker.release(result={"rows": 3})
        answer = await asyncio.wait_for(holding, PATIENCE)
        assert cutter.cuts == 1
        assert (answer["released"], answer["result"]) == ("explicit", {"rows": 3})
        assert answer["reservation_id"] == held["reservation_id"]
        assert worker.sql("SELECT count(*) FROM events WHERE kind = 'held'") == [(1,)], "and not held again"


async def test_the_key_of_the_account_is_never_sent_to_a_worker(tmp_path: Path) -> None:
    seen: list[bytes] = []

    class Listening(Cutter):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner = asyncio.StreamReader()
            feeding = asyncio.ensure_future(self._feed(reader, inner))
            await super()._serve(inner, writer)
            feeding.cancel()

        async def _feed(self, reader: asyncio.StreamReader, inner: asyncio.StreamReader) -> None:
            while data := await reader.read(65536):
                seen.append(data)
                inner.feed_data(data)
            inner.feed_eof()

    async with FakeAutoscaler(api_key="acc0unt-key") as vast, behind(Listening(), vast, tmp_path) as worker:
        holding = asyncio.ensure_future(hold("null", autoscaler=vast.url, api_key="acc0unt-key", duration=60))
        await worker.line("reservation_held")
        await worker.release()
        await asyncio.wait_for(holding, PATIENCE)
    sent = b"".join(seen)
    assert b"POST /reserve" in sent
    assert b"acc0unt-key" not in sent
    assert b"api_key" not in sent
