"""Server-sent events: the events of one reservation for its caller, and all events on the control port.

With a stream the official client holds a worker for longer than its request timeout, and keepalives stop proxies from
closing an idle connection. The format is that of the WHATWG HTML standard, section 9.2.

A stream reads the log and is only woken by appends, so a slow reader uses no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from aiohttp import web

from nullworker.aio import AutoResetEvent
from nullworker.control_client import MAX_HOLD_HEADER
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import ENDED
from nullworker.http.reservations import verdict, verdict_response
from nullworker.http.responses import ANSWERS, HELD, RESERVATION_HEADER
from nullworker.logs import get_log
from nullworker.service import Service

log = get_log(__name__)

KEEPALIVE_SECONDS: Final = 15.0
#: Events read from the log at once.
BATCH: Final = 200
#: Readers of all events that are written to before the event loop has its turn: 0.3 ms.
AT_ONCE: Final = 8


class Watchers:
    """The readers of one port's streams. Their streams end properly and at once when the worker stops."""

    def __init__(self) -> None:
        self.dismissed = False
        self._wakeups: set[AutoResetEvent] = set()

    @contextlib.contextmanager
    def wakeup(self) -> Iterator[AutoResetEvent]:
        """An event that is also set when the worker stops."""
        wakeup = AutoResetEvent()
        if self.dismissed:
            wakeup.set()
        self._wakeups.add(wakeup)
        try:
            yield wakeup
        finally:
            self._wakeups.discard(wakeup)

    async def dismiss(self, _: web.Application) -> None:
        """Wake all readers; aiohttp calls it as `on_shutdown`."""
        self.dismissed = True
        for wakeup in self._wakeups:
            wakeup.set()


async def stream_reservation(
    request: web.Request, service: Service, event_log: EventLog, reservation: Reservation
) -> web.StreamResponse:
    """Once the reservation is held, stream its events, and as the last `data` the body of the plain answer."""
    wakeup = AutoResetEvent()
    service.watch(reservation.id, wakeup.set)
    try:
        while reservation.state == "queued":
            await wakeup.wait()
        if reservation.held_at is None:
            return verdict_response(reservation)
        with _cut_off_by_errors(request):
            response = await _begin(request, {RESERVATION_HEADER: reservation.id})
            await _follow_reservation(response, event_log, wakeup, reservation.id, lambda: reservation.state in ENDED)
            await response.write(_data(verdict(reservation)[1]))
            await response.write_eof()
            return response
    finally:
        service.unwatch(reservation.id, wakeup.set)


async def stream_attachment(
    request: web.Request, service: Service, event_log: EventLog, reservation: Reservation, watchers: Watchers
) -> web.StreamResponse:
    """The events of the held reservation, until it ends or the worker stops; then the connection is closed."""
    with watchers.wakeup() as wakeup, _cut_off_by_errors(request):
        service.watch(reservation.id, wakeup.set)
        try:
            max_hold = service.book.limits.max_hold_seconds
            limit = {} if max_hold is None else {MAX_HOLD_HEADER: f"{max_hold:g}"}
            response = await _begin(request, {RESERVATION_HEADER: reservation.id, **limit}, close=True)
            await _follow_reservation(
                response, event_log, wakeup, reservation.id, lambda: reservation.state in ENDED or watchers.dismissed
            )
            await response.write_eof()
            return response
        finally:
            service.unwatch(reservation.id, wakeup.set)


async def stream_events(request: web.Request, feed: EventFeed, after: int, watchers: Watchers) -> web.StreamResponse:
    """Stream all events after a seq, and new ones, until the reader hangs up or the worker stops.

    A seq beyond the end means that the log was replaced: the reader gets `log_replaced` and then the whole new log.
    """
    with watchers.wakeup() as wakeup, feed.reader(wakeup), _cut_off_by_errors(request):
        response = await _begin(request)
        if after > feed.last_seq:
            seqs = {"after": after, "last_seq": feed.last_seq}
            await response.write(b"event: log_replaced\n" + _data(seqs))
            after = 0
        await _follow(response, feed.after, wakeup, after, lambda: watchers.dismissed)
        await response.write_eof()
        return response


class EventFeed:
    """All events, for many readers: encoded once, and handed to a few readers at a time.

    A reader that does not read costs 2 MB of the kernel's buffers before it is waited for, so a thousand of them would
    be written to with each event, before anybody else gets an answer.
    """

    def __init__(self, event_log: EventLog) -> None:
        self._log = event_log
        self._readers: dict[AutoResetEvent, None] = {}
        self._appended = AutoResetEvent()
        self._pump: asyncio.Task[None] | None = None
        self._newest: tuple[int, int, int, bytes] | None = None

    @property
    def last_seq(self) -> int:
        """The newest event of the log."""
        return self._log.last_seq

    @contextlib.contextmanager
    def reader(self, wakeup: AutoResetEvent) -> Iterator[None]:
        """Set `wakeup` when there are new events."""
        if not self._readers:
            self._log.on_append.append(self._appended.set)
            self._pump = asyncio.ensure_future(self._wake())
        self._readers[wakeup] = None
        try:
            yield
        finally:
            del self._readers[wakeup]
            if not self._readers and self._pump is not None:
                self._log.on_append.remove(self._appended.set)
                self._pump.cancel()

    def after(self, seq: int) -> tuple[int, bytes]:
        """The events after a seq, BATCH at most: the last one's seq, and their text."""
        if self._newest is None or self._newest[:2] != (seq, self._log.last_seq):
            self._newest = (seq, self._log.last_seq, *_encoded(self._log, seq, None))
        return self._newest[2:]

    async def _wake(self) -> None:
        while True:
            await self._appended.wait()
            for number, wakeup in enumerate(list(self._readers), 1):
                wakeup.set()
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)


@contextlib.contextmanager
def _cut_off_by_errors(request: web.Request) -> Iterator[None]:
    """Abort the connection on an error: after the head was sent, that is the only way to show it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConnectionError):
            log.error("stream_cut_off", route=request.path, why=str(error))
        if request.transport is not None:
            request.transport.abort()
        raise


async def _begin(
    request: web.Request, headers: dict[str, str] | None = None, *, close: bool = False
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
    response.content_type = "text/event-stream"
    if close:
        response.force_close()
    request[HELD] = True
    request.app[ANSWERS].sign(response)
    await response.prepare(request)
    await response.write(b": open\n\n")
    return response


async def _follow_reservation(
    response: web.StreamResponse,
    event_log: EventLog,
    wakeup: AutoResetEvent,
    reservation_id: str,
    until: Callable[[], bool],
) -> None:
    event_log.on_append.append(wakeup.set)  # also wakes for events that waited for the log
    try:
        await _follow(response, lambda seq: _encoded(event_log, seq, reservation_id), wakeup, 0, until)
    finally:
        event_log.on_append.remove(wakeup.set)


async def _follow(
    response: web.StreamResponse,
    read: Callable[[int], tuple[int, bytes]],
    wakeup: AutoResetEvent,
    after: int,
    until: Callable[[], bool],
) -> None:
    while True:
        over = until()  # evaluated before the read, so that the last events are not missed
        while True:
            after, text = read(after)
            if not text:
                break
            await response.write(text)
        if over:
            return
        if not await wakeup.wait(KEEPALIVE_SECONDS):
            await response.write(b": keepalive\n\n")


def _encoded(event_log: EventLog, after: int, reservation_id: str | None) -> tuple[int, bytes]:
    batch = queries.events(event_log.conn, after=after, limit=BATCH, reservation_id=reservation_id)
    text = b"".join(b"id: %d\n" % event["seq"] + _data(event) for event in batch)
    return batch[-1]["seq"] if batch else after, text


def _data(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
