"""An HTTP server with bounds: how many connections it accepts, from whom, and how long one may stay idle.

A connection that sends no request, or whose loss could not be noticed, is closed after PATIENCE_SECONDS. A request is
under way once its head and its body are there. When the port is full, the oldest connection without a request under way
is closed for a new one, and so it is when such connections have sent MAX_UNVERIFIED_BYTES together. A connection with a
request under way is never closed for another, so a crowd that only connects, or sends half a request, can push out
neither a caller nor a held reservation.

Only documented features of aiohttp and asyncio are used. The exceptions are marked, and tests/edge/test_hardening*.py
fail when a release removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from typing import Any, Final, cast

from aiohttp import web

# Not documented, but without an underscore: the one way to tell 431 from 400.
from aiohttp.http_exceptions import LineTooLong

from nullworker.clock import stopwatch
from nullworker.errors import SlowBody
from nullworker.http.responses import ANSWERS, json_response
from nullworker.logs import get_log

log = get_log(__name__)

#: Bytes of a request line and of one header, and the number of headers: aiohttp's defaults, fixed here. The official
#: client puts its API key into the query, and sends six headers.
MAX_LINE_BYTES: Final = 8190
MAX_HEADER_BYTES: Final = 8190
MAX_HEADERS: Final = 128
_TOO_MANY_HEADERS: Final = "Too many headers received"  # aiohttp's words

#: Seconds for a TLS handshake, for the head of a request, and for a connection that is not being read.
PATIENCE_SECONDS: Final = 10.0
#: Seconds that a connection may wait for its next request: longer than the 15 s of aiohttp's client, so that the
#: client closes first and no request arrives on a closed connection.
KEEPALIVE_SECONDS: Final = 75.0
#: Seconds between two checks for connections whose time is over.
LOOK_SECONDS: Final = 1.0
#: Connections accepted in one turn of the event loop.
AT_ONCE: Final = 64
#: Bytes that all who have not sent a whole request may have sent together.
MAX_UNVERIFIED_BYTES: Final = 16 * 1024 * 1024
#: Bytes that asyncio's TLS reads at once, and keeps ready for each connection from the first byte of its handshake on:
#: one TLS record, in place of 256 KiB, which let 4,000 strangers who only connect take a gigabyte.
TLS_READ_BYTES: Final = 16 * 1024
#: Connections whose end is a moment to give memory back.
CROWD_SIZE: Final = 200
#: Seconds without accepting after the machine ran out of descriptors or memory.
EXHAUSTED_SECONDS: Final = 1.0
#: Seconds between two log lines that say that a port is full.
FULL_LINE_SECONDS: Final = 60.0


class Connection(web.RequestHandler):
    """One connection, which tells its server when it opens, receives data and closes."""

    __slots__ = ("_port", "discards", "line", "received", "request")

    def __init__(self, port: Server, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=PATIENCE_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,  # read_body refuses what is compressed: a kilobyte could unpack to a thousand
            access_log=None,  # type: ignore[arg-type]  # documented as "no access log", and typed otherwise
        )
        self._port = port
        self.request: web.BaseRequest | None = None  # that is answered now
        self.received = 0  # bytes of a request that is not there as a whole
        self.discards = False  # answered before the body was there: it is read only so that the answer arrives
        self.line: asyncio.Transport | None = None  # aiohttp forgets its own as soon as it wants to close it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.line = cast(asyncio.Transport, transport)
        self._port.opened(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.line = None
        self._port.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._port.heard(self, len(data))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp cannot parse, as JSON, and close: the start of the next request is unknown."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of an answer is sent already")
        if status == 400:
            if isinstance(exc, LineTooLong) or message == _TOO_MANY_HEADERS:
                status = 431
            error = f"the request is no valid HTTP: {' '.join((message or '').split())[:200]}"
        else:  # raised outside of `Server._handle`, so it is a bug
            log.exception("bug", route=request.path, method=request.method)
            error = "a bug in nullworker; its log has the details"
        self._port.answers.count_unreadable(status)
        answer = json_response({"error": error}, status)
        self._port.answers.sign(answer)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a bug. A body that is unreadable or late is none: its sender has had an answer.

        Nor is an InvalidStateError during a stop: aiohttp raises it when a handler ends in the same turn of the event
        loop in which the shutdown timeout ends (aiohttp 3.14, web_protocol.py, _handle_request).
        """
        error = kw.get("exc_info")
        its_own = isinstance(error, asyncio.InvalidStateError) and self._port.stopping
        if not (its_own or isinstance(error, (web.RequestPayloadError, SlowBody))):
            super().log_exception(*args, **kw)

    @property
    def under_way(self) -> bool:
        """Whether a request that is there as a whole is being answered."""
        return self.request is not None and self.request.content.is_eof()

    @property
    def stuck(self) -> bool:
        """Whether no request is answered, or the transport is not being read, so that a hang-up goes unnoticed."""
        return self.request is None or self.line is None or self.line.is_closing() or not self.line.is_reading()

    def abort(self) -> None:
        """Close it at once, without a TLS goodbye, which a peer could delay."""
        if self.line is not None:
            self.line.abort()


class Server:
    """Serves one app on one listening socket, with at most `max_connections` connections."""

    def __init__(
        self,
        app: web.Application,
        listener: socket.socket,
        *,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
        shutdown_seconds: float = 1.0,
    ) -> None:
        self.answers = app[ANSWERS]
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=shutdown_seconds)
        self._listener = listener
        self._max_connections = max_connections
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": PATIENCE_SECONDS}
        if tls is not None:
            # Undocumented, without an underscore; until Python 3.10 it is read by nobody, and nothing is kept ready.
            SSLProtocol.max_size = TLS_READ_BYTES  # type: ignore[attr-defined]  # typeshed does not have it
        self.stopping = False
        self._open = 0
        self._most = 0  # connections at once since memory was given back
        # Connections by what they wait for, each in the order of deadlines, since one dict has one timeout.
        self._greeting: dict[asyncio.Task[None], None] = {}  # accepted, maybe in a TLS handshake
        self._pressed: dict[Connection, float] = {}  # must send the rest of a request, or be read again, in time
        self._idle: dict[Connection, float] = {}  # answered, and no next request yet
        self._unverified = 0  # bytes that have come of requests that are not there as a whole
        self._look: asyncio.TimerHandle | None = None
        self._next_full_line = 0.0

    async def start(self) -> None:
        """Begin to accept connections."""
        self._loop = asyncio.get_running_loop()
        await self._runner.setup()
        assert self._runner.server is not None
        self._server = self._runner.server
        self._answer = self._server.request_handler
        # Undocumented attributes without an underscore. `_handle` wraps the app, since aiohttp answers `Expect` before
        # any middleware, and a middleware costs time, and memory for every waiting request.
        self._server.request_handler = self._handle
        self._listener.setblocking(False)
        self._look = self._loop.call_later(LOOK_SECONDS, self._close_late)
        self._listen()

    async def stop(self) -> None:
        """Stop accepting, wait `shutdown_seconds` for open requests, close all connections."""
        self.stopping = True
        if self._look is not None:
            self._look.cancel()
            self._look = None
            self._loop.remove_reader(self._listener)
        for task in self._greeting:
            task.cancel()
        await self._runner.cleanup()

    # -- called by connections -------------------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """A connection was made; its first request must arrive in time."""
        self._open += 1
        self._press(connection)

    def heard(self, connection: Connection, size: int) -> None:
        """Data arrived: of a request, or so much more that reading was paused."""
        if connection.under_way:
            self._take_off(connection)
            if connection.stuck:
                self._press(connection)
        elif not connection.discards:
            if self._idle.pop(connection, None) is not None:
                self._press(connection)
            connection.received += size
            self._unverified += size
            if self._unverified > MAX_UNVERIFIED_BYTES:
                self._cut_oldest_sender()

    def closed(self, connection: Connection) -> None:
        """A connection was closed."""
        self._open -= 1
        self._take_off(connection)
        self._idle.pop(connection, None)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(Connection, request.protocol)
        connection.request = request
        self._idle.pop(connection, None)
        if not connection.under_way:  # its body has a time of its own
            self._pressed.pop(connection, None)
            self._press(connection)
        elif not connection.stuck:
            self._take_off(connection)
        started, status = stopwatch(), 499
        try:
            if self.answers.guard is not None:
                self.answers.guard(request)
            response = await self._answer(request)
            status = response.status
        except Exception as error:
            response = self.answers.to_error(request, error)
            status = response.status
        finally:
            self.answers.count(request, status, stopwatch() - started)
            connection.discards = not request.content.is_eof()
            connection.request = None
            if connection.line is not None:
                self._take_off(connection)
                self._idle[connection] = self._loop.time() + KEEPALIVE_SECONDS + PATIENCE_SECONDS
        if not response.prepared:
            self.answers.sign(response)
        if connection.discards:
            response.force_close()  # nobody knows how much is still to come
        return response

    def _press(self, connection: Connection) -> None:
        self._pressed.setdefault(connection, self._loop.time() + PATIENCE_SECONDS)

    def _take_off(self, connection: Connection) -> None:
        """Take it off the pressed; what it has sent is not counted any more."""
        self._pressed.pop(connection, None)
        self._unverified -= connection.received
        connection.received = 0

    def _cut_oldest_sender(self) -> None:
        """Close the oldest who has sent more than the average, so no caller with a small request among large ones."""
        share = self._unverified / (len(self._pressed) or 1)
        oldest = next((connection for connection in self._pressed if connection.received >= share), None)
        if oldest is not None:
            self._take_off(oldest)
            oldest.abort()

    # -- new connections --------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._look is not None:  # it may have been stopped meanwhile
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors or memory; the kernel keeps the connections for a while
                log.error("cannot_accept", why=error.strerror)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(EXHAUSTED_SECONDS, self._listen)
                return
            connections = self._open + len(self._greeting)
            if connections >= self._max_connections and not self._make_room():
                sock.close()
                continue
            self._most = max(self._most, connections + 1)
            sock.setblocking(False)
            task = self._loop.create_task(self._greet(sock))
            self._greeting[task] = None
            task.add_done_callback(lambda task: self._greeting.pop(task, None))

    async def _greet(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, asyncio.TimeoutError):  # gone already, or no TLS
            await self._loop.connect_accepted_socket(self._connection, sock, **self._tls)

    def _connection(self) -> Connection:
        return Connection(self, self._server, self._loop)

    def _make_room(self) -> bool:
        """Close the oldest of the largest group of connections without a request under way; False if there is none."""
        if self._loop.time() >= self._next_full_line:
            self._next_full_line = self._loop.time() + FULL_LINE_SECONDS
            log.warning("port_full", port=self._listener.getsockname()[1], connections=self._open)
        crowds: tuple[dict[Any, Any], ...] = (self._greeting, self._pressed, self._idle)
        crowd = max(crowds, key=len)
        for oldest in crowd:
            del crowd[oldest]
            (oldest.cancel if isinstance(oldest, asyncio.Task) else oldest.abort)()
            return True
        return False

    def _close_late(self) -> None:
        now = self._loop.time()
        connections = self._open + len(self._greeting)
        if self._most >= CROWD_SIZE and connections < self._most / 4:
            self._most = connections
            _give_memory_back()
        for crowd in (self._pressed, self._idle):
            late = itertools.takewhile(lambda entry: entry[1] <= now, crowd.items())
            for connection, _ in tuple(late):
                del crowd[connection]
                if connection.stuck:
                    connection.abort()
        self._look = self._loop.call_later(LOOK_SECONDS, self._close_late)


def _give_memory_back() -> None:
    """Give what is free back to the system: the C library keeps whole pages of it between what is in use.

    A TLS connection that is closed is a reference cycle, and may wait long for Python's collector.
    """
    import ctypes  # here, since few workers need it

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
