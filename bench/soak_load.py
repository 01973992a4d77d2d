"""The honest side of a soak: bench/crash_load.py at a pace for hours, with metadata, and timed.

The one rule: as there, what is written down was seen from outside the worker.
"""

from __future__ import annotations

import asyncio
import random
import time
from types import SimpleNamespace
from typing import Any

import aiohttp

from bench.crash_load import HEADER, LOST, Action, Claim, Ledger, Load
from bench.crash_worker import Worker
from nullworker.testing import StandIn

#: Times the pauses of the crash harness: some six claims a second, and a session every two or three seconds.
CALMER = {"_request": 4.0, "_session": 120.0, "_consume": 1.0}
REQUESTERS, OWNERS = 8, 1


Lost = list[tuple[float, str]]  # when, in epoch seconds, and what


def noting(lost: Lost, *kinds: type[Exception]) -> aiohttp.TraceConfig:
    """Notes every request of a client that got no answer because of an error of one of these kinds."""

    async def failed(_: aiohttp.ClientSession, __: SimpleNamespace, of: aiohttp.TraceRequestExceptionParams) -> None:
        if isinstance(of.exception, kinds):
            lost.append((time.time(), f"{of.method} {of.url.path} got no answer: {of.exception!r}"))

    trace = aiohttp.TraceConfig()
    trace.on_request_exception.append(failed)
    return trace


class Honest(Load):
    """Callers, owners of sessions, a consumer. `times`: by request_idx, when a claim was sent and when answered.

    `lost`: what got no answer, or not all of it. With the worker up, that may not happen.
    """

    def __init__(self, worker: Worker, vast: StandIn, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(worker, vast, ledger, rng)
        self.times: dict[int, tuple[float, float]] = {}
        self.lost: Lost = []
        self.traces = [noting(self.lost, aiohttp.ClientConnectionError, ConnectionError)]

    async def run(self, requesters: int = REQUESTERS, owners: int = OWNERS) -> None:
        """All of them, until `over`."""
        await super().run(requesters, owners)

    async def _again(self, action: Action, http: aiohttp.ClientSession, pause: float) -> None:
        await super()._again(action, http, pause * CALMER[getattr(action, "__name__", "")])

    async def _request(self, http: aiohttp.ClientSession) -> None:
        rng, grant = self._rng, self._vast.grant(self._worker.url)
        claim = Claim(grant["request_idx"], "request")
        self._ledger.claims.append(claim)
        payload: dict[str, Any] = {"duration": rng.choice([0, 0.03, 0.3, 60]), "stream": rng.random() < 0.3}
        if rng.random() < 0.5:
            payload["metadata"] = {"job": claim.idx, "notes": ["ä" * rng.randrange(500)]}
        patience = rng.choice([None, None, None, rng.uniform(0.005, 0.3)])
        sent = time.time()
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
        except asyncio.TimeoutError:
            claim.fate = "hung_up"
        except LOST as error:
            self.lost.append((time.time(), f"claim {claim.idx} has no whole answer: {error!r}"))
        if claim.fate == "answered":
            self.times[claim.idx] = (sent, time.time())
