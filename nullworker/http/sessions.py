"""Routes of session reservations, which live without a connection until they are ended or their lifetime passes.

Answers are those that the official client expects (vastai 1.9.1, client/client.py, client/session.py) and statuses
those of its own worker (server/lib/backend.py), except that /session/create checks the signature. Ending a session
needs the whole auth_data that it was created with; the log keeps its SHA-256.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from nullworker.clock import tidy
from nullworker.errors import Gone, Invalid, RequestError, Unauthorized
from nullworker.fsm.book import Claim, Reservation
from nullworker.fsm.events import SessionTerms
from nullworker.fsm.table import ENDED
from nullworker.http.auth import Authenticator, Grant, owns
from nullworker.http.bodies import check_metadata, decode, read_body, unfit
from nullworker.http.ended import EndedClaims
from nullworker.http.reservations import ended_error, final_status, verdict_response, warn_if_capped
from nullworker.http.responses import RESERVATION_HEADER, json_response
from nullworker.outgoing import OwnPorts
from nullworker.service import Service
from nullworker.settings import is_absolute_http_url

#: Bytes of JSON of on_close_route, and of on_close_payload.
MAX_CALLBACK_BYTES: Final = 64 * 1024


class CreatePayload(msgspec.Struct):
    """The payload of /session/create. Unknown fields are ignored."""

    lifetime: Annotated[float, Meta(gt=0)] | None = None  # seconds
    on_close_route: str | None = None
    on_close_payload: Any = None
    metadata: dict[str, Any] | None = None


class Named(msgspec.Struct):
    """The body of /session/get, /health and /end: an id, and the auth_data of its creation."""

    session_id: str
    session_auth: Any = None


def _created(session: Reservation) -> web.Response:
    assert session.terms.session is not None
    body = {
        "session_id": session.id,
        "expiration": session.ends_at,
        "lifetime": tidy(session.terms.session.lifetime),
    }
    return json_response(body, 201, {RESERVATION_HEADER: session.id})


class SessionHandlers:
    """The handlers for sessions. No callback may go to `own_ports`."""

    def __init__(
        self,
        service: Service,
        authenticator: Authenticator,
        ended: EndedClaims,
        *,
        own_ports: OwnPorts,
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._ended = ended
        self._own_ports = own_ports

    async def create(self, request: web.Request) -> web.Response:
        """POST /session/create: create a session without queueing, or find the one that the same grant has created."""
        grant = await self._authenticator.authenticate(await read_body(request))
        if grant.verified and (again := self._made_with(grant.auth_sha256)) is not None:
            return _created(again)
        payload = grant.read(CreatePayload)
        check_metadata(payload.metadata)
        for name in ("on_close_route", "on_close_payload"):
            if why := unfit(getattr(payload, name), MAX_CALLBACK_BYTES):
                raise Invalid(f"{name} {why}", payload={name: why})
        self._check_route(payload.on_close_route)
        wanted = 60.0 if payload.lifetime is None else payload.lifetime
        lifetime = min(wanted, self._service.book.limits.max_reservation_seconds)
        terms = SessionTerms(
            lifetime=lifetime,
            on_close_route=payload.on_close_route,
            on_close_payload=payload.on_close_payload if payload.on_close_route is not None else None,
        )
        session = self._service.claim(
            Claim(
                kind="session",
                duration=lifetime,
                request_idx=grant.request_idx,
                metadata=payload.metadata,
                session=terms,
                auth_sha256=grant.auth_sha256,
                cost=grant.cost,
            )
        )
        if session.state in ENDED:
            return verdict_response(session)
        warn_if_capped(session, wanted)
        return _created(session)

    async def end(self, request: web.Request) -> web.Response:
        """POST /session/end: release a session."""
        named = await self._named(request)
        session = self._find(named.session_id)
        if session is None:
            raise self._not_held(named, f"session with id {named.session_id} not found")
        self._check_auth(session, named.session_auth)
        self._service.release(session.id, reason="session_end")
        body = {"ended": True, "removed_session": session.id}
        return json_response(body, headers={RESERVATION_HEADER: session.id})

    async def get(self, request: web.Request) -> web.Response:
        """POST /session/get: the terms of a session, for its owner."""
        named = await self._named(request)
        session = self._find(named.session_id)
        if session is None:
            raise self._not_held(named, "session does not exist")
        terms = self._check_auth(session, named.session_auth)
        return json_response(
            {
                "session_id": session.id,
                "auth_data": named.session_auth,
                "lifetime": terms.lifetime,
                "expiration": session.ends_at,
                "created_at": session.queued_at,
                "on_close_route": terms.on_close_route,
                "on_close_payload": terms.on_close_payload,
            },
            headers={RESERVATION_HEADER: session.id},
        )

    async def health(self, request: web.Request) -> web.Response:
        """POST /session/health: whether a session is open."""
        named = await self._named(request)
        session = self._find(named.session_id)
        if session is None:
            row = self._ended.session(named.session_id, named.session_auth)
            if row is None:
                return json_response({"ok": False})
            return json_response({"ok": False, **final_status(row)}, headers={RESERVATION_HEADER: row["id"]})
        self._check_auth(session, named.session_auth)
        return json_response({"ok": True}, headers={RESERVATION_HEADER: session.id})

    async def ping(self, request: web.Request) -> web.Response:
        """POST /ping: renew a session by its lifetime; a later deadline stays."""
        grant = await self._authenticator.authenticate(await read_body(request))
        if grant.session_id is None:
            raise Invalid("session_id is missing: it names the session to renew", session_id="missing parameter")
        session = self.find(grant, grant.session_id)
        self._service.renew(session.id)
        return json_response({"result": {"ok": True}}, headers={RESERVATION_HEADER: session.id})

    def find(self, grant: Grant, session_id: str) -> Reservation:
        """The held session, for a caller that waits for its end.

        Raises:
            Gone: it has ended, or never existed. Its owner gets its final status.
        """
        session = self._find(session_id)
        if session is None:
            raise self._gone(grant, session_id)
        return session

    def _made_with(self, auth_sha256: str) -> Reservation | None:
        """The held session that was created with this auth, renewed; None: there never was one.

        Raises:
            Gone: it has ended.
            LogUnavailable: it could not be renewed.
        """
        held = self._service.book.held
        if held is not None and held.terms.session is not None and held.terms.auth_sha256 == auth_sha256:
            self._service.renew(held.id)
            return held
        if (row := self._ended.made_with("session", auth_sha256)) is not None:
            raise ended_error(row)
        return None

    def _gone(self, grant: Grant, session_id: str) -> Gone:
        row = self._ended.session(session_id, grant.auth_json)
        return Gone(f"there is no session {session_id}") if row is None else ended_error(row)

    def _not_held(self, named: Named, message: str) -> RequestError:
        """The answer about a session that is not held; its owner also gets its final status."""
        row = self._ended.session(named.session_id, named.session_auth)
        return RequestError(message) if row is None else RequestError(message, about=row["id"], **final_status(row))

    async def _named(self, request: web.Request) -> Named:
        return decode(await read_body(request), Named)

    def _find(self, session_id: str) -> Reservation | None:
        held = self._service.book.held
        return held if held is not None and held.id == session_id and held.terms.session is not None else None

    def _check_auth(self, session: Reservation, auth: Any) -> SessionTerms:
        terms = session.terms.session
        assert terms is not None
        if not owns(auth, session.terms.auth_sha256 or ""):
            raise Unauthorized("session_auth is not valid", reason="session")
        return terms

    def _check_route(self, route: str | None) -> None:
        if route is None:
            return
        why = None
        if not is_absolute_http_url(route):
            why = "must be an absolute http or https URL: this worker forwards nothing, so a relative one leads nowhere"
        else:
            try:
                if self._own_ports.are_behind(route):
                    why = "must not be one of this worker's own ports"
            except ValueError:
                why = "must be a url that can be called"
        if why:
            raise Invalid(f"on_close_route {why}", payload={"on_close_route": why})
