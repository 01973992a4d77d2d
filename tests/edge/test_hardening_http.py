"""Malformed HTTP and malformed bodies: answered in JSON, and the connection is closed."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from doors import EMPTY, HEAD, Door

from nullworker.control_client import MAX_BODY_BYTES
from nullworker.http import bodies

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with Door().opened() as door:
        yield door


NO_HTTP: dict[str, tuple[int, bytes]] = {
    "words": (400, b"HELLO\r\n\r\n"),
    "tls": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)),
    "http/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "http/9.9": (400, b"GET / HTTP/9.9\r\nHost: here\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, HEAD + b"Host: there\r\n\r\n"),
    "length and chunks": (400, HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks and length": (400, CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "a list of lengths": (400, HEAD + b"Content-Length: 5, 5\r\n\r\nhello"),
    "a negative length": (400, HEAD + b"Content-Length: -1\r\n\r\n"),
    "a signed length": (400, HEAD + b"Content-Length: +5\r\n\r\nhello"),
    "a hexadecimal length": (400, HEAD + b"Content-Length: 0x5\r\n\r\nhello"),
    "an endless length": (400, HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"),
    "an unknown coding": (400, HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunks that are not last": (400, HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    "chunks twice": (400, CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a hidden coding": (400, HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n"),
    "a name with a space": (400, HEAD + b"Content-Length : 5\r\n\r\nhello"),
    "no name": (400, HEAD + b": 5\r\n\r\n"),
    "a folded header": (400, HEAD + b"X: a\r\n b\r\n\r\n"),
    "a bare line feed": (400, b"POST /echo HTTP/1.1\nHost: here\n\n"),
    "a bare carriage return": (400, HEAD + b"X: a\rb\r\n\r\n"),
    "a null byte": (400, HEAD + b"X: a\0b\r\n\r\n"),
    "a path that is none": (400, b"GET http://[::1 HTTP/1.1\r\nHost: here\r\n\r\n"),
    "a size that is none": (400, CHUNKED + b"\r\nzz\r\nhello\r\n0\r\n\r\n"),
    "a negative size": (400, CHUNKED + b"\r\n-5\r\nhello\r\n0\r\n\r\n"),
    "an endless size": (400, CHUNKED + b"\r\n" + b"f" * 19 + b"\r\nhello\r\n0\r\n\r\n"),
    "a chunk that does not end": (400, CHUNKED + b"\r\n5\r\nhelloXX0\r\n\r\n"),
    "a long line": (431, b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: here\r\n\r\n"),
    "a long header": (431, HEAD + b"X: " + b"a" * 10_000 + b"\r\n\r\n"),
    "a long name": (431, HEAD + b"X" * 10_000 + b": a\r\n\r\n"),
    "many headers": (431, HEAD + b"X: a\r\n" * 200 + b"\r\n"),
    "many trailers": (431, CHUNKED + b"\r\n0\r\n" + b"X: a\r\n" * 200 + b"\r\n"),
}


@pytest.mark.parametrize("case", NO_HTTP)
async def test_malformed_http_gets_json_and_is_closed(door: Door, case: str) -> None:
    status, sent = NO_HTTP[case]
    wire = await door.connect(sent)
    answer = await wire.answer()
    assert (answer.status, list(answer.body)) == (status, ["error"])
    assert (answer.headers["content-type"], answer.headers["server"]) == ("application/json", "nullworker")
    assert await wire.end() == b""
    assert [status for _, _, status in door.counted] == [status]
    await wire.close()


@pytest.mark.parametrize("before", [HEAD, CHUNKED + b"\r\n0\r\n"], ids=["headers", "trailers"])
async def test_a_hundred_thousand_headers_are_not_read(door: Door, before: bytes) -> None:
    wire = await door.connect(before + b"X: a\r\n" * 100_000)
    await wire.end()  # the answer may be lost: the kernel resets a line on which bytes are left unread
    assert [status for _, _, status in door.counted] == [431]
    await wire.close()


async def test_a_smuggled_request_is_not_answered(door: Door) -> None:
    wire = await door.connect(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EMPTY)
    assert (await wire.answer()).status == 400
    assert await wire.end() == b""
    assert [status for _, _, status in door.counted] == [400]
    await wire.close()


async def test_no_answer_is_kept_by_a_cache(door: Door) -> None:
    wire = await door.connect(EMPTY)
    assert (await wire.answer()).headers["cache-control"] == "no-store"
    await wire.close()


async def test_an_invalid_expect_header_is_answered_in_json(door: Door) -> None:
    wire = await door.connect(HEAD + b"Expect: nothing\r\nContent-Length: 0\r\n\r\n")
    answer = await wire.answer()
    assert (answer.status, list(answer.body)) == (417, ["error"])
    await wire.close()


async def test_a_handler_that_answers_nothing_is_a_bug_that_is_counted(
    door: Door, logged: Callable[[], list[str]]
) -> None:
    wire = await door.connect(EMPTY.replace(b"/echo", b"/nothing") + EMPTY)
    assert [(await wire.answer()).status for _ in range(2)] == [500, 200]
    assert logged() == ["bug"]
    assert door.counted == [("door", "/nothing", 500), ("door", "/echo", 200)]
    await wire.close()


async def test_a_bug_in_the_counting_of_answers_is_answered_in_json(
    door: Door, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = door.count_request

    def fails(*counted: Any) -> None:
        if counted[1] == "/echo":
            raise ValueError("a bug")
        count(*counted)

    monkeypatch.setattr(door, "count_request", fails)
    wire = await door.connect(EMPTY + EMPTY)
    answer = await wire.answer()
    assert (answer.status, list(answer.body), answer.headers["server"]) == (500, ["error"], "nullworker")
    assert await wire.end() == b""
    assert logged() == ["bug"]
    await wire.close()


@pytest.mark.parametrize("body", [gzip.compress(bytes(50_000_000)), b"no gzip"], ids=["bomb", "no gzip"])
@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"identity, gzip"])
async def test_a_body_that_is_compressed_is_refused(
    door: Door, body: bytes, encoding: bytes, logged: Callable[[], list[str]]
) -> None:
    encoded = HEAD + b"Content-Encoding: " + encoding + b"\r\n"
    for wire in (
        await door.connect(encoded + b"Content-Length: %d\r\n\r\n" % len(body) + body),
        await door.connect(encoded + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)),  # no end
    ):
        answer = await wire.answer()
        assert (answer.status, list(answer.body)) == (415, ["error"])
        await wire.close()
    assert logged() == []


async def test_a_body_that_is_said_not_to_be_compressed_is_read(door: Door) -> None:
    wire = await door.connect(HEAD + b"Content-Encoding: Identity\r\nContent-Length: 2\r\n\r\n{}")
    assert (await wire.answer()).body == {"bytes": 2}
    await wire.close()


@pytest.mark.parametrize("answered", [b"GET /echo", b"POST /nowhere"])
async def test_who_is_answered_before_his_body_is_there_is_hung_up_on(door: Door, answered: bytes) -> None:
    wire = await door.connect(answered + b" HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\n12")
    answer = await wire.answer()
    assert (answer.status in (404, 405), answer.headers["connection"]) == (True, "close")
    await wire.send(b"345" + EMPTY)
    assert await wire.end() == b""
    await wire.close()


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
async def test_a_chunked_body_has_the_same_limit(door: Door, size: int, status: int) -> None:
    wire = await door.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for part in (bytes(1000), bytes(size - 1000)):
        await wire.send(b"%x\r\n%s\r\n" % (len(part), part))
    await wire.send(b"0\r\n\r\n")
    answer = await wire.answer()
    assert (answer.status, answer.body.get("bytes")) == (status, size if status == 200 else None)
    await wire.close()


@pytest.mark.parametrize(("size", "status"), [(10, 200), (11, 413)])
async def test_a_chunked_body_that_comes_with_its_head_has_the_same_limit(
    door: Door, monkeypatch: pytest.MonkeyPatch, size: int, status: int
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 10)
    wire = await door.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, bytes(size)))
    assert (await wire.answer()).status == status
    await wire.close()
