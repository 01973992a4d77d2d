"""The honest load of a soak: stress/crash_load.py at a steady pace, with metadata and timings."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import aiohttp

from nullworker.testing import FakeAutoscaler
from stress.crash_load import Action, Claim, Json, Ledger, Load
from stress.crash_worker import Worker

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
    """Callers, owners of sessions, a consumer.

    `lost`: what got no answer, or not all of it. With the worker up, that may not happen.
    """

    def __init__(self, worker: Worker, vast: FakeAutoscaler, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(worker, vast, ledger, rng)
        self.lost: Lost = []
        self.traces = [noting(self.lost, aiohttp.ClientConnectionError, ConnectionError)]

    async def run(self, requesters: int = REQUESTERS, owners: int = OWNERS) -> None:
        """All of them, until `over`."""
        await super().run(requesters, owners)

    async def _again(self, action: Action, http: aiohttp.ClientSession, pause: float) -> None:
        await super()._again(action, http, pause * CALMER[getattr(action, "__name__", "")])

    def _wish(self, claim: Claim) -> tuple[Json, float | None]:
        rng = self._rng
        payload: Json = {"duration": rng.choice([0, 0.03, 0.3, 60]), "stream": rng.random() < 0.3}
        if rng.random() < 0.5:
            payload["metadata"] = {"job": claim.idx, "notes": ["ä" * rng.randrange(500)]}
        return payload, rng.choice([None, None, None, rng.uniform(0.005, 0.3)])

    def _cut_off(self, claim: Claim, error: Exception) -> None:
        self.lost.append((time.time(), f"claim {claim.idx} has no whole answer: {error!r}"))
