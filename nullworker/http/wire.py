"""What all ports share: JSON and errors out, one middleware, and how a reservation looks.

The one rule: every answer that is an error is JSON with `error`, made here and nowhere else.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET

from nullworker.clock import elapsed, iso, stopwatch, tidy
from nullworker.errors import RETRY_AFTER_SECONDS, LogUnavailable, RequestError, Unauthorized
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import ending
from nullworker.http.bodies import MAX_BODY_BYTES, too_large
from nullworker.logs import get_log

log = get_log(__name__)

RESERVATION_HEADER: Final = "Nullworker-Reservation"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Set on a request that waited for a reservation: its duration says nothing about this server.
HELD = web.RequestKey("held", bool)
#: Of an app: counts an answer to what was no request.
UNREADABLE: web.AppKey[Callable[[int], None]] = web.AppKey("unreadable")
#: The header `Server`: a name, and no versions, which aiohttp would tell.
SERVER_NAME: Final = "nullworker"


class Counts(Protocol):
    """What the middleware counts into."""

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        """An HTTP request was answered."""
        ...

    def count_auth_failure(self, reason: str) -> None:
        """A request was not authenticated."""
        ...


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Any JSON, not to be cached by anybody."""
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers={"Cache-Control": "no-store", **(headers or {})},
        content_type="application/json",
    )


def make_app(port: str, counts: Counts, guard: Callable[[web.Request], None] | None = None) -> web.Application:
    """An app whose every answer is counted and whose every error is JSON. `guard` may refuse any request."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started, status = stopwatch(), 499
        try:
            response = await _answer(request, handler, guard, counts)
            status = response.status
            return response
        finally:
            info = request.match_info.route.resource
            route = info.canonical if info is not None else "unknown"
            counts.count_request(port, route, status, None if request.get(HELD) else stopwatch() - started)

    async def name_server(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = SERVER_NAME

    app = web.Application(middlewares=[middleware], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(name_server)
    app[UNREADABLE] = lambda status: counts.count_request(port, "unknown", status, None)
    return app


async def _answer(
    request: web.Request, handler: Handler, guard: Callable[[web.Request], None] | None, counts: Counts
) -> web.StreamResponse:
    try:
        if guard is not None:
            guard(request)
        return await handler(request)
    except RequestError as error:
        if isinstance(error, Unauthorized):
            counts.count_auth_failure(error.reason)
        return json_response(error.body, error.status, error.headers)
    except (LogUnavailable, sqlite3.Error) as error:
        body = {"error": f"the event log: {error}", "reason": "log_unavailable"}
        return json_response(body, LogUnavailable.status, {"Retry-After": str(RETRY_AFTER_SECONDS)})
    except web.HTTPException as error:
        return _http_error(request, error)
    except web.RequestPayloadError as error:  # not compressed, or not in chunks, as its headers say
        return json_response({"error": f"the body cannot be read: {' '.join(str(error).split())}"}, 400)
    except ConnectionError:  # raised on, it would be a bug to aiohttp
        return json_response({"error": "the client hung up"}, 499)
    except Exception:
        error_id = secrets.token_hex(4)
        log.exception("bug", error_id=error_id, route=request.path, method=request.method)
        return json_response({"error": f"a bug in nullworker; its log has the details under {error_id}"}, 500)


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPNotFound):
        return json_response({"error": f"there is no {request.path} on this port"}, 404)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return json_response(
            {"error": f"{request.method} is not allowed on {request.path}; allowed: {allowed}"}, 405, {"Allow": allowed}
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return json_response(too_large().body, 413)
    return json_response({"error": error.reason}, error.status)


def same_secret(given: str, ours: str) -> bool:
    """Whether a header has our secret, in constant time; a header may hold any bytes (PEP 383)."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), ours.encode())


# -- reservations out --------------------------------------------------------------------------------------------


def reservation_json(reservation: Reservation, now: float) -> dict[str, Any]:
    """A live reservation, in the shape that the log's view `reservations` gives one."""
    held_at, ended_at = reservation.held_at, reservation.ended_at
    times = (reservation.queued_at, held_at, reservation.ends_at, ended_at)
    queued_at, held, ends, ended = (None if at is None else iso(at) for at in times)
    return {
        "id": reservation.id,
        "kind": reservation.terms.kind,
        "state": reservation.state,
        "reason": reservation.reason,
        "queued_at": queued_at,
        "held_at": held,
        "ends_at": ends,
        "ended_at": ended,
        "queued_seconds": elapsed(reservation.queued_at, held_at or ended_at or now),
        "held_seconds": None if held_at is None else elapsed(held_at, ended_at or now),
        "duration_cap": tidy(reservation.terms.duration_cap),
        "request_idx": reservation.terms.request_idx,
        "metadata": reservation.terms.metadata,
        "result": None if reservation.result is UNSET else reservation.result,
    }


def verdict(reservation: Reservation) -> tuple[int, dict[str, Any]]:
    """Status and body for the caller of /reserve: how the reservation has ended."""
    assert reservation.ended_at is not None
    held_at = reservation.held_at
    edge = ending(reservation.state, reservation.reason, was_held=held_at is not None)
    assert edge.status is not None
    if edge.status != 200:
        return edge.status, {"error": edge.says, "reservation_id": reservation.id, "reason": reservation.reason}
    assert held_at is not None
    if reservation.state == "expired":
        assert reservation.ends_at is not None
        return 200, {"released": reservation.reason, "duration": elapsed(held_at, reservation.ends_at)}
    body = {
        "released": reservation.reason,
        "duration_cap": tidy(reservation.terms.duration_cap),
        "reservation_id": reservation.id,
        "queued_seconds": elapsed(reservation.queued_at, held_at),
        "held_seconds": elapsed(held_at, reservation.ended_at),
    }
    if reservation.result is not UNSET:
        body["result"] = reservation.result
    return 200, body


def verdict_response(reservation: Reservation) -> web.Response:
    """The plain answer of /reserve."""
    status, body = verdict(reservation)
    headers = {RESERVATION_HEADER: reservation.id}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return json_response(body, status, headers)
