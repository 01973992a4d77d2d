"""A minimal worker for tests of the fake autoscaler and the client: holds, releases, refuses, streams, and reports.

Tests await its queues instead of sleeping.
"""

from __future__ import annotations

import asyncio
import json
from itertools import count
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

Json = dict[str, Any]


class FakeWorker:
    """Reports to `report_to` (None: to nobody) when it starts and at each change."""

    def __init__(self, report_to: str | None = None, *, number: int = 1, streams: bool = True) -> None:
        self.report_to, self.number, self.streams = report_to, number, streams
        self.refusals: list[tuple[int, Json]] = []  # for the next claims
        self.bodies: list[Json] = []  # of each POST to /reserve
        self.held: asyncio.Queue[str] = asyncio.Queue()  # reservation ids
        self.ended: asyncio.Queue[tuple[str, str]] = asyncio.Queue()  # reservation id, status
        self.url = ""
        self._ids = count(1)
        self._working: dict[str, int] = {}  # reservation id: request_idx
        self._released: dict[str, asyncio.Future[Json]] = {}

    async def __aenter__(self) -> FakeWorker:
        app = web.Application()
        app.router.add_post("/reserve", self._reserve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._client = aiohttp.ClientSession()
        await self.report()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._client.close()

    async def report(self, **fields: Any) -> int | None:
        """Sends a worker_status; the answer's status, or None when there was none."""
        load = 100 * len(self._working)
        status = {
            "id": self.number,
            "mtoken": "token",
            "url": self.url,
            "error_msg": "",
            "max_perf": 100,
            "cur_load": load,
            "new_load": 0,
            "rej_load": 0,
            "cur_perf": 0,
            "working_request_idxs": list(self._working.values()),
        }
        return await self._post("/worker_status/", {**status, **fields})

    async def tell(self, *outcomes: Json) -> int | None:
        """Sends a delete_requests; the answer's status, or None when there was none."""
        body = {"worker_id": self.number, "mtoken": "token", "requests": outcomes}
        return await self._post("/delete_requests/", body)

    def release(self, known_as: str, **answer: Any) -> None:
        self._released[known_as].set_result(answer)

    async def _post(self, route: str, body: Json) -> int | None:
        if self.report_to is None:
            return None
        try:
            async with self._client.post(self.report_to + route, json=body) as response:
                return response.status
        except aiohttp.ServerDisconnectedError:
            return None

    async def _reserve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.refusals:
            code, refusal = self.refusals.pop(0)
            return web.json_response(refusal, status=code)
        payload, auth = body.get("payload", body), body.get("auth_data", {})
        known_as = f"r{next(self._ids)}"
        self._released[known_as] = asyncio.get_running_loop().create_future()
        self._working[known_as] = auth.get("request_idx", 0)
        status = "Cancelled"
        try:
            await self.report()
            answer_to: web.StreamResponse | None = None
            if payload.get("stream") and self.streams:
                headers = {"Content-Type": "text/event-stream", "Nullworker-Reservation": known_as}
                answer_to = web.StreamResponse(headers=headers)
                await answer_to.prepare(request)
                at = "2026-11-26T10:00:00.000Z"
                event = {"seq": 7, "at": at, "kind": "held", "reason": None, "reservation_id": known_as, "data": {}}
                await answer_to.write(f"id: 7\ndata: {json.dumps(event)}\n\n: keepalive\n\n".encode())
            self.held.put_nowait(known_as)
            answer = await self._released[known_as]
            status = "Success"
            if answer_to is None:
                return web.json_response(answer)
            await answer_to.write(f"data: {json.dumps(answer)}\n\n".encode() if answer else b"")
            return answer_to
        finally:
            idx = self._working.pop(known_as)
            self.ended.put_nowait((known_as, status))
            if status == "Success":
                await self.report()
                await self.tell({"request_idx": idx, "success": True, "status": status})
