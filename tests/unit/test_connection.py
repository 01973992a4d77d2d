"""The autoscaler client with unusual answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from strangers import answering

from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.messages import KEY_PATH, STATUS_PATH
from nullworker.testing.keys import load_or_make, public_pem

PEM = public_pem(load_or_make()).encode()


@contextlib.asynccontextmanager
async def linked(
    *pieces: bytes, go_on: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
) -> AsyncIterator[AutoscalerClient]:
    """A autoscaler to an address that answers with these bytes, and waits before each further piece."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for number, piece in enumerate(pieces):
            if number:
                await go_on()
            writer.write(piece)
            await writer.drain()

    async with answering(answer) as place:
        autoscaler = AutoscalerClient([f"http://{place}"])
        try:
            yield autoscaler
        finally:
            await autoscaler.close()


async def test_a_key_that_comes_in_pieces_is_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    was_read = asyncio.Event()
    read = aiohttp.StreamReader.read

    async def reading(stream: aiohttp.StreamReader, most: int = -1) -> bytes:
        got = await read(stream, most)
        was_read.set()
        return got

    monkeypatch.setattr(aiohttp.StreamReader, "read", reading)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PEM)
    async with linked(head + PEM[:100], PEM[100:], go_on=was_read.wait) as autoscaler:
        assert await autoscaler.fetch_key() is not None


async def test_a_key_without_end_is_no_key() -> None:
    async with linked(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000) as autoscaler:
        assert await autoscaler.fetch_key() is None
        assert autoscaler.trouble == f"{autoscaler.addresses[0]}{KEY_PATH} answered something that is no RSA key in PEM"


@pytest.mark.parametrize("status", [b"101 Switching Protocols", b"304 Not Modified", b"500 No"])
async def test_only_a_success_is_a_delivery(status: bytes) -> None:
    async with linked(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as autoscaler:
        assert await autoscaler.post(STATUS_PATH, {}) == "failed"
    async with linked(b"HTTP/1.1 204 No Content\r\n\r\n") as autoscaler:
        assert await autoscaler.post(STATUS_PATH, {}) == "ok"
