"""A fake worker that follows the contract for sessions and can lose answers, refuse and be silent; for clients' tests.

Real workers are used in tests/lifecycle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web


class ContractWorker:
    """One slot, one session at most.

    Attributes:
        lose: answers of /session/create that are made, and never arrive.
        refuse: the status that the next claims get; None: none.
        silent: every request is cut.
        attached: whether a consumer has attached to what is held.
        calls: how often each route was called.
    """

    def __init__(self, lifetime_cap: float = 3600.0) -> None:
        self.lose = 0
        self.refuse: int | None = None
        self.silent = False
        self.attached = False
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.session: dict[str, Any] | None = None
        self.finals: dict[str, dict[str, Any]] = {}  # by session id
        self._cap = lifetime_cap
        self._ended = asyncio.Event()
        self._changed = asyncio.Event()
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[ContractWorker]:
        app = web.Application()
        for route in ("/session/create", "/ping", "/reserve", "/session/end", "/session/get"):
            app.router.add_post(route, self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            yield self
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await runner.cleanup()

    def end(self, state: str, reason: str, result: Any = None) -> None:
        """What is held ends."""
        assert self.session is not None
        self.finals[self.session["id"]] = {
            "state": state,
            "reason": reason,
            "held_at": "2027-01-15T08:00:00.000Z",
            "ended_at": "2027-01-15T08:01:00.000Z",
            "held_seconds": 60,
            "result": result,
            "auth": self.session["auth"],
        }
        self.session = None
        self.attached = False
        self._changed.set()

    def attach(self) -> None:
        """A consumer attaches."""
        self.attached = True
        self._changed.set()

    def cut(self) -> None:
        """Every request is cut from now on, those that are open too."""
        self.silent = True
        self._changed.set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.calls[request.path] += 1
        body = json.loads(await request.read())
        if self.silent:
            return self._hang_up(request)
        if request.path == "/session/create":
            return self._create(request, body)
        named = body["session_id"]
        held = self.session
        if held is None or held["id"] != named:
            final = self.finals.get(named)
            status = 410 if request.path in ("/ping", "/reserve") else 400
            if final is None:
                return web.json_response({"error": f"there is no session {named}"}, status=status)
            told = {name: value for name, value in final.items() if name != "auth"}
            return web.json_response({"error": "it has ended", **told}, status=status)
        if request.path == "/session/get":
            return web.json_response({"session_id": named})
        if request.path == "/ping":
            self._renew()
            return web.json_response({"result": {"ok": True}})
        if request.path == "/session/end":
            self.end("released", "session_end")
            return web.json_response({"ended": True, "removed_session": named})
        return await self._stream(request, named)

    def _create(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.bodies.append(body)
        auth = body["auth_data"]
        for known, final in self.finals.items():
            if final["auth"] == auth:
                told = {name: value for name, value in final.items() if name != "auth"}
                return web.json_response({"error": "it has ended", "reservation_id": known, **told}, status=410)
        if self.session is not None and self.session["auth"] != auth:
            return web.json_response({"error": "the worker is taken", "reservation_id": "r2"}, status=429)
        if self.session is None:
            if self.refuse is not None:
                return web.json_response({"error": "not now", "reservation_id": "r1"}, status=self.refuse)
            self._number += 1
            lifetime = min(body["payload"]["lifetime"], self._cap)
            self.session = {"id": f"s{self._number}", "auth": auth, "lifetime": lifetime}
            self._renew()
        if self.lose:
            self.lose -= 1
            return self._hang_up(request)
        told = {"session_id": self.session["id"], "expiration": 0, "lifetime": self.session["lifetime"]}
        return web.json_response(told, status=201)

    async def _stream(self, request: web.Request, session_id: str) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await self._event(response, 1, "queued")
        await self._event(response, 2, "held")
        told = False
        while session_id not in self.finals:
            self._changed.clear()
            if self.attached and not told:
                told = True
                await self._event(response, 3, "extended", "attached")
            await self._changed.wait()
            if self.silent:
                return self._hang_up(request, response)
        final = self.finals[session_id]
        await self._event(response, 4, final["state"], final["reason"])
        last = {"released": final["reason"], "held_seconds": 60, "result": final["result"]}
        if final["state"] == "cancelled":
            last = {"error": "cancelled", "reason": final["reason"]}
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        return response

    async def _event(self, response: web.StreamResponse, seq: int, kind: str, reason: str | None = None) -> None:
        event = {"seq": seq, "kind": kind, "reason": reason, "at": "2027-01-15T08:00:00.000Z"}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _renew(self) -> None:
        assert self.session is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self.session["lifetime"], self._expire, self.session["id"])

    def _expire(self, session_id: str) -> None:
        if self.session is not None and self.session["id"] == session_id and not self.attached:
            self.end("expired", "duration_elapsed")

    def _hang_up(self, request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return response or web.Response()
