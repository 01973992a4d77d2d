"""Routes of the external port: signed requests from anywhere. No route of the control port is reachable here.

`POST /reserve` keeps its connection open until the reservation ends; a client that hangs up ends it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from nullworker.errors import Unauthorized
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import Claim, Reservation
from nullworker.fsm.table import ENDED
from nullworker.http.auth import Authenticator, Grant
from nullworker.http.bodies import BODY_LIMIT, check_metadata, read_body
from nullworker.http.ended import EndedClaims
from nullworker.http.reservations import ended_error, verdict_response, warn_if_capped
from nullworker.http.responses import HELD, Counts, json_response, make_app, same_secret
from nullworker.http.sessions import SessionHandlers
from nullworker.http.sse import stream_reservation
from nullworker.logs import get_log
from nullworker.service import Service

log = get_log(__name__)

#: Makes the start script update the worker (vastai 1.9.1, server/lib/backend.py, pyworker_update_handler).
FORCE_UPDATE: Final = Path("/.force_update")


#: A session's callback has 64 KiB and its route as much, which is the most that an honest caller sends.
MAX_EXTERNAL_BODY_BYTES: Final = 128 * 1024


class ReservePayload(msgspec.Struct):
    """The payload of /reserve. Unknown fields are ignored."""

    duration: Annotated[float, Meta(ge=0)] | None = None  # seconds
    metadata: dict[str, Any] | None = None
    stream: bool | None = None


class ExternalHandlers:
    """The handlers of the external port."""

    def __init__(
        self,
        service: Service,
        event_log: EventLog,
        authenticator: Authenticator,
        sessions: SessionHandlers,
        ended: EndedClaims,
        *,
        master_token: str,
    ) -> None:
        self._service = service
        self._log = event_log
        self._authenticator = authenticator
        self._sessions = sessions
        self._ended = ended
        self._token = master_token

    async def reserve(self, request: web.Request) -> web.StreamResponse:
        """POST /reserve: claim the slot, or wait for the end of a session; answers when the reservation has ended."""
        body = await read_body(request)
        grant = await self._authenticator.authenticate(body)
        payload = grant.read(ReservePayload)
        reservation = self._claim(grant, payload)
        stream = bool(payload.stream)
        del body, grant, payload  # they would use 1 kB for each waiting caller
        return await self._verdict(request, reservation, stream)

    async def update(self, request: web.Request) -> web.Response:
        """POST /pyworker/update: create the file by which the start script updates the worker."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self._token or not same_secret(given, self._token):
            raise Unauthorized("the token is not this worker's MASTER_TOKEN", reason="token")
        try:
            FORCE_UPDATE.touch()
        except OSError as error:
            log.error("update_not_marked", path=str(FORCE_UPDATE), why=error.strerror)
            return json_response({"error": f"{FORCE_UPDATE} cannot be written: {error.strerror}"}, 500)
        return json_response({"ok": True})

    def _claim(self, grant: Grant, payload: ReservePayload) -> Reservation:
        """A new reservation; with a session_id, the held session.

        Raises:
            Gone: the session, or the request that this very grant has made, has ended.
        """
        check_metadata(payload.metadata)
        if grant.session_id is not None:
            return self._sessions.find(grant, grant.session_id)
        auth_sha256 = None if grant.auth is None else grant.auth_sha256
        if grant.verified and auth_sha256 is not None:
            row = self._ended.made_with("request", auth_sha256)
            if row is not None:
                raise ended_error(row)
        reservation = self._service.claim(
            Claim(
                duration=payload.duration,
                request_idx=grant.request_idx,
                metadata=payload.metadata,
                auth_sha256=auth_sha256,
            )
        )
        warn_if_capped(reservation, payload.duration)
        return reservation

    async def _verdict(self, request: web.Request, reservation: Reservation, stream: bool) -> web.StreamResponse:
        """Wait for the end of the reservation, and answer. A hang-up or an error ends a request reservation."""
        if reservation.state not in ENDED:
            request[HELD] = True
        try:
            if stream:
                return await stream_reservation(request, self._service, self._log, reservation)
            return verdict_response(await self._service.ended(reservation))
        except BaseException as error:
            hung_up = isinstance(error, (asyncio.CancelledError, ConnectionError))
            if reservation.terms.kind == "request":  # a session does not depend on this connection
                self._service.cancel(reservation.id, "client_disconnect" if hung_up else "worker_error")
            raise


def external_app(
    external: ExternalHandlers, sessions: SessionHandlers, counts: Counts, *, instance: int | None = None
) -> web.Application:
    """The app of WORKER_PORT."""
    app = make_app("external", counts, instance=instance)
    app[BODY_LIMIT] = MAX_EXTERNAL_BODY_BYTES
    app.router.add_post("/reserve", external.reserve)
    app.router.add_post("/session/create", sessions.create)
    app.router.add_post("/session/end", sessions.end)
    app.router.add_post("/session/get", sessions.get)
    app.router.add_post("/session/health", sessions.health)
    app.router.add_post("/ping", sessions.ping)
    app.router.add_post("/pyworker/update", external.update)
    return app


def session_end_app(sessions: SessionHandlers, counts: Counts) -> web.Application:
    """The app of WORKER_HTTP_PORT: plain http on 127.0.0.1, where a consumer may end its session."""
    app = make_app("session_end", counts)
    app[BODY_LIMIT] = MAX_EXTERNAL_BODY_BYTES
    app.router.add_post("/session/end", sessions.end)
    return app
