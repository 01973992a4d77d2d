"""What all ports share: JSON responses, error responses, and the counting of every response.

Every error response is JSON with a key `error` and is made here.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from nullworker.control_client import SERVER_NAME
from nullworker.errors import RETRY_AFTER_SECONDS, LogUnavailable, RequestError, Unauthorized
from nullworker.logs import get_log

log = get_log(__name__)

RESERVATION_HEADER: Final = "Nullworker-Reservation"
INSTANCE_HEADER: Final = "Nullworker-Instance"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Set on a request that waited for a reservation, whose duration is left out of the histogram.
HELD = web.RequestKey("held", bool)


class Counts(Protocol):
    """Counters of HTTP answers; the exporter implements it."""

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        """An HTTP request was answered."""
        ...

    def count_auth_failure(self, reason: str) -> None:
        """A request was not authenticated."""
        ...


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON response that must not be cached."""
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers={"Cache-Control": "no-store", **(headers or {})},
        content_type="application/json",
    )


Guard = Callable[[web.BaseRequest], None]


class Answers:
    """What is done around the handlers of one port: its guard, error responses, headers of its own, counters."""

    def __init__(self, port: str, counts: Counts, guard: Guard | None, instance: int | None) -> None:
        self._port = port
        self._counts = counts
        self.guard = guard
        self._instance = None if instance is None else str(instance)

    def sign(self, response: web.StreamResponse) -> None:
        """Say who answers; before the response is prepared."""
        response.headers["Server"] = SERVER_NAME
        if self._instance is not None and RESERVATION_HEADER in response.headers:
            response.headers[INSTANCE_HEADER] = self._instance

    def to_error(self, request: web.BaseRequest, error: Exception) -> web.Response:
        """The response for an exception; call it in the `except` block, since a bug is logged with its traceback."""
        if isinstance(error, RequestError):
            if isinstance(error, Unauthorized):
                self._counts.count_auth_failure(error.reason)
            headers = error.headers
            if error.about is not None:
                headers = {**headers, RESERVATION_HEADER: error.about}
            return json_response(error.body, error.status, headers)
        if isinstance(error, (LogUnavailable, sqlite3.Error)):
            body = {"error": f"the event log: {error}", "reason": "log_unavailable"}
            return json_response(body, LogUnavailable.status, {"Retry-After": str(RETRY_AFTER_SECONDS)})
        if isinstance(error, web.HTTPException):
            return _http_error(request, error)
        if isinstance(error, web.RequestPayloadError):  # compression or chunks are not as the headers say
            return json_response({"error": f"the body cannot be read: {' '.join(str(error).split())}"}, 400)
        if isinstance(error, ConnectionError):  # if raised, aiohttp would log it as a bug
            return json_response({"error": "the client hung up"}, 499)
        error_id = secrets.token_hex(4)
        log.exception("bug", error_id=error_id, route=request.path, method=request.method)
        return json_response({"error": f"a bug in nullworker; its log has the details under {error_id}"}, 500)

    def count(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Count an answered request. The seconds of one that waited for a reservation are not counted."""
        found = getattr(request, "_match_info", None)  # `match_info` asserts that a route was looked for
        resource = None if found is None else found.route.resource
        route = "unknown" if resource is None else resource.canonical
        self._counts.count_request(self._port, route, status, None if request.get(HELD) else seconds)

    def count_unreadable(self, status: int) -> None:
        """Count the answer to something that could not be parsed as a request."""
        self._counts.count_request(self._port, "unknown", status, None)


#: The Answers of an app, for http/server.py.
ANSWERS: web.AppKey[Answers] = web.AppKey("answers", Answers)


def make_app(port: str, counts: Counts, guard: Guard | None = None, *, instance: int | None = None) -> web.Application:
    """An app with JSON errors and counted answers. `guard` is called before a route is looked for, and may raise.

    `instance`: this worker's CONTAINER_ID, told in each answer about a reservation.
    """
    app = web.Application()
    app[ANSWERS] = Answers(port, counts, guard, instance)
    return app


def _http_error(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPNotFound):
        return json_response({"error": f"there is no {request.path} on this port"}, 404)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return json_response(
            {"error": f"{request.method} is not allowed on {request.path}; allowed: {allowed}"}, 405, {"Allow": allowed}
        )
    return json_response({"error": error.reason}, error.status)


def is_bearer(request: web.BaseRequest, token: str) -> bool:
    """Whether a request has this bearer token; the scheme is the same in capitals and in small letters (RFC 9110)."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return same_secret(given, token) and scheme.lower() == "bearer"


def same_secret(given: str, ours: str) -> bool:
    """Compare a header with our secret in constant time; a header may hold any bytes (PEP 383)."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), ours.encode())
