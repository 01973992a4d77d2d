"""The autoscaler client with unusual answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from programs import dead_address
from strangers import answering

from nullworker.autoscaler import connection
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.messages import KEY_PATH, STATUS_PATH
from nullworker.testing.keys import load_or_make, public_pem

PEM = public_pem(load_or_make()).encode()


@contextlib.asynccontextmanager
async def linked(
    *pieces: bytes, go_on: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
) -> AsyncIterator[AutoscalerClient]:
    """A client of an address that answers with these bytes, and waits before each further piece."""

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


class Address:
    """An autoscaler's address that gives each call this answer: a status, or None for none; `asked` counts them."""

    def __init__(self, answer: int | None) -> None:
        self.answer, self.asked = answer, 0

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            if self.answer is None:
                await reader.read()
                return
            body = PEM if self.answer == 200 else b""
            writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\n" % self.answer)
            writer.write(b"Location: /moved\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()

        async with answering(answer) as place:
            yield f"http://{place}"


@contextlib.asynccontextmanager
async def asked(*answers: int | None) -> AsyncIterator[tuple[AutoscalerClient, list[Address]]]:
    """A client of addresses with these answers."""
    addresses = [Address(answer) for answer in answers]
    async with contextlib.AsyncExitStack() as stack:
        autoscaler = AutoscalerClient([await stack.enter_async_context(each.opened()) for each in addresses])
        stack.push_async_callback(autoscaler.close)
        yield autoscaler, addresses


REFUSALS = (400, 402, 406, 409, 410, 411, 413, 415, 422, 431)
OF_THE_MOMENT = (300, 301, 307, 401, 403, 404, 405, 407, 408, 421, 423, 425, 429, 500, 502, 503)


@pytest.mark.parametrize("status", [*REFUSALS, *OF_THE_MOMENT])
async def test_what_speaks_of_the_body_is_a_refusal_and_all_else_is_not(status: int) -> None:
    async with asked(status) as (autoscaler, _):
        assert await autoscaler.post("/path/", {}) == ("refused" if status in REFUSALS else "failed")
        assert autoscaler.trouble == f"{autoscaler.addresses[0]}/path/ answered {status}"


@pytest.mark.parametrize(
    ("answers", "delivery"),
    [
        ((400, 422), "refused"),
        ((400, 500), "failed"),
        ((500, 400), "failed"),
        ((400, 200), "ok"),
        ((401, 400), "failed"),
        ((307, 307), "failed"),
    ],
)
async def test_what_one_address_refuses_is_refused_only_when_all_do(answers: tuple[int, ...], delivery: str) -> None:
    async with asked(*answers) as (autoscaler, addresses):
        assert await autoscaler.post("/path/", {}) == delivery
        assert [address.asked for address in addresses] == [1, 1]
        assert (autoscaler.trouble is None) == (delivery == "ok")


async def test_what_one_address_refuses_is_not_refused_while_another_is_down() -> None:
    async with asked(400) as (autoscaler, _):
        both = AutoscalerClient([dead_address(), *autoscaler.addresses])
        assert await both.post("/path/", {}) == "failed"
        await both.close()


async def test_the_address_that_was_good_last_is_asked_first() -> None:
    async with asked(500, 200, 200) as (autoscaler, addresses):
        for _ in range(3):
            assert await autoscaler.post("/path/", {}) == "ok"
        assert [address.asked for address in addresses] == [1, 3, 0]
        addresses[1].answer, addresses[0].answer = 500, 200
        for _ in range(2):
            assert await autoscaler.post("/path/", {}) == "ok"
        assert [address.asked for address in addresses] == [3, 4, 0], "the others in the order in which they stand"
        assert await autoscaler.fetch_key() is not None
        assert [address.asked for address in addresses] == [4, 4, 0]


async def test_an_address_that_is_silent_costs_little_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection.SILENT_SECONDS <= 2
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.3)
    async with asked(None, None, 200) as (autoscaler, addresses):
        began = time.monotonic()
        for _ in range(2):
            assert await autoscaler.fetch_key() is not None
            assert await autoscaler.post("/path/", {}) == "ok"
        assert time.monotonic() - began < connection.CALL_SECONDS / 2, "nobody waits for those who are silent"
        assert [address.asked for address in addresses] == [1, 1, 4]


async def test_an_address_that_is_slow_is_heard_while_the_next_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.01)
    next_is_asked = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await next_is_asked.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def hangs(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        next_is_asked.set()
        await reader.read()

    async with answering(slow) as first, answering(hangs) as second:
        autoscaler = AutoscalerClient([f"http://{first}", f"http://{second}"])
        assert await autoscaler.post("/path/", {}) == "ok"
        await autoscaler.close()


async def test_an_address_that_is_slow_is_heard_after_the_next_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.01)
    next_has_failed = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await next_has_failed.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def fails(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        asyncio.get_running_loop().call_later(0.3, next_has_failed.set)

    async with answering(slow) as first, answering(fails) as second:
        autoscaler = AutoscalerClient([f"http://{first}", f"http://{second}"])
        assert await autoscaler.post("/path/", {}) == "ok"
        assert autoscaler.trouble is None
        await autoscaler.close()


async def test_the_key_is_that_of_the_first_address_that_has_one() -> None:
    async with asked(404, 200) as (autoscaler, _):
        assert await autoscaler.fetch_key() is not None


async def test_a_call_that_no_address_answers_ends_in_time() -> None:
    async with asked(None) as (autoscaler, addresses):
        began = time.monotonic()
        assert await autoscaler.post("/path/", {}, seconds=0.1) == "failed"
        assert time.monotonic() - began < connection.CALL_SECONDS / 2
        assert addresses[0].asked == 1


async def test_the_key_is_taken_from_no_other_host_than_the_one_that_was_asked() -> None:
    async with asked(200) as (elsewhere, addresses):
        for to in (elsewhere.addresses[0], elsewhere.addresses[0].replace("http:", "")):
            head = f"HTTP/1.1 302 Found\r\nLocation: {to}{KEY_PATH}\r\nContent-Length: 0\r\n\r\n"
            async with linked(head.encode()) as autoscaler:
                assert await autoscaler.fetch_key() is None
                assert autoscaler.trouble == f"{autoscaler.addresses[0]}{KEY_PATH} answered 302"
        assert addresses[0].asked == 0


async def test_nothing_shows_the_password_of_an_address() -> None:
    async with asked(500) as (autoscaler, _):
        address = autoscaler.addresses[0].replace("http://", "http://user:SECRET@")
        for client in (AutoscalerClient([address]), AutoscalerClient([dead_address().replace("//", "//u:SECRET@")])):
            assert await client.post("/path/", {}) == "failed"
            shown = f"{client.trouble} {client.addresses}"
            assert await client.fetch_key() is None
            assert "SECRET" not in f"{shown} {client.trouble}"
            assert "***@127.0.0.1" in shown
            await client.close()


async def test_the_environments_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asked(200, 502) as (autoscaler, addresses):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, autoscaler.addresses[1])
        here, away = AutoscalerClient(autoscaler.addresses[:1]), AutoscalerClient(["http://autoscaler.example"])
        local = AutoscalerClient([autoscaler.addresses[0].replace("127.0.0.1", "localhost")])
        for client, delivery in ((here, "ok"), (local, "ok"), (away, "failed")):
            assert await client.post("/path/", {}) == delivery
            await client.close()
        assert [address.asked for address in addresses] == [2, 1]


@pytest.mark.parametrize("status", [b"101 Switching Protocols", b"304 Not Modified", b"500 No"])
async def test_only_a_success_is_a_delivery(status: bytes) -> None:
    async with linked(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as autoscaler:
        assert await autoscaler.post(STATUS_PATH, {}) == "failed"
    async with linked(b"HTTP/1.1 204 No Content\r\n\r\n") as autoscaler:
        assert await autoscaler.post(STATUS_PATH, {}) == "ok"
