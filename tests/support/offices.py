"""A worker and its reporter on a simulated clock, with an autoscaler that answers as it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nullworker.autoscaler.connection import AutoscalerClient, Delivery
from nullworker.autoscaler.messages import OUTCOMES_PATH, Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.readiness import Readiness
from nullworker.service import Service
from stress.simulated_world import SimulatedClock, SimulatedLoop

PERF = 100.0


class Autoscaler(AutoscalerClient):
    """Answers as it is told to. `calls`: when, where, and what."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__(["http://scripted"])
        self.calls: list[tuple[float, str, Any]] = []
        self.answers: dict[str, Delivery] = {}
        self.refused: set[int] = set()
        self.takes = 0.01
        self.during: Callable[[], object] = lambda: None
        self._loop = loop

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = 10.0) -> Delivery:
        self.calls.append((self._loop.time(), path, body))
        await asyncio.sleep(self.takes / 2)
        during, self.during = self.during, lambda: None
        during()
        await asyncio.sleep(self.takes / 2)
        self.trouble = "it answered 400"
        if path == OUTCOMES_PATH and self.refused & {each["request_idx"] for each in body["requests"]}:
            return "refused"
        return self.answers.get(path, "ok")

    def bodies(self, path: str) -> list[Any]:
        return [body for _, called, body in self.calls if called == path]

    def told(self) -> list[tuple[int, str]]:
        """Outcomes that were sent, in order."""
        return [
            (each["request_idx"], each["status"]) for body in self.bodies(OUTCOMES_PATH) for each in body["requests"]
        ]


class Office:
    """A worker and its reporter."""

    def __init__(self, path: Path, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.log: EventLog = open_log(path, sync="normal")
        self.service = Service(self.log, SimulatedClock(loop), Limits(), Readiness())
        self.autoscaler = Autoscaler(loop)
        self.numbers = 0
        self.restart()

    def restart(self, *, report_held: bool = False) -> None:
        me = Identity(1, "token", "http://here", PERF)
        self.reporter = Reporter(me, self.service, self.log, self.autoscaler, lambda *_: None, report_held=report_held)
        self.service.observers = [self.reporter.observe]
        self.service.readiness.listeners = [self.reporter.changed]

    def serve(self) -> int:
        """A request that is held and released. Its number."""
        self.numbers += 1
        held = self.service.claim(Claim(duration=60.0, request_idx=self.numbers))
        self.service.release(held.id)
        return self.numbers

    def settled(self) -> list[int]:
        return [seq for (seq,) in self.log.conn.execute("SELECT seq FROM settled WHERE name = 'delete_requests'")]

    def live(self, story: Callable[[], Awaitable[None]]) -> None:
        """Report while the story is told."""

        async def both() -> None:
            running = asyncio.ensure_future(self.reporter.run())
            await story()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        self.loop.run_until_complete(both())


@pytest.fixture(name="office")
def opened_office(path: Path) -> Iterator[Office]:
    """For tests that import it under its own name."""
    loop = SimulatedLoop()
    office = Office(path, loop)
    with contextlib.closing(loop), contextlib.closing(office.log):
        yield office
