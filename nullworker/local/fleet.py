"""Starts and stops real worker processes on this machine on demand, as Vast does with instances.

Load is what the workers report to the fake autoscaler. A worker that dies is started again with its number, ports and
log; one that does not get ready, is errored or stops reporting is replaced. There are never more processes than
max_workers, including those that are stopping, and none is left when the block ends or this process dies.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Final

from nullworker.local.fleet_worker import Change, FleetWorker, Plan, State
from nullworker.local.scaling import wanted
from nullworker.processes import OrphanGuard, how_it_ended
from nullworker.testing import FakeAutoscaler
from nullworker.testing.routing import FRESH_SECONDS

#: Seconds between two checks of the processes and their reports.
LOOK_SECONDS: Final = 0.1
#: Seconds until the next start after a worker that failed before it was ready; doubled after each, up to the second.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0


class Fleet:
    """`async with Fleet(vast, plan, now):` keeps as many workers as the endpoint's parameters ask for.

    Args:
        now: the time in epoch seconds; the fake autoscaler must use the same clock.
        tell: called with every change of a worker's state.

    Attributes:
        members: the workers by number, including cold ones.
    """

    def __init__(
        self,
        vast: FakeAutoscaler,
        plan: Plan,
        now: Callable[[], float],
        tell: Callable[[Change], None] = lambda change: None,
    ) -> None:
        self.members: dict[int, FleetWorker] = {}
        self._vast, self._plan, self._now, self._tell = vast, plan, now, tell
        self._numbers = self._failures = 0
        self._not_before = 0.0
        self._empty = asyncio.Event()
        self._guard: OrphanGuard
        self._keeper: asyncio.Future[None]

    async def __aenter__(self) -> Fleet:
        self._guard = OrphanGuard(signal.SIGTERM)  # each ends in order
        self._keeper = asyncio.ensure_future(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop every worker; a held reservation may finish within the drain time."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        try:
            for member in self.members.values():
                if member.worker is not None:
                    self._stop(member, "the fleet is stopped", replaced=True)
                elif member.state == "dead":
                    self._change(member, "cold")
            while any(member.runs for member in self.members.values()):
                self._reap()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._guard.close()

    @property
    def processes(self) -> list[FleetWorker]:
        """The running workers, including those that are stopping."""
        return [member for member in self.members.values() if member.worker is not None]

    async def run(self) -> None:
        """Wait forever; raises the error of the task that keeps the workers."""
        await asyncio.shield(self._keeper)

    async def until_empty(self) -> None:
        """Wait until no worker runs."""
        self._empty.clear()
        await self._empty.wait()

    def hurry(self) -> None:
        """Stop now: workers that are stopping cancel what they hold."""
        for member in self.members.values():
            member.hurry(self._now())

    # -- inside --------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            self._reap()
            self._read_reports()
            self._replace()
            self._scale()
            if not any(member.runs for member in self.members.values()):
                self._empty.set()
            await asyncio.sleep(LOOK_SECONDS)

    def _reap(self) -> None:
        """Handle processes that have ended."""
        for member in list(self.members.values()):
            failed = member.consumer_failed
            code = member.reap(self._now())
            if member.consumer_failed != failed:  # reported once, not at each restart
                why = f"{member.consumer_failed}: see {member.file('consumer')}"
                self._tell(Change(self._now(), member.number, member.state, why))
            if code is None:
                if member.state == "gone" and not member.runs:
                    del self.members[member.number]
                continue
            self._vast.fleet.retired.add(member.number)
            stopping = member.state == "stopping"
            if code == 0 or (stopping and (member.was_ready or code == -signal.SIGTERM)):
                # as with a supervisor, which does not restart after exit code 0
                self._change(member, "gone" if member.replaced else "cold")
            elif member.was_ready:
                self._change(member, "dead", f"{how_it_ended(code)}; it is started again")
            else:
                if not stopping:
                    self._failed()
                self._change(member, "gone", f"{how_it_ended(code)} before it was ready: see {member.file('worker')}")

    def _read_reports(self) -> None:
        now = self._now()
        for member in self.processes:
            reported = self._vast.fleet.workers.get(member.number)
            if member.state == "stopping" or reported is None:
                continue
            working = [idx for idx in reported.status["working_request_idxs"] if idx not in reported.ended]
            member.held_by, member.queued = next(iter(working), None), max(len(working) - 1, 0)
            if now >= reported.reported_at + FRESH_SECONDS:
                self._change(member, "errored", f"silent for {FRESH_SECONDS:g} s")
            elif error := reported.status["error_msg"]:
                self._change(member, "errored", error)
            elif reported.ready:
                if not member.was_ready:
                    member.was_ready, self._failures = True, 0
                if member.state != "ready" or reported.load(now):
                    member.idle_since = now
                self._change(member, "held" if working else "ready")

    def _replace(self) -> None:
        """Stop workers that are errored or not ready in time; an errored one may finish what it holds.

        A worker that is errored before it was ready may be failing its start; it then ends by itself and logs why.
        """
        for member in self.processes:
            if member.state == "stopping":
                continue
            errored = member.state == "errored" and member.was_ready
            if errored and (member.held_by is None or self._is_silent(member)):
                self._failed()
                self._stop(member, "errored, and replaced", replaced=True)
            elif not member.was_ready and self._now() >= member.started_at + self._plan.loading:
                why = f"not ready after {self._plan.loading:g} s, and replaced: see {member.file('worker')}"
                self._failed()
                self._stop(member, why, replaced=True)

    def _scale(self) -> None:
        now, parameters = self._now(), self._vast.parameters
        for member in [other for other in self.members.values() if other.state == "dead"]:
            if len(self.processes) < parameters.max_workers:
                self._start(member)
        alive = [member for member in self.processes if member.state not in ("stopping", "errored")]
        working = sum(self._load(member) for member in self.processes)
        target = wanted(
            parameters,
            load=self._vast.waiting_load + working,
            perf=self._plan.perf,
            running=len(alive),
            working=working,
            stalls=self._vast.fleet.engine == "may-2026",
        )
        room = parameters.max_workers - len(self.processes)
        if now >= self._not_before:
            for _ in range(min(target - len(alive), room)):
                self._start(self._next())
        patience = max(parameters.inactivity_timeout, 0.0)
        idle = [other for other in alive if other.state == "ready" and now >= other.idle_since + patience]
        for member in sorted(idle, key=lambda other: other.idle_since)[: max(len(alive) - target, 0)]:
            cold = sum(other.state in ("cold", "stopping") and not other.replaced for other in self.members.values())
            why = f"idle for {now - member.idle_since:.0f} s"
            self._stop(member, why, replaced=cold >= parameters.cold_workers)

    def _next(self) -> FleetWorker:
        """A cold worker, which keeps its number and log, or a new one."""
        for member in self.members.values():
            if member.state == "cold":
                return member
        self._numbers += 1
        return FleetWorker(self._numbers, self._plan, self._guard)

    def _start(self, member: FleetWorker) -> None:
        self.members[member.number] = member
        self._vast.fleet.workers.pop(member.number, None)
        self._vast.fleet.retired.discard(member.number)
        self._vast.fleet.stopped.discard(member.number)
        taken = {port for other in self.processes for port in (other.port, other.port + 1, other.control_port)}
        member.start(self._vast.url, self._vast.mtoken or "", taken)
        member.started_at = self._now()
        self._change(member, "starting")

    def _stop(self, member: FleetWorker, why: str, *, replaced: bool) -> None:
        if member.state == "stopping":
            return
        member.replaced = replaced
        self._vast.fleet.retired.add(member.number)
        member.stop(self._now())
        self._change(member, "stopping", why)

    def _failed(self) -> None:
        """A worker failed: delay the next start, so that a broken template does not start one after the other."""
        pause = min(FIRST_PAUSE_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures = min(self._failures + 1, 10)
        self._not_before = self._now() + pause

    def _load(self, member: FleetWorker) -> float:
        reported = self._vast.fleet.workers.get(member.number)
        return 0.0 if reported is None else reported.load(self._now())

    def _is_silent(self, member: FleetWorker) -> bool:
        reported = self._vast.fleet.workers.get(member.number)
        return reported is None or self._now() >= reported.reported_at + FRESH_SECONDS

    def _change(self, member: FleetWorker, state: State, why: str = "") -> None:
        if member.state != state:
            member.state, member.since = state, self._now()
            if state == "cold":
                self._vast.fleet.stopped.add(member.number)
            elif state == "gone":
                self._vast.fleet.workers.pop(member.number, None)
            self._tell(Change(member.since, member.number, state, why))
