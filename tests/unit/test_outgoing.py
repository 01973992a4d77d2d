"""Failures of outgoing calls are described by kind and cause, without URL, body or answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import re
import socket
import ssl
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import client_exceptions
from programs import dead_address
from strangers import Answer, answering, echo

from nullworker import outgoing
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.messages import STATUS_PATH
from nullworker.clock import SystemClock, wall
from nullworker.consumer_health import HealthPoll
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import Limits
from nullworker.outgoing import HttpPost, OwnPorts, describe_failure, get, http_session
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.sink import Sink, Target

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


async def posted(url: str, own_ports: OwnPorts | None = None) -> str | None:
    post = HttpPost(own_ports)
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


# -- where no callback may go ------------------------------------------------------------------------------------------


class Listener:
    """A server that counts who has called it."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


REFUSED = "it leads to a port of this worker"


async def test_a_callback_is_not_connected_to_a_port_of_the_worker_itself() -> None:
    listener = Listener()
    async with answering(listener) as place:
        port = int(place.rpartition(":")[2])
        own, other = OwnPorts([port], ("192.0.2.7", 41234)), OwnPorts([port + 1], ("192.0.2.7", 41234))
        names = [
            "127.0.0.1",
            "localhost",
            "0x7f000001",
            "[::ffff:127.0.0.1]",
            "\N{CIRCLED DIGIT ONE}27.0.0.1",
            "0.0.0.0",
        ]
        for name in names:  # 0x7f000001 is a name to aiohttp, and the resolver knows it
            assert await posted(f"http://{name}:{port}/release", own) == REFUSED, name
        assert await posted("http://192.0.2.7:41234/session/end", own) == REFUSED
        assert listener.calls == 0
        for name in names:
            assert await posted(f"http://{name}:{port}/", other) is None, name
        assert listener.calls == len(names)


def test_whose_port_it_is_is_told_by_what_would_be_dialled() -> None:
    own = OwnPorts([80, 8080], ("192.0.2.7", 41234))
    for route in (
        "http://localhost/",
        "http://127.0.0.1:/",
        "http://[::1]:8080/x",
        "HTTP://LOCALHOST.:80",
        "http://a.localhost",
    ):
        assert own.are_behind(route), route
    for route in ("http://192.0.2.7:41234/", "https://localhost/..", "http://x@localhost:8080"):
        assert own.are_behind(route) == ("https" not in route), route
    for route in ("http://192.0.2.7/", "http://localhost:81/", "http://localhost.example/", "http://192.0.2.7:8080/"):
        assert not own.are_behind(route), route


def test_an_address_of_this_machine_is_known() -> None:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        mine = probe.getsockname()[0]
    for host in ("127.0.0.1", "127.255.0.3", "0.0.0.0", "::", "::1", "localhost", mine, f"::ffff:{mine}"):
        assert outgoing.is_this_machine(host), host
    for host in ("192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "example.com", "", "127.1"):
        assert not outgoing.is_this_machine(host), host


async def test_a_callback_says_that_it_is_one() -> None:
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with answering(hear) as place:
        assert await posted(f"http://{place}/") is None
    assert b"\r\nUser-Agent: nullworker-callback\r\n" in heard[0]


# -- redirects ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def redirecting(location: str) -> AsyncIterator[tuple[str, list[str]]]:
    """A server whose paths but /end redirect there, and the paths that it was asked for."""
    paths: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        paths.append(head.split()[1] + (" with a password" if "Basic" in head else ""))
        to = location.replace("PORT", str(writer.get_extra_info("sockname")[1]))
        status = "200 OK" if paths[-1].startswith("/end") else f"307 X\r\nLocation: {to}"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())

    async with answering(answer) as place:
        yield place, paths


async def got(url: str) -> int:
    async with http_session() as http, get(http, url, seconds=5) as answer:
        return answer.status


async def test_a_redirect_on_the_same_host_is_followed() -> None:
    async with redirecting("/end?x=1") as (place, paths):
        assert await got(f"http://u:p@{place}/begin") == 200
        assert paths == ["/begin with a password", "/end?x=1 with a password"]


async def test_a_redirect_to_elsewhere_is_the_answer() -> None:
    async with redirecting("/end") as (elsewhere, paths):
        for location in (
            f"http://{elsewhere}/end",
            f"//{elsewhere}/end",
            f"https://{elsewhere}/end",
            "ftp://x/",
            "//[/",
        ):
            async with redirecting(location) as (place, _):
                assert await got(f"http://{place}/begin") == 307
        assert paths == []
    async with redirecting("http://localhost:PORT/end") as (place, paths):  # another name, and so perhaps another owner
        assert await got(f"http://{place}/begin") == 307
        assert paths == ["/begin"]


async def test_a_callback_follows_no_redirect() -> None:
    async with redirecting("/end") as (place, paths):
        assert await posted(f"http://{place}/begin") == "it answered 307"
        assert paths == ["/begin"]


async def test_redirects_without_end_are_not_followed_without_end() -> None:
    async with redirecting("/more") as (place, paths):
        assert await got(f"http://{place}/begin") == 307
        assert len(paths) == 1 + outgoing.MAX_REDIRECTS


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_dead_dns_does_not_delay_the_end_of_a_process() -> None:
    script = """
import asyncio, socket, time
from nullworker.outgoing import HttpPost
socket.getaddrinfo = lambda *_: time.sleep(60)
async def main():
    post = HttpPost()
    asked = asyncio.ensure_future(post("http://nowhere.example/", {}))
    await asyncio.wait([asked], timeout=0.1)
    asked.cancel()
    await asyncio.wait([asked])
    await post.close()
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=20)


async def test_a_name_that_has_no_address_is_told() -> None:
    assert str(await posted("http://nowhere.invalid/SECRET")).startswith("its name is not known: ")


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


@contextlib.asynccontextmanager
async def callbacks(_: EventLog, url: str) -> AsyncIterator[Callable[[str], Awaitable[object]]]:
    post = HttpPost()
    yield lambda text: post(url, {"x": text})
    await post.close()


@contextlib.asynccontextmanager
async def reports(_: EventLog, url: str) -> AsyncIterator[Callable[[str], Awaitable[object]]]:
    autoscaler = AutoscalerClient([url])
    yield lambda text: autoscaler.post(STATUS_PATH, {"x": text})
    await autoscaler.close()


@contextlib.asynccontextmanager
async def sink(log: EventLog, url: str) -> AsyncIterator[Callable[[str], Awaitable[object]]]:
    sink = Sink(Target(url, None, "ndjson", True, True), log, wall, lambda *_: None, instance="7", own_url=url)
    yield lambda text: sink._post([text.encode()])
    await sink.close()


@pytest.mark.parametrize("sender", [callbacks, reports, sink])
async def test_a_call_that_has_failed_leaves_nothing_in_memory(
    log: EventLog,
    sender: Callable[[EventLog, str], contextlib.AbstractAsyncContextManager[Callable[[str], Awaitable[object]]]],
) -> None:
    size = 100_000
    async with sender(log, dead_address()) as post:
        await post("")
        gc.collect()
        gc.disable()  # it would clear away what such calls leave, but not for as long as little else is made
        tracemalloc.start()
        try:
            for _ in range(20):
                assert await post("x" * size) not in (None, "ok", "accepted")
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert left < 5 * size
