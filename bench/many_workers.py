"""Stands in for a thousand workers that hold sessions, so that a dispatcher can be measured on one machine.

One process, one listening socket for each worker. They answer what a dispatcher asks, as docs/http-api.md has it, and
check nothing. The fake autoscaler is told of their load directly.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from nullworker.client.worker_http import INSTANCE_HEADER
from nullworker.http.responses import RESERVATION_HEADER
from nullworker.testing import FakeAutoscaler

#: Seconds between two reports of each, as of an idle worker.
REPORT_SECONDS = 10.0


class ManyWorkers:
    """`async with ManyWorkers(vast, count) as workers:` listens until the block ends.

    Attributes:
        on_begin, on_end: called when a worker begins to hold a session, and when it has ended.
        newest: the session that was begun last, at `begun_at` by the performance counter.
        followed: the sessions whose stream was opened; setting the event ends one.
    """

    def __init__(self, vast: FakeAutoscaler, count: int) -> None:
        self.on_begin: Callable[[], object] = lambda: None
        self.on_end: Callable[[], object] = lambda: None
        self.newest, self.begun_at = "", 0.0
        self.followed: dict[str, asyncio.Event] = {}
        self._vast, self._count = vast, count
        self._working: dict[int, int] = {}  # request_idx by the worker's number
        self._urls: dict[int, str] = {}
        self._numbers: dict[int, int] = {}  # by port

    async def __aenter__(self) -> ManyWorkers:
        app = web.Application()
        for path, handler in (
            ("/session/create", self._create),
            ("/reserve", self._follow),
            ("/ping", self._ping),
            ("/session/get", self._get),
        ):
            app.router.add_post(path, handler)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        for number in range(1, self._count + 1):
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            port = self._runner.addresses[-1][1]
            self._numbers[port], self._urls[number] = number, f"http://127.0.0.1:{port}"
        self._reporting = asyncio.ensure_future(self._report_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reporting.cancel()
        for ended in self.followed.values():
            ended.set()
        await self._runner.cleanup()

    async def _report_all(self) -> None:
        while True:
            for number in self._urls:
                self._report(number)
            await asyncio.sleep(REPORT_SECONDS)

    def _report(self, number: int) -> None:
        working = [self._working[number]] if number in self._working else []
        status = {"id": number, "mtoken": "", "url": self._urls[number], "error_msg": "", "max_perf": 100.0}
        loads = {"cur_load": 100.0 * len(working), "new_load": 0, "rej_load": 0, "cur_perf": 0}
        self._vast.fleet.report({**status, **loads, "working_request_idxs": working}, time.time())

    def _number(self, request: web.Request) -> int:
        assert request.transport is not None
        return self._numbers[request.transport.get_extra_info("sockname")[1]]

    async def _create(self, request: web.Request) -> web.Response:
        came_at = time.perf_counter()
        number, body = self._number(request), await request.json()
        idx = body["auth_data"]["request_idx"]
        if self._working.get(number, idx) != idx:
            return web.json_response({"error": "taken", "reason": "busy", "reservation_id": ""}, status=429)
        if number not in self._working:  # else its answer was lost, and it is asked again
            self._working[number] = idx
            self.newest, self.begun_at = f"session-{number}-{idx}", came_at
            self._report(number)
            self.on_begin()
        lifetime, session_id = body["payload"]["lifetime"], f"session-{number}-{idx}"
        answer = {"session_id": session_id, "expiration": time.time() + lifetime, "lifetime": lifetime}
        headers = {RESERVATION_HEADER: session_id, INSTANCE_HEADER: str(number)}
        return web.json_response(answer, status=201, headers=headers)

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        number, session_id = self._number(request), (await request.json())["session_id"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        ended = self.followed[session_id] = asyncio.Event()
        await response.write(_event(1, session_id, "held", None) + _event(2, session_id, "extended", "attached"))
        while not ended.is_set():
            try:
                await asyncio.wait_for(ended.wait(), 15.0)
            except asyncio.TimeoutError:
                await response.write(b": keepalive\n\n")
        del self.followed[session_id]
        if self._working.pop(number, None) is not None:
            self._report(number)
            self.on_end()
        await response.write(_event(3, session_id, "released", "explicit"))
        return response

    async def _ping(self, _: web.Request) -> web.Response:
        return web.json_response({"result": {"ok": True}})

    async def _get(self, request: web.Request) -> web.Response:
        if self._number(request) in self._working:
            return web.json_response({"ok": True})
        at = "2026-01-01T00:00:00.000Z"
        final = {"state": "released", "reason": "explicit", "held_at": at, "ended_at": at, "held_seconds": 1.0}
        return web.json_response({"ok": False, **final, "result": {"exit_code": 0}}, status=400)


def _event(seq: int, session_id: str, kind: str, reason: str | None) -> bytes:
    at = "2026-01-01T00:00:00.000Z"
    event: dict[str, Any] = {"seq": seq, "at": at, "reservation_id": session_id, "kind": kind, "reason": reason}
    return f"id: {seq}\ndata: {json.dumps({**event, 'data': {}})}\n\n".encode()
