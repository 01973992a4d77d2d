"""Failures of outgoing calls are described by kind and cause, without URL, body or answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import ssl
import struct
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import client_exceptions
from strangers import Answer, answering, echo

from nullworker import outgoing
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.clock import SystemClock
from nullworker.consumer_health import HealthPoll
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import Limits
from nullworker.outgoing import HttpPost, describe_failure
from nullworker.readiness import Readiness
from nullworker.service import Service

URL = "http://user:SECRET@secret.example/SECRET?token=SECRET"
KINDS = [
    each
    for each in vars(client_exceptions).values()
    if isinstance(each, type) and issubclass(each, aiohttp.ClientError)
]


def quoting(kind: Any) -> Any:
    """An error of aiohttp's, with a url wherever it takes words."""
    key = SimpleNamespace(host="secret.example", port=80, ssl=True, is_ssl=True)
    refused = OSError(errno.ECONNREFUSED, URL)
    if issubclass(kind, aiohttp.ClientResponseError):
        return kind(SimpleNamespace(real_url=URL), (), status=407, message=URL)
    if issubclass(kind, client_exceptions.UnixClientConnectorError):
        return kind(URL, key, refused)
    if issubclass(kind, aiohttp.ClientConnectorError):
        return kind(key, refused)
    if issubclass(kind, aiohttp.ServerFingerprintMismatch):
        return kind(b"", b"", URL, 80)
    return kind(errno.EPIPE, URL) if issubclass(kind, aiohttp.ClientOSError) else kind(URL)


def mismatch() -> ssl.SSLError:
    """As OpenSSL says that a certificate is another host's."""
    error = ssl.SSLCertVerificationError(1, f"[SSL] certificate is not valid for {URL}")
    error.verify_message = f"Hostname mismatch, certificate is not valid for {URL}"
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_of_the_client_is_told_with_its_url(kind: type[Exception]) -> None:
    epipe = OSError(errno.EPIPE, URL)
    for cause in (
        None,
        epipe,
        OSError(URL),
        quoting(aiohttp.ClientOSError),
        mismatch(),
        ssl.SSLError(1, URL),
        ValueError(URL),
    ):
        error = quoting(kind)
        assert "SECRET" in str(error)
        error.__cause__ = cause
        told = describe_failure(error)
        assert told
        assert not re.search("[A-Z][a-z]+[A-Z]", told) or told == f"the call failed ({kind.__name__})"
        assert "secret" not in told.lower()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (asyncio.TimeoutError(), "it did not answer in time"),
        (ValueError(URL), "the call failed (ValueError)"),
        (ConnectionResetError(errno.ECONNRESET, f"by {URL}"), "connection reset by peer"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), "its name is not known: try again"),
        (mismatch(), "its certificate is not trusted: hostname mismatch"),
        (aiohttp.ClientOSError(None, f"Can not write request body for {URL}"), "the call failed (ClientOSError)"),
        (quoting(aiohttp.ClientHttpProxyError), "it answered 407"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_an_error_is_told_by_its_kind_and_its_cause(error: Exception, told: str) -> None:
    assert describe_failure(error) == told


# -- what really comes back --------------------------------------------------------------------------------------------


async def posted(url: str) -> str | None:
    post = HttpPost()
    try:
        return await post(url, {"secret": "SECRET"})
    finally:
        await post.close()


async def echo_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.read(4096)).rpartition(b"\n")[2] + b"\r\n")


async def stop_short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    writer.write(b"HTTP/1.1 200 SECRET\r\nX: SECRET\r\n")


async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """It closes, and that is all."""
    await reader.read(4096)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


NO_HTTP = "it does not speak HTTP"
HUNG_UP = "it closed the connection without an answer"


@pytest.mark.parametrize(
    ("scheme", "answer", "why"),
    [
        ("http", echo, NO_HTTP),
        ("http", echo_body, NO_HTTP),
        ("http", stop_short, HUNG_UP),
        ("http", leave, HUNG_UP),
        ("http", reset, "connection reset by peer"),
        ("https", echo, "it does not speak TLS"),
        ("https", reset, "connection reset by peer"),
    ],
)
async def test_why_a_callback_failed_is_told_whatever_came_back(scheme: str, answer: Answer, why: str) -> None:
    async with answering(answer) as place:
        assert await posted(f"{scheme}://{place}/SECRET?token=SECRET") == why


async def test_why_a_callback_failed_is_told_of_a_certificate_that_nobody_trusts() -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    async with answering(leave, tls) as place:
        why = await posted(f"https://{place}/SECRET?token=SECRET")
    assert why == "its certificate is not trusted: unable to get local issuer certificate"


async def test_why_a_callback_failed_is_told_of_what_cannot_be_called() -> None:
    async with answering(leave) as place:
        pass
    for route, why in (
        (f"http://SECRET@{place}/SECRET", "connection refused"),
        ("http://127.1/SECRET", "its url is not valid"),
        ("http://secret\\example/SECRET", "its url is not valid"),
        ("ftp://secret.example/SECRET", "its url is not http or https"),
        ("http://SECRET\N{SNOWMAN}@127.0.0.1/", "its url is not valid"),
    ):
        assert await posted(route) == why


async def test_why_a_callback_failed_is_told_of_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "CALL_SECONDS", 0.05)
    silent = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(silent):
        for scheme in ("http", "https"):
            route = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/SECRET"
            assert await posted(route) == "it did not answer in time"


async def test_what_a_report_says_is_not_told_when_it_comes_back() -> None:
    async with answering(echo_body) as place:
        link = AutoscalerClient([f"http://{place}"])
        assert await link.post("/path/", {"mtoken": "SECRET"}) == "failed"
        await link.close()
        assert link.trouble == f"http://{place}/path/ cannot be reached: {NO_HTTP}"


async def test_what_a_consumer_answers_that_is_no_http_is_not_told(log: EventLog) -> None:
    service = Service(log, SystemClock(), Limits(), Readiness(key=None, consumer_starting="it begins"))
    async with answering(echo) as place, aiohttp.ClientSession() as http:
        poll = HealthPoll(f"http://{place}/", service, interval=1, timeout=20, failures=1, cancel_held=False)
        assert await poll._look(http) == f"http://{place}/ cannot be reached: {NO_HTTP}"
