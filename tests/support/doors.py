"""A port with a small app in the test's own loop, and raw connections to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from aiohttp import web
from harness import PATIENCE

from nullworker.http.bodies import read_body
from nullworker.http.responses import json_response, make_app
from nullworker.http.server import Server
from nullworker.http.sockets import listen

HEAD = b"POST /echo HTTP/1.1\r\nHost: here\r\n"
EMPTY = HEAD + b"Content-Length: 0\r\n\r\n"
HOLD = b"POST /hold HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n"


class Door:
    """POST /echo says how long the body was; POST /hold answers when `let_go` is set; POST /nothing has a bug.

    Attributes: `counted`, the statuses that were counted; `left`, set when a held caller's end was noticed.
    """

    def __init__(self) -> None:
        self.counted: list[tuple[str, str, int]] = []
        self.held = asyncio.Semaphore(0)
        self.let_go = asyncio.Event()
        self.left = asyncio.Event()
        self.sockets: list[Any] = []

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        self.counted.append((port, route, status))

    def count_auth_failure(self, reason: str) -> None: ...

    async def echo(self, request: web.Request) -> web.Response:
        return json_response({"bytes": len(await read_body(request))})

    async def nothing(self, request: web.Request) -> Any:
        """A bug: no answer at all."""

    async def hold(self, request: web.Request) -> web.Response:
        await read_body(request)
        assert request.transport is not None
        self.sockets.append(request.transport.get_extra_info("socket"))
        self.held.release()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return json_response({"held": True})

    @contextlib.asynccontextmanager
    async def opened(self, *, max_connections: int = 100, tls: ssl.SSLContext | None = None) -> AsyncIterator[Door]:
        app = make_app("door", self)
        app.router.add_post("/echo", self.echo)
        app.router.add_post("/hold", self.hold)
        app.router.add_post("/nothing", self.nothing)
        self.listener: socket.socket = listen(0, host="127.0.0.1", variable="WORKER_PORT")
        port = Server(app, self.listener, max_connections=max_connections, tls=tls)
        await port.start()
        try:
            yield self
        finally:
            await port.stop()
            self.listener.close()

    async def connect(self, sends: bytes = b"", **tls: Any) -> ClaimTrace:
        """A new connection, that has sent these bytes."""
        wire = ClaimTrace(*await asyncio.open_connection("127.0.0.1", self.listener.getsockname()[1], **tls))
        await wire.send(sends)
        return wire

    async def hold_one(self) -> ClaimTrace:
        """A connection whose request is under way."""
        wire = await self.connect(HOLD)
        await asyncio.wait_for(self.held.acquire(), PATIENCE)
        return wire


class Heard(NamedTuple):
    """An answer as it came: status, headers in lower case, and the JSON of its body."""

    status: int
    headers: dict[str, str]
    body: Any


class ClaimTrace:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self) -> Heard:
        """The next answer."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)).decode()
        status, *lines = head.split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), PATIENCE)
        return Heard(int(status.split()[1]), headers, json.loads(body))

    async def end(self) -> bytes:
        """What still comes until the other side closes."""
        got = b""
        with contextlib.suppress(ConnectionError):
            while more := await asyncio.wait_for(self.reader.read(65536), PATIENCE):
                got += more
        return got

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


class Request:
    """The part of a request that the authenticator reads: its body, which is there already."""

    def __init__(self, body: bytes) -> None:
        self.content_length, self.content = len(body), self
        self._parts = [body, b""]

    def is_eof(self) -> bool:
        return True

    async def readany(self) -> bytes:
        return self._parts.pop(0)
