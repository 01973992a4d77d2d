"""Routes of the control port, on 127.0.0.1: release, extend, history, health, status, metrics, events, the status page.

The port has no authentication. It answers only requests whose Host and Origin are local, so that a web page in a
browser on the same machine, or a host name rebound to 127.0.0.1, gets 403.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, cast
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from nullworker.errors import Busy, Conflict, Forbidden, Invalid, NotFound
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.queries import ReservationJson
from nullworker.fsm.attachment import Extends
from nullworker.fsm.table import STATES
from nullworker.http.bodies import decode, number, read_body, unfit
from nullworker.http.page import add_page
from nullworker.http.reservations import final_status, find, newest, reservation_json
from nullworker.http.responses import HELD, Handler, json_response, make_app
from nullworker.http.sse import EventFeed, Watchers, stream_attachment, stream_events
from nullworker.http.status import ReadyJson, Status
from nullworker.logs import get_log
from nullworker.metrics.exporter import Exporter
from nullworker.outgoing import CALLBACK_AGENT
from nullworker.service import Commit, Service

log = get_log(__name__)

MAX_RESULT_BYTES: Final = 64 * 1024
MAX_WAIT_SECONDS: Final = 60.0
MAX_PAGE: Final = 1000
#: The OpenAPI 3.1 description of both ports. Read at the start, so that it describes the running version.
OPENAPI: Final = Path(__file__).with_name("openapi.json").read_bytes()
_LOCAL_NAMES: Final = frozenset(("127.0.0.1", "localhost", "::1"))


class ReleaseBody(msgspec.Struct):
    """The body of /release."""

    reservation_id: str | None = None
    result: Any | UnsetType = UNSET
    reason: str | None = None


class ExtendBody(msgspec.Struct):
    """The body of /extend."""

    seconds: Annotated[float, Meta(ge=0)]
    reservation_id: str | None = None


def _meant(request: web.Request, payload: ReleaseBody | ExtendBody) -> str | None:
    """The reservation that a caller names in the body, or in the query as for /attach; None: whichever is held.

    Raises:
        Conflict: both name one, and not the same.
    """
    asked = request.query.get("reservation_id")
    if asked is None or payload.reservation_id in (None, asked):
        return payload.reservation_id if asked is None else asked
    raise Conflict("the query and the body name two reservations; name one")


class ControlHandlers:
    """The handlers of the control port."""

    def __init__(self, service: Service, event_log: EventLog, exporter: Exporter, status: Status) -> None:
        self._service = service
        self._log = event_log
        self._exporter = exporter
        self._status = status
        self.watchers = Watchers()
        self._feed = EventFeed(event_log)

    async def release(self, request: web.Request) -> web.Response:
        """POST /release: the consumer is done."""
        body = await read_body(request)
        payload = decode(body, ReleaseBody) if body.strip() else ReleaseBody()
        reason = "explicit" if payload.reason is None else payload.reason
        if reason not in ("explicit", "consumer_exit"):
            raise Invalid("reason is wrong", reason="must be explicit or consumer_exit")
        if payload.result is not UNSET and (why := unfit(payload.result, MAX_RESULT_BYTES)):
            raise Invalid(f"result {why}", result=why)
        meant, held = _meant(request, payload), self._service.book.held
        if meant is not None and (held is None or held.id != meant):
            return self._not_held(meant)
        if held is None:
            self._exporter.releases.labels("none").inc()
            return json_response({"released": False, "reason": "no active reservation"})
        self._service.release(held.id, reason=reason, result=payload.result)
        self._exporter.releases.labels("released").inc()
        plain = meant is None and payload.result is UNSET
        return json_response({"released": True} if plain else {"released": True, "reservation_id": held.id})

    async def extend(self, request: web.Request) -> web.Response:
        """POST /extend: move the deadline."""
        payload = decode(await read_body(request), ExtendBody)
        meant, held = _meant(request, payload), self._service.book.held
        if held is None:
            self._exporter.extensions.labels("none").inc()
            raise Conflict("nothing is held")
        if meant is not None and meant != held.id:
            known = find(self._service, self._log, meant)
            self._exporter.extensions.labels("unknown" if known is None else "stale").inc()
            if known is None:
                raise NotFound(f"there is no reservation {meant}")
            raise Conflict(f"it is not held: {_fate(known)}", state=known["state"])
        extended = self._service.extend(held.id, payload.seconds)
        self._exporter.extensions.labels("extended").inc()
        ends_at = reservation_json(extended, self._service.now())["ends_at"]
        return json_response({"reservation_id": held.id, "ends_at": ends_at})

    async def attach(self, request: web.Request) -> web.StreamResponse:
        """The consumer's liveness connection: while it is there the reservation has its consumer."""
        await read_body(request)  # an unread one would keep the end of the connection from being noticed
        reservation_id, extends = request.query.get("reservation_id"), request.query.get("extend", "")
        if not reservation_id:
            raise Invalid("reservation_id is missing", reservation_id="missing parameter")
        if extends not in ("", "1", "all"):
            raise Invalid("extend is wrong", extend="must be 1 or all")
        held = self._service.book.held
        if held is None or held.id != reservation_id:
            known = find(self._service, self._log, reservation_id)
            if known is None:
                raise NotFound(f"there is no reservation {reservation_id}")
            raise Conflict(f"it is not held: {_fate(known)}", **final_status(known))
        if held.attachment.state == "attached":
            raise Busy("another consumer is attached to this reservation", state="attached")
        first = held.attachment.first_at is None
        self._service.attach(reservation_id, cast(Extends, extends))
        log.info("consumer_attached", reservation_id=reservation_id, first=first)
        if first and held.held_at is not None and held.attachment.first_at is not None:
            self._exporter.attach.observe(max(held.attachment.first_at - held.held_at, 0.0))
        closed_by_worker = False
        try:
            return await stream_attachment(request, self._service, self._log, held, self.watchers)
        except Exception as error:  # of a log that cannot be read, not of the consumer
            closed_by_worker = not isinstance(error, ConnectionError)
            raise
        finally:
            if held.state == "held":
                if not self._service.readiness.draining:
                    log.warning("consumer_detached", reservation_id=reservation_id)
                self._service.detach(reservation_id, by_worker=closed_by_worker)

    async def reservation(self, request: web.Request) -> web.Response:
        """GET /reservation: the held one, or the one that is held within `wait` seconds."""
        wait = number(request, "wait", 0.0, MAX_WAIT_SECONDS)
        held = self._service.book.held
        if held is None and wait > 0:
            request[HELD] = True
            await self._next_hold(wait)
            held = self._service.book.held
        if held is None:
            return web.Response(status=204)
        return json_response(reservation_json(held, self._service.now()))

    async def reservations(self, request: web.Request) -> web.Response:
        """GET /reservations: the history, newest first, or with `id` one reservation."""
        state = request.query.get("state") or None
        if state is not None and state not in STATES:
            raise Invalid("state is wrong", state=f"must be one of {', '.join(STATES)}")
        limit = int(number(request, "limit", 50, MAX_PAGE))
        if one := request.query.get("id"):
            known = find(self._service, self._log, one)
            return json_response({"reservations": [] if known is None else [known]})
        before = request.query.get("before") or None
        try:
            found = await newest(self._service, self._log, state=state, limit=limit, before=before)
        except ValueError:
            raise Invalid("before is wrong", before="must be the id of a reservation or an ISO 8601 time") from None
        return json_response({"reservations": found})

    async def readyz(self, request: web.Request) -> web.Response:
        """GET /readyz: whether this worker takes reservations, and each check with its reason."""
        readiness = self._service.readiness
        ready = readiness.state == "ready"
        body: ReadyJson = {
            "ready": ready,
            "state": readiness.state,
            "checks": {name: {"ok": check.ok, "why": check.why} for name, check in readiness.checks().items()},
        }
        return json_response(body, 200 if ready else 503)

    async def status(self, request: web.Request) -> web.Response:
        """GET /status: the status document."""
        return json_response(self._status.document())

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /events: all events after `after` or Last-Event-ID, and new ones as they come."""
        resume = request.headers.get("Last-Event-ID") or request.query.get("after") or "0"
        if not resume.isascii() or not resume.isdigit() or len(resume) > 18:
            raise Invalid("after is wrong", after=f"must be a seq, a whole number from 0, not {resume!r}")
        return await stream_events(request, self._feed, int(resume), self.watchers)

    def _not_held(self, reservation_id: str) -> web.Response:
        known = find(self._service, self._log, reservation_id)
        if known is None:
            self._exporter.releases.labels("unknown").inc()
            raise NotFound(f"there is no reservation {reservation_id}")
        self._exporter.releases.labels("stale").inc()
        return json_response({"released": False, "reason": _fate(known), "state": known["state"]})

    async def _next_hold(self, seconds: float) -> None:
        with self.watchers.wakeup() as wakeup:

            def observer(commit: Commit) -> None:
                if commit.event.kind == "held":
                    wakeup.set()

            self._service.observers.append(observer)
            try:
                await wakeup.wait(seconds)
            finally:
                self._service.observers.remove(observer)


async def health(request: web.Request) -> web.Response:
    """GET /health, when BACKEND_HEALTH_URL is not set: always ok."""
    return json_response({"status": "ok"})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    return web.Response(body=OPENAPI, content_type="application/json", headers={"Cache-Control": "no-cache"})


def local_only(request: web.BaseRequest) -> None:
    """Refuse requests that a browser may have been tricked into sending.

    Raises:
        Forbidden: the Host or the Origin is not local, or it is a callback of a worker.
    """
    host = request.headers.get("Host")  # HTTP/1.0 may do without, and no browser does
    if host is not None and ("@" in host or _hostname(f"//{host}") not in _LOCAL_NAMES):
        raise Forbidden("this port answers to 127.0.0.1 and localhost; the Host header must name one of them")
    if CALLBACK_AGENT in request.headers.get("User-Agent", ""):  # whatever led it here, a session's owner is remote
        raise Forbidden("the control port takes no callbacks of sessions")
    origin = request.headers.get("Origin")
    if origin is not None and _hostname(origin) not in _LOCAL_NAMES:
        raise Forbidden("this port answers only to pages of its own; the Origin header names another")


def control_app(
    control: ControlHandlers, exporter: Exporter, metrics: Handler, *, stub_health: bool
) -> web.Application:
    """The app of NULL_CONTROL_PORT."""
    app = make_app("control", exporter, guard=local_only)
    app.on_shutdown.append(control.watchers.dismiss)
    app.router.add_post("/release", control.release)
    app.router.add_post("/extend", control.extend)
    app.router.add_post("/attach", control.attach)
    app.router.add_get("/reservation", control.reservation)
    app.router.add_get("/reservations", control.reservations)
    app.router.add_get("/readyz", control.readyz)
    app.router.add_get("/status", control.status)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/events", control.events)
    app.router.add_get("/openapi.json", openapi)
    add_page(app)
    if stub_health:
        app.router.add_get("/health", health)
    return app


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _fate(known: ReservationJson) -> str:
    if known["ended_at"] is None:
        return f"the reservation is {known['state']}"
    return f"the reservation has ended: {known['state']}, {known['reason']}"
