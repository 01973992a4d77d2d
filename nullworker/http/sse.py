"""Server-sent events: the events of one reservation for its caller, and all events on the control port.

With a stream the official client holds a worker for longer than its request timeout, and keepalives stop proxies from
closing an idle connection. The format is that of the WHATWG HTML standard, section 9.2.

A stream reads the log and is only woken by appends, so a slow reader uses no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from aiohttp import web

from nullworker.aio import AutoResetEvent
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import ENDED
from nullworker.http.reservations import verdict, verdict_response
from nullworker.http.responses import HELD, RESERVATION_HEADER
from nullworker.logs import get_log
from nullworker.service import Service

log = get_log(__name__)

KEEPALIVE_SECONDS: Final = 15.0
#: Events read from the log at once.
BATCH: Final = 200


class Watchers:
    """The readers of one port's streams, which are ended properly, without delay, when the worker stops."""

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
            await _follow(response, event_log, wakeup, 0, reservation.id, until=lambda: reservation.state in ENDED)
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
            response = await _begin(request, {RESERVATION_HEADER: reservation.id}, close=True)
            await _follow(
                response,
                event_log,
                wakeup,
                0,
                reservation.id,
                until=lambda: reservation.state in ENDED or watchers.dismissed,
            )
            await response.write_eof()
            return response
        finally:
            service.unwatch(reservation.id, wakeup.set)


async def stream_events(
    request: web.Request, event_log: EventLog, after: int, watchers: Watchers
) -> web.StreamResponse:
    """Stream all events after a seq, and new ones, until the reader hangs up or the worker stops.

    A seq beyond the log is one of a log that was replaced: the reader is told so, and gets the new one from its start.
    """
    with watchers.wakeup() as wakeup, _cut_off_by_errors(request):
        response = await _begin(request)
        if after > event_log.last_seq:
            told = {"after": after, "last_seq": event_log.last_seq}
            await response.write(b"event: log_replaced\n" + _data(told))
            after = 0
        await _follow(response, event_log, wakeup, after, None, until=lambda: watchers.dismissed)
        await response.write_eof()
        return response


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
    await response.prepare(request)
    await response.write(b": open\n\n")
    return response


async def _follow(
    response: web.StreamResponse,
    event_log: EventLog,
    wakeup: AutoResetEvent,
    after: int,
    reservation_id: str | None,
    *,
    until: Callable[[], bool],
) -> None:
    event_log.on_append.append(wakeup.set)  # also wakes for events that waited for the log
    try:
        while True:
            over = until()  # evaluated before the read, so that the last events are not missed
            while batch := queries.events(event_log.conn, after=after, limit=BATCH, reservation_id=reservation_id):
                after = batch[-1]["seq"]
                await response.write(b"".join(b"id: %d\n" % event["seq"] + _data(event) for event in batch))
            if over:
                return
            if not await wakeup.wait(KEEPALIVE_SECONDS):
                await response.write(b": keepalive\n\n")
    finally:
        event_log.on_append.remove(wakeup.set)


def _data(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
