"""A receiver of a sink's POSTs for tests, which answers as told and keeps everything it got."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import web
from harness import PATIENCE


class Got(NamedTuple):
    """One POST. `at` is the loop's time."""

    at: float
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a batch, or of ndjson."""
        if "ndjson" in self.headers["Content-Type"]:
            return [json.loads(line) for line in self.body.splitlines()]
        found: list[dict[str, Any]] = json.loads(self.body)
        return found


#: The status of the answer to a POST, or seconds after which it comes, if ever.
Answer = Callable[[list[dict[str, Any]]], "int | float"]


class Receiver:
    """Listens on 127.0.0.1 while the block lasts. `answer` may be changed at any time."""

    def __init__(self, answer: Answer = lambda events: 200) -> None:
        self.answer = answer
        self.got: list[Got] = []
        self.location = "http://127.0.0.1:9/"  # to which an answer of 3xx leads

    async def __aenter__(self) -> Receiver:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/events", self._events)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/events"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _events(self, request: web.Request) -> web.Response:
        got = Got(asyncio.get_running_loop().time(), dict(request.headers), await request.read(), 0)
        answer = self.answer(got.events)
        if isinstance(answer, float):
            self.got.append(got._replace(status=-1))
            await asyncio.sleep(answer)
            answer = 200
        self.got.append(got._replace(status=answer))
        return web.Response(status=answer, headers={"Location": self.location} if 300 <= answer < 400 else {})

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """The events of all that was accepted, in order."""
        return [event for got in self.got if 200 <= got.status < 300 for event in got.events]

    @property
    def seqs(self) -> list[int]:
        """The seqs of the log's events among them."""
        return [event["data"]["seq"] for event in self.accepted if ".reservation." in event["type"]]

    @property
    def told(self) -> list[str]:
        """What the worker told of itself."""
        return [event["type"].rpartition(".")[2] for event in self.accepted if ".worker." in event["type"]]

    async def until(self, true: Callable[[Receiver], bool]) -> None:
        """Wait until it is so."""
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        while not true(self):
            assert loop.time() < end, [(got.status, len(got.events)) for got in self.got[-20:]]
            await asyncio.sleep(0.005)
