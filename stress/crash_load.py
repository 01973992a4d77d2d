"""The load of the crash harness: clients, sessions and a releasing consumer, each recording what it saw from outside.

Nothing is judged here. A client that gets no answer records that, and goes on when the worker is back.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

from nullworker.clock import from_iso
from nullworker.testing import FakeAutoscaler
from stress.crash_worker import Worker

Json = dict[str, Any]
Action = Callable[[aiohttp.ClientSession], Awaitable[None]]
#: What a client of a dead worker gets.
LOST = (aiohttp.ClientError, OSError, ValueError)
HEADER = "Nullworker-Reservation"


@dataclass
class Claim:
    """One POST to /reserve or /session/create, as its sender saw it."""

    idx: int
    kind: Literal["request", "session"]
    fate: Literal["lost", "hung_up", "answered"] = "lost"
    status: int = 0
    body: Json = field(default_factory=dict)
    reservation_id: str | None = None  # of the header
    renewed_at: float | None = None  # epoch seconds at which the last ping was sent that was answered with 200
    ended: bool = False  # its owner's /session/end was answered with 200
    callback: bool = False  # it has an on_close_route
    sent: float = math.nan  # of a request: epoch seconds
    answered: float = math.nan


@dataclass
class Release:
    """One POST to /release. `aimed_at` is None for a release of whatever is held; `token` is in its result."""

    token: str
    aimed_at: str | None
    sent: float
    done: float = math.inf
    answer: Json | None = None


@dataclass
class Hold:
    """A time, in epoch seconds, in which a client knew that it holds the worker, unless a release or a kill fell in it.

    `held_at` is what the worker says, `seen_at` when the client heard of it.
    """

    reservation_id: str
    kind: Literal["request", "session"]
    held_at: float
    seen_at: float
    over: float


@dataclass
class Ledger:
    """All that was seen from outside. `kills` are epoch seconds."""

    claims: list[Claim] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    waits: list[tuple[str, int, Json]] = field(default_factory=list)  # answers to who waited for a session
    holds: list[Hold] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    callbacks: set[str] = field(default_factory=set)  # sessions whose end was told


class Load:
    """Everybody who uses the worker. `run` them until `over` is set, and all who asked for a callback have theirs."""

    def __init__(self, worker: Worker, vast: FakeAutoscaler, ledger: Ledger, rng: random.Random) -> None:
        self.over = asyncio.Event()
        self._worker, self._vast, self._ledger, self._rng = worker, vast, ledger, rng
        self._known: list[str] = []  # ids that have been held, for releases that come too late
        self._port = 0
        self._told = asyncio.Event()
        self.traces: list[aiohttp.TraceConfig] = []

    async def run(self, requesters: int = 8, owners: int = 2) -> None:
        """All of them, each one action after the other."""
        app = web.Application()
        app.router.add_post("/closed", self._closed)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._port = runner.addresses[0][1]
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        try:
            async with aiohttp.ClientSession(connector=connector, trace_configs=self.traces) as http:
                await asyncio.gather(
                    *(self._again(self._request, http, 0.6) for _ in range(requesters)),
                    *(self._again(self._session, http, 0.04) for _ in range(owners)),
                    self._again(self._consume, http, 0.02),
                )
                while self._untold():
                    self._told.clear()
                    await self._told.wait()
        finally:
            await runner.cleanup()

    def _untold(self) -> list[Claim]:
        told = self._ledger.callbacks
        return [claim for claim in self._ledger.claims if claim.callback and claim.reservation_id not in told]

    async def _again(self, action: Action, http: aiohttp.ClientSession, pause: float) -> None:
        while not self.over.is_set():
            await action(http)
            await asyncio.sleep(self._rng.uniform(0.0, pause))

    # -- requests ------------------------------------------------------------------------------------------------

    def _wish(self, claim: Claim) -> tuple[Json, float | None]:
        """What a caller asks for, and after how many seconds it hangs up, if it does."""
        rng = self._rng
        payload: Json = {"duration": rng.choice([0, 0.03, 0.1, 0.3, 60]), "stream": rng.random() < 0.3}
        if rng.random() < 0.2:
            del payload["duration"]
        return payload, rng.choice([None, None, rng.uniform(0.005, 0.2)])

    def _cut_off(self, claim: Claim, error: Exception) -> None:
        """A claim has no whole answer; of a worker that is killed all the time, that says nothing."""

    async def _request(self, http: aiohttp.ClientSession) -> None:
        grant = self._vast.grant(self._worker.url)
        claim = Claim(grant["request_idx"], "request")
        self._ledger.claims.append(claim)
        payload, patience = self._wish(claim)
        claim.sent = time.time()
        try:
            async with http.post(
                self._worker.url + "/reserve",
                json={"auth_data": grant, "payload": payload, "session_id": None},
                timeout=aiohttp.ClientTimeout(total=patience),
            ) as answer:
                claim.status, claim.reservation_id = answer.status, answer.headers.get(HEADER)
                if answer.content_type == "text/event-stream":
                    await self._follow(answer, claim)
                else:
                    claim.body = await answer.json()
                    claim.fate = "answered"
                claim.answered = time.time()
        except asyncio.TimeoutError:
            claim.fate = "hung_up"
        except LOST as error:
            self._cut_off(claim, error)

    async def _follow(self, answer: aiohttp.ClientResponse, claim: Claim) -> None:
        last: Json = {}
        hold, ends_at = None, math.inf
        try:
            async for line in answer.content:
                if line.startswith(b"data:"):
                    last = json.loads(line[5:])
                    if hold is None and last.get("kind") == "held":
                        hold = Hold(last["reservation_id"], "request", from_iso(last["at"]), time.time(), math.inf)
                        ends_at = last["data"]["ends_at"]
            if last and "kind" not in last:
                claim.body, claim.fate = last, "answered"
        finally:
            if hold is not None:
                hold.over = min(time.time(), ends_at)
                self._ledger.holds.append(hold)

    # -- sessions ------------------------------------------------------------------------------------------------

    async def _session(self, http: aiohttp.ClientSession) -> None:
        rng, grant = self._rng, self._vast.grant(self._worker.url)
        claim = Claim(grant["request_idx"], "session")
        self._ledger.claims.append(claim)
        payload: Json = {"lifetime": rng.choice([0.1, 0.5, 1.5])}
        if rng.random() < 0.5:
            payload |= {"on_close_route": f"http://127.0.0.1:{self._port}/closed", "on_close_payload": {"n": claim.idx}}
        try:
            status, body = await self._post(http, "/session/create", grant, payload)
        except LOST:
            return
        claim.status, claim.body, claim.fate = status, body, "answered"
        claim.reservation_id = body.get("session_id") or body.get("reservation_id")
        if status != 201:
            return
        claim.callback = "on_close_route" in payload
        held_at = body["expiration"] - payload["lifetime"]
        hold = Hold(body["session_id"], "session", held_at, time.time(), body["expiration"])
        self._ledger.holds.append(hold)
        waiting = asyncio.ensure_future(self._wait(http, body["session_id"]))
        try:
            await self._use(http, claim, grant, hold)
        finally:
            await waiting

    async def _use(self, http: aiohttp.ClientSession, claim: Claim, grant: Json, hold: Hold) -> None:
        """Ping it now and then, and end it, or leave it to its lifetime."""
        session_id = str(claim.reservation_id)
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(self._rng.uniform(0.02, 0.3))
            sent = time.time()
            try:
                status, _ = await self._post(http, "/ping", self._vast.grant(self._worker.url), {}, session_id)
            except LOST:
                continue
            if status == 410:
                return
            if status == 200:
                claim.renewed_at = sent
        if self._rng.random() < 0.6:
            hold.over = min(hold.over, time.time())
            base = self._rng.choice([self._worker.url, f"http://127.0.0.1:{self._worker.http_port}"])
            named = {"session_id": session_id, "session_auth": grant}
            try:
                async with http.post(base + "/session/end", json=named) as answer:
                    claim.ended = answer.status == 200
            except LOST:
                pass

    async def _wait(self, http: aiohttp.ClientSession, session_id: str) -> None:
        """/reserve with a session_id answers when the session has ended."""
        if self._rng.random() < 0.5:
            return
        try:
            status, body = await self._post(http, "/reserve", self._vast.grant(self._worker.url), {}, session_id)
        except LOST:
            return
        if "reservation_id" in body:
            self._ledger.waits.append((session_id, status, body))

    async def _post(
        self, http: aiohttp.ClientSession, path: str, grant: Json, payload: Json, session_id: str | None = None
    ) -> tuple[int, Json]:
        envelope = {"auth_data": grant, "payload": payload, "session_id": session_id}
        async with http.post(self._worker.url + path, json=envelope) as answer:
            return answer.status, await answer.json()

    async def _closed(self, request: web.Request) -> web.Response:
        """The owner's side of on_close_route: it fails now and then."""
        if self._rng.random() < 0.2:
            return web.Response(status=500)
        self._ledger.callbacks.add((await request.json())["session_id"])
        self._told.set()
        return web.Response()

    # -- the consumer --------------------------------------------------------------------------------------------

    async def _consume(self, http: aiohttp.ClientSession) -> None:
        """Look what is held, work a little, release it: by its id, without, by an old id, or forget to."""
        rng = self._rng
        try:
            async with http.get(self._worker.control + "/reservation?wait=1") as answer:
                if answer.status != 200:
                    return
                reservation = await answer.json()
            held = reservation["id"]
            self._known.append(held)
            await asyncio.sleep(rng.uniform(0.0, 0.04))
            if reservation["kind"] == "session" and rng.random() < 0.9:
                return  # mostly its owner's to end
            way = rng.random()
            if way < 0.55:
                await self._release(http, held)
            elif way < 0.8:
                await self._release(http, None)
            elif way < 0.95:
                await self._release(http, rng.choice(self._known))
        except LOST:
            await asyncio.sleep(0.05)

    async def _release(self, http: aiohttp.ClientSession, aimed_at: str | None) -> None:
        release = Release(f"token-{len(self._ledger.releases)}", aimed_at, time.time())
        self._ledger.releases.append(release)
        body: Json = {"result": {"token": release.token}}
        if aimed_at is not None:
            body["reservation_id"] = aimed_at
        try:
            async with http.post(self._worker.control + "/release", json=body) as answer:
                release.answer = await answer.json()
        finally:
            release.done = time.time()
