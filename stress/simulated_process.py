"""One process of the simulated worker, and what it must do whatever befalls it."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from typing import Final

from nullworker.autoscaler.messages import Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.clock import DRIFT_SECONDS, SystemClock
from nullworker.deadline_timer import DeadlineTimer
from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Limits
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.session_callbacks import Callbacks
from nullworker.worker import PROBE_SECONDS
from stress import audit
from stress.simulated_network import Autoscaler, Owners
from stress.simulated_users import Users
from stress.simulated_world import Disk, Machine, SimulatedLoop

PERF: Final = 100.0
LIMITS: Final = Limits(max_reservation_seconds=120.0, max_queue_seconds=20.0, max_queued=8)
#: Seconds after which a call that was under way in a bad time, and the pause after it, are over.
SETTLED_SECONDS: Final = 25.0
#: Seconds within which an outcome must arrive in a fair time: a second for company, one for a silent address.
OUTCOME_SECONDS: Final = 5.0
#: Seconds within which a status must: every 10 s.
STATUS_SECONDS: Final = 13.0
#: Seconds within which an owner is called who has not been called before; and, after a start, for each so many calls
#: that were owed before, which may all be to owners who hang.
CALLBACK_SECONDS: Final = 3.0
CALL_SECONDS: Final = 10.0
CALLS_AT_ONCE: Final = 90


class Incarnation:
    """One process of the worker, from its start to its death."""

    def __init__(self, life: Life) -> None:
        self.up_since = life.loop.time()
        self.log = life.disk.open()
        clock = SystemClock(self.log.anchor(), not_before=self.log.latest())
        with contextlib.suppress(LogUnavailable):
            self.log.store_anchor(clock.anchor)
        readiness = Readiness()
        self.service = Service(self.log, clock, LIMITS, readiness, life.new_id)
        me = Identity(1, "token", "http://here", PERF)
        self.reporter = Reporter(me, self.service, self.log, life.autoscaler, lambda *_: None)
        self.callbacks = Callbacks(self.service, self.log, life.owners, lambda _: None)
        self.timer = DeadlineTimer(self.service)
        self.service.observers += [self.reporter.observe, self.callbacks.observe, life.hear]
        readiness.listeners += [self.reporter.changed, lambda: life.state_is_told(readiness)]
        life.found(self.service)
        self.service.resume()
        self.timer.set()
        self.service.listening()
        life.restarted(self.service)
        self.tasks = [asyncio.ensure_future(work) for work in (self.reporter.run(), self.callbacks.run(), self.probe())]
        self.connections: dict[asyncio.Task[None], None] = {}

    async def probe(self) -> None:
        """As worker.py does it."""
        while True:
            self.service.probe()
            await asyncio.sleep(PROBE_SECONDS)

    def connect(self, client: asyncio.Task[None]) -> None:
        """Somebody is there until he goes, or the process."""
        self.connections[client] = None
        client.add_done_callback(self.connections.pop)

    async def end(self) -> None:
        """All that ran in the process is gone."""
        self.timer.stop()
        tasks = [*self.tasks, *self.connections]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


class Life(Users):
    """The worker's processes, one after the other, on one machine.

    Attributes:
        up: the process; None while there is none.
        attached: the reservation to which a consumer was attached when the worker went.
        before: what was held when the worker went, and until when.
        patience: seconds within which the owner of a session is called.
        excused: reservations whose last events went with the memory or the power.
    """

    def __init__(self, random: Random, machine: Machine, disk: Disk, loop: SimulatedLoop) -> None:
        super().__init__(random, loop, Autoscaler(random, perf=PERF), Owners(random))
        self.machine = machine
        self.disk = disk
        self.owners.on_call = self.owner_is_called
        self.autoscaler.is_noted = lambda: self.disk.whole_since is not None
        self.up: Incarnation | None = None
        self.over = False
        self.patience = CALLBACK_SECONDS
        self.before: tuple[str, float | None] | None = None
        self.excused: set[str] = set()
        self._numbers = 0

    @property
    def process(self) -> Incarnation | None:
        return self.up

    def start(self) -> None:
        """Another process."""
        self.uncalled.clear()
        self.up = Incarnation(self)
        ((owed,),) = self.disk.ask("SELECT count(*) FROM callbacks")
        self.patience = CALLBACK_SECONDS + CALL_SECONDS * (owed // CALLS_AT_ONCE)

    def excuse(self, reservation_ids: set[str]) -> None:
        """Nothing can be said of these any more."""
        self.excused |= reservation_ids
        untold = self.autoscaler.untold
        self.autoscaler.untold = {idx: owed for idx, owed in untold.items() if owed[0] not in reservation_ids}

    def new_id(self) -> str:
        self._numbers += 1
        return f"r{self._numbers}"

    def rows(self) -> list[audit.Row]:
        """What is in the log."""
        return self.disk.ask("SELECT at, reservation_id, kind, reason, data FROM events ORDER BY seq")

    # -- what must be so -----------------------------------------------------------------------------------------

    def found(self, service: Service) -> None:
        """A start has read the log: what was held when the worker went is held, with the deadline that it had."""
        held, before, self.before = service.book.held, self.before, None
        if before is not None:
            found = None if held is None else (held.id, held.ends_at)
            assert found == before, "what was refused stays refused, what was granted is there"

    def restarted(self, service: Service) -> None:
        """A start has found a session: its deadline is no further away than it was, and its consumer may be dead."""
        held = service.book.held
        if held is None:
            self.attached = None
            return
        ((at, ends_at),) = self.disk.ask(
            "SELECT at, data ->> 'ends_at' FROM events WHERE kind IN ('held', 'extended') ORDER BY seq DESC LIMIT 1"
        )
        assert held.ends_at is not None
        assert held.ends_at - service.now() <= ends_at - at + 0.002, "no deadline is further away than when it was set"
        self.figures["sessions_resumed"] += 1
        if held.id == self.attached:
            if self.random.random() < 0.5:
                self.loop.call_later(self.random.uniform(0.0, 29.0), self.consumer_is_back, service, held)
            else:
                self.loop.call_later(31.0, self.dead_consumer_is_noticed, service, held)

    def nothing_is_late(self, up: Incarnation) -> None:
        """What is due has happened, who waits for a free slot has it, and what can be told was told."""
        service, now = up.service, self.loop.time()
        deadline = service.next_deadline()
        assert deadline is None or service.now() < deadline + 0.01, "the timer has rung for what is over"
        book = service.book
        assert book.held is not None or not book.queue or service.log_is_down, "nobody waits for a free slot"
        if not self.fair(up):
            return
        assert self.autoscaler.status_at > now - STATUS_SECONDS, "a status comes every 10 s"
        for request_idx, (name, at) in self.autoscaler.untold.items():
            assert at > now - OUTCOME_SECONDS, f"the end of {name} is told, request_idx {request_idx}"
            break

    def fair(self, up: Incarnation) -> bool:
        """Whether nothing has been in the way of what is told, for long enough."""
        since = self.autoscaler.fair_since(), self.autoscaler.refused_at, self.disk.whole_since, up.up_since
        return all(each is not None and each < self.loop.time() - SETTLED_SECONDS for each in since)

    def all_is_told(self, stopped: Incarnation, began: float) -> None:
        """A worker that has stopped in a fair time has told all ends, and its last status."""
        if self.fair(stopped):
            assert not stopped.reporter.backlog, "the last outcomes are told"
            assert self.autoscaler.status_at >= began, "the last status is told"
            self.figures["stops_told"] += 1

    def clock_is_right(self, service: Service) -> None:
        """Nothing was live: the worker has followed the wall clock."""
        ahead = service.now() - self.machine.time()
        noted = self.disk.whole_since is not None
        assert abs(ahead) <= DRIFT_SECONDS + 0.001 or not noted, f"the worker is {ahead:.1f} s ahead of the wall clock"

    def state_is_told(self, readiness: Readiness) -> None:
        """A listener."""
        if readiness.log is not None and self.disk.only_locked:
            self.problems.append("a lock of a moment makes the worker `errored`")

    def owner_is_called(self, session_id: str) -> None:
        """Not late, whoever else does not answer."""
        ended = self.uncalled.pop(session_id, None)
        whole = self.disk.whole_since
        if ended is not None and whole is not None and whole < ended:
            late = self.loop.time() - ended
            assert late < self.patience, f"the owner of {session_id} is called after {late:.0f} s"
