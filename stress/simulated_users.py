"""Those who use the simulated worker: clients with requests, owners of sessions, and the consumer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from random import Random
from typing import Protocol

from nullworker.autoscaler.messages import outcome_of
from nullworker.errors import Conflict, IllegalMove, LogUnavailable
from nullworker.fsm.book import Claim, Reservation
from nullworker.fsm.events import SessionTerms
from nullworker.fsm.table import ENDED
from nullworker.service import Commit, Service
from stress.simulated_network import Autoscaler, Owners
from stress.simulated_world import SimulatedLoop


class Process(Protocol):
    """One process of the worker."""

    service: Service


class Users:
    """Everybody outside; `problems` are sentences, since what an observer raises goes no further."""

    def __init__(self, random: Random, loop: SimulatedLoop, autoscaler: Autoscaler, owners: Owners) -> None:
        self.random = random
        self.loop = loop
        self.autoscaler = autoscaler
        self.owners = owners
        self.sessions = 0.0  # their share among the claims
        self.hanging = 0.0  # the share of owners who accept a callback and never answer
        self.figures: Counter[str] = Counter()
        self.answers: dict[str, tuple[str, str | None]] = {}
        self.problems: list[str] = []
        self.uncalled: dict[str, float] = {}  # sessions that this process has ended, since when their owners wait
        self.attached: str | None = None
        self.previous = "nobody"

    @property
    def process(self) -> Process | None:
        """The worker's process, None while there is none."""
        raise NotImplementedError

    def clock_is_right(self, service: Service) -> None:
        """Called after a claim before which nothing was live."""
        raise NotImplementedError

    async def client(self, at: Process, number: int) -> None:
        """Somebody with a request or a session, patient or not."""
        random, service = self.random, at.service
        poisoned = random.random() < 0.002
        if poisoned:
            self.autoscaler.poison.add(number)
        session = random.random() < self.sessions
        duration = random.choice((None, 0.0, random.uniform(0.5, 30.0)))
        terms = None
        if session:
            duration = random.uniform(1.0, 40.0)
            route = Owners.HANGS if random.random() < self.hanging else Owners.HONEST
            terms = SessionTerms(duration, route if random.random() < 0.7 else None)
        idle = not (service.log_is_down or service.unwritten or any(True for _ in service.book.live()))
        try:
            reservation = service.claim(
                Claim("session" if session else "request", duration, request_idx=number, session=terms)
            )
        except LogUnavailable:
            self.figures["refused_without_a_trace"] += 1
            return
        if idle and not service.log_is_down:
            self.clock_is_right(service)
        if session:
            if reservation.state in ENDED:
                self.answered(reservation)
            else:
                await self.owner(service, reservation)
            return
        patience = random.uniform(0.0, 25.0) if random.random() < 0.2 else None
        ended = asyncio.ensure_future(service.ended(reservation))
        try:
            done, _ = await asyncio.wait({ended}, timeout=patience)
            if done:
                self.answered(reservation)
            else:
                service.cancel(reservation.id, "client_disconnect")
                self.figures["hang_ups"] += 1
        finally:
            ended.cancel()

    async def owner(self, service: Service, session: Reservation) -> None:
        """Pings its session a few times, then ends it or forgets it."""
        for _ in range(self.random.choice((0, 0, 1, 3))):
            await asyncio.sleep(self.random.uniform(0.1, 5.0))
            if session.state in ENDED:
                return
            with contextlib.suppress(LogUnavailable):
                service.renew(session.id)
        if self.random.random() < 0.6 and session.state not in ENDED:
            service.release(session.id, reason="session_end")

    def answered(self, reservation: Reservation) -> None:
        assert reservation.id not in self.answers, "one answer for each"
        self.answers[reservation.id] = (reservation.state, reservation.reason)

    def hear(self, commit: Commit) -> None:
        """An observer: notes what is owed; and the consumer, which pulls a job when it holds the worker."""
        reservation = commit.reservation
        if reservation.state in ENDED:
            if reservation.terms.request_idx is not None and outcome_of(reservation) is not None:
                self.autoscaler.untold[reservation.terms.request_idx] = reservation.id, self.loop.time()
            session = reservation.terms.session
            if session is not None and session.on_close_route == Owners.HONEST and reservation.held_at is not None:
                self.uncalled[reservation.id] = self.loop.time()
        if commit.event.kind != "held" or self.process is None:
            return
        if self.process.service.log_is_down:  # what an observer raises goes no further
            self.problems.append(f"{commit.reservation.id} is held before that is in the log")
        random, held = self.random, commit.reservation
        fate = random.random()
        if fate < 0.75:
            work = random.uniform(0.0, 6.0)
            self.loop.call_later(work, self.consumer_done, self.process, held.id if fate < 0.6 else self.previous)
        if fate < 0.1:
            self.loop.call_later(random.uniform(0.0, 3.0), self.consumer_needs_more, self.process, held.id)
        if 0.2 < fate < 0.4:
            self.loop.call_later(random.uniform(0.0, 2.0), self.consumer_attaches, self.process.service, held.id)
            if fate < 0.25:
                self.loop.call_later(random.uniform(2.0, 9.0), self.consumer_detaches, self.process.service, held.id)
        self.previous = held.id

    def consumer_done(self, at: Process, reservation_id: str) -> None:
        if at is not self.process:
            return
        held = at.service.book.held
        before = at.service.seq
        try:
            at.service.release(reservation_id, result={"ok": True})
        except IllegalMove:
            assert at.service.seq == before
            assert at.service.book.held is held, "a late consumer ends nothing of somebody else's"
            self.figures["late_releases"] += 1

    def consumer_needs_more(self, at: Process, reservation_id: str) -> None:
        if at is self.process:
            with contextlib.suppress(IllegalMove, LogUnavailable):
                at.service.extend(reservation_id, self.random.uniform(1.0, 200.0))

    def consumer_attaches(self, service: Service, reservation_id: str) -> None:
        if self.process is None or service is not self.process.service:
            return
        with contextlib.suppress(IllegalMove, Conflict, LogUnavailable):
            service.attach(reservation_id, self.random.choice(("", "1", "all")))
            self.attached = reservation_id
            self.figures["attached"] += 1
            goes = self.random.choice((self.consumer_released, self.consumer_detaches))
            self.loop.call_later(self.random.uniform(1.0, 90.0), goes, service, reservation_id)

    def consumer_is_back(self, service: Service, held: Reservation) -> None:
        """The consumer of before a restart attaches again, in time."""
        if self.process is not None and service is self.process.service:
            lost = held.reason in ("consumer_lost", "duration_elapsed")
            assert not lost, f"{held.id} has ended as {held.reason} before its consumer could attach again"
            self.consumer_attaches(service, held.id)

    def consumer_detaches(self, service: Service, reservation_id: str) -> None:
        if self.process is not None and service is self.process.service and self.attached == reservation_id:
            service.detach(reservation_id)
            self.attached = None

    def consumer_released(self, service: Service, reservation_id: str) -> None:
        if self.process is not None and service is self.process.service:
            self.consumer_done(self.process, reservation_id)

    def dead_consumer_is_noticed(self, service: Service, held: Reservation) -> None:
        if self.process is None or service is not self.process.service or service.log_is_down:
            return
        assert held.state in ENDED, "a consumer that is dead over a restart is noticed"
        self.figures["dead_consumers"] += held.reason == "consumer_lost"
