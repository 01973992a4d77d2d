"""The HTTP edge against those who do not mean to be answered: what is no HTTP, what is slow, what is too much."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import json
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from doors import EMPTY, HEAD, HOLD, Door, Wire
from harness import ROOT, WorkerProcess, post, secured, signed

from nullworker.http import server
from nullworker.ports import KEEPALIVE
from nullworker.testing import StandIn

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with Door().opened() as door:
        yield door


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience that a test can wait for."""
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.02)


# -- what is no HTTP ---------------------------------------------------------------------------------------------------

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
async def test_what_is_no_http_gets_json_and_is_hung_up_on(door: Door, case: str) -> None:
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


async def test_what_is_hidden_behind_a_request_is_not_a_second_one(door: Door) -> None:
    wire = await door.connect(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EMPTY)
    assert (await wire.answer()).status == 400
    assert await wire.end() == b""
    assert [status for _, _, status in door.counted] == [400]
    await wire.close()


async def test_an_expectation_that_is_none_is_answered_in_json(door: Door) -> None:
    wire = await door.connect(HEAD + b"Expect: nothing\r\nContent-Length: 0\r\n\r\n")
    answer = await wire.answer()
    assert (answer.status, list(answer.body)) == (417, ["error"])
    await wire.close()


async def test_a_bug_that_no_middleware_sees_is_answered_in_json(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    wire = await door.connect(EMPTY.replace(b"/echo", b"/nothing") + EMPTY)
    answer = await wire.answer()
    assert (answer.status, list(answer.body), answer.headers["server"]) == (500, ["error"], "nullworker")
    assert await wire.end() == b""
    assert [record.message for record in caplog.records] == ["bug"]
    await wire.close()


async def test_a_body_that_unpacks_to_more_than_is_allowed_is_refused(door: Door) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    wire = await door.connect(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
    answer = await wire.answer()
    assert (answer.status, list(answer.body)) == (413, ["error"])
    await wire.close()


async def test_a_body_that_cannot_be_unpacked_writes_no_log_line(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    wire = await door.connect(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 7\r\n\r\nno gzip")
    assert (await wire.answer()).status == 400
    assert await wire.end() == b""
    assert caplog.records == []
    await wire.close()


# -- what is slow ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sent", [b"", b"POST /echo", HEAD, b"\r\n" * 50], ids=["nothing", "line", "headers", "blank"])
async def test_a_request_that_does_not_come_is_not_waited_for(door: Door, sent: bytes) -> None:
    wire = await door.connect(sent)
    assert await wire.end() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_head_that_comes_a_byte_at_a_time_is_not_waited_for(door: Door) -> None:
    wire = await door.connect(b"POST /echo HTTP/1.1\r\nX: ")
    ended = asyncio.ensure_future(wire.end())
    while not (await asyncio.wait({ended}, timeout=0.02))[0]:
        await wire.send(b"a")
    assert ended.result() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_second_request_that_does_not_come_to_its_end_is_not_waited_for(door: Door) -> None:
    wire = await door.connect(EMPTY)
    assert (await wire.answer()).body == {"bytes": 0}
    await wire.send(HEAD)
    assert await wire.end() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_who_has_been_answered_may_be_silent_for_longer(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = await door.connect(EMPTY)
    await idle.answer()
    silent = await door.connect()
    assert await silent.end() == b""
    await idle.send(EMPTY)
    assert (await idle.answer()).status == 200
    await idle.close()
    monkeypatch.setattr(server, "KEEPALIVE_SECONDS", 0.1)
    idle = await door.connect(EMPTY)
    await idle.answer()
    assert await idle.end() == b""
    for wire in (idle, silent):
        await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_request_that_is_under_way_is_waited_for(door: Door) -> None:
    held = await door.hold_one()
    for _ in range(3):
        silent = await door.connect()
        assert await silent.end() == b""
        await silent.close()
    door.let_go.set()
    assert (await held.answer()).body == {"held": True}
    await held.close()


UPGRADE = HOLD[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sends", [(HOLD * 40,), (HOLD, HOLD * 40), (UPGRADE, bytes(1_000_000))])
async def test_who_sends_so_much_more_that_its_end_could_not_be_noticed_is_hung_up_on(
    door: Door, sends: tuple[bytes, ...]
) -> None:
    wire = await door.connect(sends[0])
    await door.held.acquire()
    for more in sends[1:]:
        await wire.send(more)
    await asyncio.wait_for(door.left.wait(), 20)
    await wire.close()


async def test_who_closes_only_its_own_half_has_left(door: Door) -> None:
    wire = await door.hold_one()
    wire.writer.write_eof()
    await asyncio.wait_for(door.left.wait(), 20)
    await wire.close()


async def test_who_vanishes_is_noticed_by_the_kernel(door: Door) -> None:
    wire = await door.hold_one()
    (accepted,) = door.sockets
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    named = {name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
    assert named == KEEPALIVE
    await wire.close()


# -- what is too much --------------------------------------------------------------------------------------------------


async def test_a_full_port_keeps_whom_it_has_and_takes_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with Door().opened(most=3) as door:
        held = [await door.hold_one() for _ in range(3)]
        for _ in range(5):
            refused = await door.connect(EMPTY)
            assert await refused.end() == b""
            await refused.close()
        door.let_go.set()
        for wire in held:
            assert (await wire.answer()).body == {"held": True}
            await wire.close()
        late = await door.connect(EMPTY)
        assert (await late.answer()).status == 200
        await late.close()
    assert [record.message for record in caplog.records] == ["port_full"]  # not a line for each


async def test_the_oldest_who_only_connects_makes_room(door: Door) -> None:
    async with Door().opened(most=4) as door:
        held = await door.hold_one()
        silent = [await door.connect(b"P") for _ in range(3)]
        for _ in range(2):
            newcomer = await door.connect(EMPTY)
            assert (await newcomer.answer()).status == 200
            await newcomer.close()
        assert await silent[0].end() == b""
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (held, *silent):
            await wire.close()


async def test_the_oldest_who_has_been_answered_makes_room() -> None:
    async with Door().opened(most=3) as door:
        idle = [await door.connect(EMPTY) for _ in range(3)]
        for wire in idle:
            await wire.answer()
        newcomer = await door.connect(EMPTY)
        assert (await newcomer.answer()).status == 200
        assert await idle[0].end() == b""
        await idle[2].send(EMPTY)
        assert (await idle[2].answer()).status == 200
        for wire in (newcomer, *idle):
            await wire.close()


@pytest.fixture
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


@pytest.mark.usefixtures("quick")
async def test_the_same_holds_with_tls(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    ours, theirs = tls
    secure = {"ssl": theirs, "server_hostname": "localhost"}
    async with Door().opened(most=3, tls=ours) as door:
        held = await door.connect(HOLD, **secure)
        await door.held.acquire()
        plain = await door.connect(EMPTY)  # no TLS at all
        await plain.end()
        silent = [await door.connect() for _ in range(4)]  # no handshake
        newcomer = await door.connect(EMPTY, **secure)
        assert (await newcomer.answer()).status == 200
        for wire in silent:
            assert await wire.end() == b""
        late = await door.connect(HEAD, **secure)
        assert await late.end() == b""
        more = await door.connect(HOLD * 40, **secure)
        await door.held.acquire()
        await asyncio.wait_for(door.left.wait(), 20)
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (plain, *silent, newcomer, late, more, held):
            await wire.close()


async def test_a_machine_without_descriptors_accepts_again_when_it_has_some(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "EXHAUSTED_SECONDS", 0.05)
    accept, left = socket.socket.accept, [errno.EMFILE, errno.ENFILE]

    def failing(self: socket.socket) -> object:
        if left:
            raise OSError(left.pop(), "none left")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    wire = await door.connect(EMPTY)
    assert (await wire.answer()).status == 200
    assert [record.message for record in caplog.records] == ["cannot_accept"] * 2
    await wire.close()


def test_a_worker_may_open_as_many_files_as_the_machine_lets_it() -> None:
    script = (
        "import resource as r; _, hard = r.getrlimit(r.RLIMIT_NOFILE); r.setrlimit(r.RLIMIT_NOFILE, (256, hard));"
        "from nullworker.http.server import raise_fd_limit; "
        "print(raise_fd_limit() == r.getrlimit(r.RLIMIT_NOFILE)[0] == hard)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"True\n"


@pytest.mark.parametrize("files", [1024, 4096, 20_000, 65_536, 2**31])
def test_connections_never_take_the_files_that_the_worker_itself_needs(files: int) -> None:
    external, local = server.shares(files, 1_000_000)
    assert files - external - 3 * local >= min(files // 6, 1000)
    assert server.shares(2**20, 1000) == (1000 + server.SPARE_CONNECTIONS, server.LOCAL_CONNECTIONS)


# -- the slot ----------------------------------------------------------------------------------------------------------


def raw(body: bytes, *headers: bytes) -> bytes:
    return b"POST /reserve HTTP/1.1\r\nHost: localhost\r\n" + b"".join(h + b"\r\n" for h in headers) + b"\r\n" + body


async def opened(worker: WorkerProcess, sends: bytes) -> Wire:
    wire = Wire(*await asyncio.open_connection("127.0.0.1", worker.port))
    await wire.send(sends)
    return wire


async def test_nobody_has_the_slot_before_its_whole_request_is_there(worker: WorkerProcess, vast: StandIn) -> None:
    body = json.dumps(signed(vast, worker.url)).encode()
    length, chunked = b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked"
    crowd = [
        await opened(worker, sends)
        for sends in (
            raw(body, length, chunked),
            raw(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), chunked, length),
            raw(body, length, length),
            raw(body[:-1], length),
            raw(b"%x\r\n%s\r\n" % (len(body), body), chunked),
            raw(b"%x\r\n%s\r\n0\r\n" % (len(body), body), chunked),
            raw(body, length, b"X: " + b"a" * 10_000),
            raw(body, length, *[b"X: a"] * 200),
            raw(b"", length)[:-2],
        )
    ]
    assert (await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": 0}))).status == 200
    assert worker.sql("SELECT count(*) FROM reservations") == [(1,)]
    for wire in crowd:
        await wire.close()
    assert (await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": 0}))).status == 200
    assert worker.sql("SELECT count(*) FROM reservations") == [(2,)]
    assert not [line for line in worker.lines if line["level"] == "error"]


async def test_requests_behind_one_another_are_claims_one_after_the_other(worker: WorkerProcess, vast: StandIn) -> None:
    bodies = [json.dumps(signed(vast, worker.url, {"metadata": {"n": n}})).encode() for n in range(3)]
    wire = await opened(worker, b"".join(raw(body, b"Content-Length: %d" % len(body)) for body in bodies))
    for n in range(2):
        await worker.line("reservation_held", nth=n + 1)
        assert worker.sql("SELECT count(*) FROM reservations") == [(n + 1,)]
        await worker.release()
        assert (await wire.answer()).body["released"] == "explicit"
    await worker.line("reservation_held", nth=3)
    await wire.close()
    await worker.line("reservation_cancelled")
    assert worker.sql("SELECT state, reason FROM reservations")[2] == ("cancelled", "client_disconnect")


async def test_a_caller_that_floods_its_own_line_loses_the_slot(tmp_path: Path, vast: StandIn) -> None:
    quick = "from nullworker import cli; from nullworker.http import server; server.PATIENCE_SECONDS = 0.2; cli.main()"
    async with secured(tmp_path, vast, module=("-c", quick, "serve")) as worker:
        await worker.line("key_loaded")
        body = json.dumps(signed(vast, worker.url)).encode()
        wire = await opened(worker, raw(body, b"Content-Length: %d" % len(body)))
        await worker.line("reservation_held")
        await wire.send(raw(b"") * 100)
        assert (await worker.line("reservation_cancelled"))["reason"] == "client_disconnect"
        await wire.close()


async def test_a_crowd_loses_nothing() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "bench.load"),
        *("--waiting", "200", "--rate", "50", "--seconds", "2", "--forgers", "2"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    for figure in ("warnings and errors +none", "outcomes to autoscaler +each", "wrong +0"):
        assert re.search(rf"^{figure}$", said, re.MULTILINE), said


async def test_no_answer_tells_versions(worker: WorkerProcess, vast: StandIn) -> None:
    paths = ("/", "/status", "/metrics", "/health", "/nothing", "/reservation", "/events")
    async with aiohttp.ClientSession() as http:
        for url in (*(worker.control + path for path in paths), worker.url + "/reserve"):
            async with http.get(url) as answer:
                assert answer.headers["Server"] == "nullworker"
    with contextlib.closing(socket.create_connection(("127.0.0.1", worker.port))) as sock:
        sock.sendall(b"HELLO\r\n\r\n")
        assert b"aiohttp" not in sock.recv(65536)
    assert await worker.metric("nullworker_http_requests_total", port="external", route="unknown", status="400") == 1
