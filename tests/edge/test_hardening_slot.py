"""Slow, broken and crowding callers of a real worker: the slot and honest callers are not affected."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import sys
from pathlib import Path

import aiohttp
import psutil
from doors import ClaimTrace
from harness import ROOT, WorkerProcess, anew, changed, post, secured, signed
from programs import until

from nullworker.testing import FakeAutoscaler


def raw(body: bytes, *headers: bytes) -> bytes:
    return b"POST /reserve HTTP/1.1\r\nHost: localhost\r\n" + b"".join(h + b"\r\n" for h in headers) + b"\r\n" + body


async def opened(worker: WorkerProcess, sends: bytes) -> ClaimTrace:
    wire = ClaimTrace(*await asyncio.open_connection("127.0.0.1", worker.port))
    await wire.send(sends)
    return wire


async def test_a_partial_request_does_not_get_the_slot(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
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


async def test_pipelined_requests_are_claims_in_order(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
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


async def test_a_caller_that_floods_its_connection_loses_the_slot(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, module=changed(nullworker__http__server__PATIENCE_SECONDS=0.2)) as worker:
        await worker.line("key_loaded")
        body = json.dumps(signed(vast, worker.url)).encode()
        wire = await opened(worker, raw(body, b"Content-Length: %d" % len(body)))
        await worker.line("reservation_held")
        await wire.send(raw(b"") * 100)
        assert (await worker.line("reservation_cancelled"))["reason"] == "client_disconnect"
        await wire.close()


async def test_a_crowd_loses_nothing() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "stress.load"),
        *("--waiting", "200", "--rate", "50", "--seconds", "2", "--forgers", "2"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    for figure in ("warnings and errors +none", "outcomes to autoscaler +each", "wrong +0"):
        assert re.search(rf"^{figure}$", said, re.MULTILINE), said


async def test_a_crowd_that_sends_half_a_request_neither_fills_the_memory_nor_keeps_callers_out(
    tmp_path: Path, vast: FakeAutoscaler
) -> None:
    """The short form of 1,000 and of 4,300 strangers: what is packed small, heads alone, and what is large."""
    packed = gzip.compress(bytes(1024 * 1024))
    compressed = raw(b"%x\r\n%s\r\n" % (len(packed), packed), b"Content-Encoding: gzip", b"Transfer-Encoding: chunked")
    large, head = raw(bytes(120_000), b"Content-Length: 131072"), raw(b"", b"Content-Length: 1000")
    spare = changed(nullworker__http__sockets__SPARE_CONNECTIONS=250)
    async with anew(secured(tmp_path, vast, module=spare, NULL_MAX_QUEUED="5")) as worker:
        await worker.line("key_loaded")
        process = psutil.Process(worker.process.pid)
        before = process.memory_info().rss

        def taken() -> float:
            """MB since the start."""
            return float(process.memory_info().rss - before) / 1e6

        # unpacked it were 300 MB; 36 MB come as they are, and the kernel's buffers are read in larger pieces
        for sends, most in ((compressed, 16), (head, 16), (large, 108)):
            async with contextlib.AsyncExitStack() as crowd:
                for _ in range(300):
                    crowd.push_async_callback((await opened(worker, sends)).close)
                for _ in range(10):
                    claim = signed(vast, worker.url, {"duration": 0})
                    assert (await post(worker.url + "/reserve", claim)).status == 200
                assert taken() < most
        await until(lambda: taken() < 32)
        assert [line["event"] for line in worker.lines if line["level"] == "error"] == []


async def test_no_answer_contains_a_version(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    paths = ("/", "/status", "/metrics", "/health", "/nothing", "/reservation", "/events")
    async with aiohttp.ClientSession() as http:
        for url in (*(worker.control + path for path in paths), worker.url + "/reserve"):
            async with http.get(url) as answer:
                assert answer.headers["Server"] == "nullworker"
    with contextlib.closing(socket.create_connection(("127.0.0.1", worker.port))) as sock:
        sock.sendall(b"HELLO\r\n\r\n")
        assert b"aiohttp" not in sock.recv(65536)
    assert await worker.metric("nullworker_http_requests_total", port="external", route="unknown", status="400") == 1
