"""One session at one worker, over HTTP: asked for, renewed, followed to its end, ended.

It needs the worker's url and the body of the request that asked for the session, and nothing else: so another process
can go on with it. The same body is sent again after a lost answer, and the worker answers with the same session.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import aiohttp

from nullworker.clock import from_iso
from nullworker.outgoing import describe_failure

#: Seconds that one call may take; the SDK's own figure (vastai 1.9.1, client/client.py).
CALL_SECONDS: Final = 10.0
#: Seconds without a byte after which a stream is dead: three of the worker's keepalives.
SILENT_SECONDS: Final = 45.0
#: Bytes of one line of a stream: a result of 64 KiB may be several times as long once it is escaped.
LINE_BYTES: Final = 2**20
ENDS: Final = ("released", "expired", "cancelled")
_FINAL: Final = ("state", "reason", "held_at", "ended_at", "held_seconds", "result")

Outcome = Literal["held", "refused", "unsure", "ended"]


class Asked(NamedTuple):
    """What came of asking for the session, or renewing it.

    `refused`: the worker has surely not taken it. `unsure`: it may have. `ended`: it was held, and is over.
    """

    outcome: Outcome
    session_id: str | None = None
    lifetime: float | None = None  # seconds, as the worker has it
    why: str = ""
    status: int | None = None
    final: dict[str, Any] | None = None


class WorkerSession:
    """One session. `http` must have no limit of connections: each session that is followed keeps one open."""

    def __init__(self, http: aiohttp.ClientSession, url: str, body: str) -> None:
        self._http = http
        self._url = url
        self._body = body
        self._auth = json.loads(body)["auth_data"]

    async def create(self) -> Asked:
        """Ask for it; the same body again gives the same session."""
        try:
            async with self._post("/session/create", self._body) as answer:
                told = await _json(answer)
                if answer.status == 201:
                    lifetime = told.get("lifetime")
                    return Asked("held", str(told["session_id"]), float(lifetime) if lifetime else None)
                why = f"{self._url} answered {answer.status} {told.get('error', '')}".strip()
                if answer.status == 410:
                    known_as = told.get("session_id") or answer.headers.get("Nullworker-Reservation")
                    return Asked("ended", known_as, why=why, status=410, final=final_status(told))
                sure = answer.status < 500 or answer.status == 503
                return Asked("refused" if sure else "unsure", why=why, status=answer.status)
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            return Asked("refused", why=f"{self._url} cannot be reached: {describe_failure(error)}")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError) as error:
            return Asked("unsure", why=f"{self._url} did not answer: {describe_failure(error)}")

    async def renew(self, session_id: str) -> Asked:
        """Renew it by its lifetime. `refused` and `unsure`: it was not renewed."""
        return await self._about("/ping", {"auth_data": self._auth, "payload": {}, "session_id": session_id})

    async def end(self, session_id: str) -> Asked:
        """End it."""
        return await self._about("/session/end", {"session_id": session_id, "session_auth": self._auth})

    async def follow(self, session_id: str, on_attached: Callable[[], None]) -> Asked:
        """Wait for its end. `ended` has the final status; `unsure`: the stream broke, and can be opened anew."""
        body = {"auth_data": self._auth, "payload": {"stream": True}, "session_id": session_id}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_SECONDS, sock_read=SILENT_SECONDS)
        events: list[dict[str, Any]] = []
        last: dict[str, Any] | None = None
        try:
            async with self._post("/reserve", json.dumps(body), timeout) as answer:
                if answer.content_type != "text/event-stream":
                    return self._told(answer.status, await _json(answer))
                async for line in answer.content:
                    if not line.startswith(b"data:"):
                        continue
                    last = json.loads(line[5:])
                    if "kind" not in last:
                        break
                    events.append(last)
                    if last["kind"] == "extended" and last.get("reason") == "attached":
                        on_attached()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            return Asked("unsure", why=f"{self._url}: the stream broke: {describe_failure(error)}")
        if last is None or "kind" in last:
            return Asked("unsure", why=f"{self._url} closed the stream before the end")
        return Asked("ended", session_id, final=_from_stream(events, last))

    async def _about(self, route: str, body: dict[str, Any]) -> Asked:
        try:
            async with self._post(route, json.dumps(body)) as answer:
                return self._told(answer.status, await _json(answer))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            return Asked("unsure", why=f"{self._url} did not answer: {describe_failure(error)}")

    def _told(self, status: int, told: dict[str, Any]) -> Asked:
        if status == 410 or (status == 400 and "session" in str(told.get("error", ""))):
            return Asked("ended", status=status, final=final_status(told))
        if status == 200 and "released" in told:
            return Asked("ended", status=status, final=_from_stream([], told))
        why = f"{self._url} answered {status} {told.get('error', '')}".strip()
        return Asked("held" if status == 200 else "refused", why=why, status=status)

    def _post(self, route: str, body: str, timeout: aiohttp.ClientTimeout | None = None) -> Any:
        return self._http.post(
            self._url + route,
            data=body.encode(),
            headers={"Content-Type": "application/json"},
            timeout=timeout or aiohttp.ClientTimeout(total=CALL_SECONDS),
            read_bufsize=LINE_BYTES,
            allow_redirects=False,
        )


def final_status(told: dict[str, Any]) -> dict[str, Any] | None:
    """How a reservation ended, out of an answer that has it beside `error`; None where it has not."""
    return {name: told.get(name) for name in _FINAL} if told.get("state") in ENDS else None


def _from_stream(events: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """The final status, out of a reservation's events and the answer to its caller."""
    end = next((event for event in reversed(events) if event["kind"] in ENDS), None)
    held = next((event for event in events if event["kind"] == "held"), None)
    reason = last.get("released", last.get("reason"))
    if end is not None:
        state = end["kind"]
    else:
        state = "cancelled" if "released" not in last else "expired" if reason == "duration_elapsed" else "released"
    held_at, ended_at = (None if event is None else event.get("at") for event in (held, end))
    seconds = last.get("held_seconds", last.get("duration"))
    if held_at is not None and ended_at is not None:
        with contextlib.suppress(ValueError, TypeError):
            seconds = round(max(0.0, from_iso(ended_at) - from_iso(held_at)), 3)
    return {
        "state": state,
        "reason": reason,
        "held_at": held_at,
        "ended_at": ended_at,
        "held_seconds": seconds,
        "result": last.get("result"),
    }


async def _json(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The body, which a proxy in between may have replaced by a page."""
    try:
        told = json.loads(await answer.text(errors="replace"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
