"""Faults around the soaked worker: outages of the autoscaler, and a health endpoint that flaps.

An outage lasts for a time, not for a number of calls, so that one report in doubt is known as such.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from typing import Literal

from aiohttp import web

from nullworker.autoscaler.keys import REFETCH_SECONDS
from nullworker.testing.faults import CALLS, Call, How
from stress.soak_worker import Ear

#: Seconds that the health endpoint hangs: longer than NULL_HEALTH_TIMEOUT of the worker.
HANGS_SECONDS = 1.5
#: Seconds after an outage of the key in which the worker may not have asked for it again: its own pause, and patience
#: with a machine that does other things.
KEY_SECONDS = REFETCH_SECONDS + 5.0
HOW: tuple[How, ...] = ("down", "late", 500)


class Weather:
    """`async with`: the health endpoint at `health_url`. `run` makes faults every `pause` seconds, until cancelled."""

    def __init__(self, vast: Ear, rng: random.Random, pause: float, counts: Counter[str]) -> None:
        self._vast, self._rng, self._pause, self._counts = vast, rng, pause, counts
        self._health: Literal["well", "unwell", "hangs"] = "well"
        self._key_was_down = -math.inf  # until then, by time.monotonic()
        self.health_url = ""

    @property
    def key_in_doubt(self) -> bool:
        """Whether the worker may be unable to tell a forged signature from one by a new key."""
        return time.monotonic() < self._key_was_down + KEY_SECONDS

    async def __aenter__(self) -> Weather:
        app = web.Application()
        app.router.add_get("/health", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.health_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/health"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def run(self) -> None:
        """Outages and flaps, each at its own times."""
        await asyncio.gather(self._outages(), self._flaps())

    def clear(self) -> None:
        """All is well again."""
        self._end_outage()
        self._health = "well"

    def _end_outage(self) -> None:
        self._vast.clear()
        if self._key_was_down == math.inf:
            self._key_was_down = time.monotonic()

    async def _outages(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(self._pause * rng.uniform(0.5, 1.5))
            how = rng.choice(HOW)
            calls: list[Call] = [rng.choice(CALLS[:3])] if rng.random() < 0.5 else list(CALLS[:3])
            for call in calls:
                self._vast.fail(call, how)
            if "pubkey" in calls:
                self._key_was_down = math.inf
            self._counts[f"outage of the autoscaler: {'hangs' if how == 'late' else how}"] += 1
            await asyncio.sleep(min(rng.uniform(2.0, 15.0), self._pause))
            self._end_outage()

    async def _flaps(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(self._pause * rng.uniform(0.7, 2.0))
            self._health = rng.choice(["unwell", "hangs"])
            self._counts[f"consumer {self._health}"] += 1
            await asyncio.sleep(rng.uniform(1.5, 4.0))
            self._health = "well"

    async def _answer(self, request: web.Request) -> web.Response:
        if self._health == "hangs":
            await asyncio.sleep(HANGS_SECONDS)
        return web.Response(status=200 if self._health == "well" else 503)
