"""Those who use the simulated worker: clients with requests, owners of sessions, and the consumer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from random import Random
from typing import Protocol

from nullworker.errors import Conflict, IllegalMove, LogUnavailable
from nullworker.fsm.book import Claim, Reservation
from nullworker.fsm.events import SessionTerms
from nullworker.fsm.table import ENDED
from nullworker.service import Commit, Service
from stress.simulated_world import Autoscaler, SimulatedLoop


class Process(Protocol):
    """One process of the worker."""

    service: Service


class Users:
    """Everybody outside; `problems` are sentences, since what an observer raises goes no further."""

    random: Random
    loop: SimulatedLoop
    autoscaler: Autoscaler
    figures: Counter[str]
    answers: dict[str, tuple[str, str | None]]
    problems: list[str]
    attached: str | None
    previous: str

    @property
    def process(self) -> Process | None:
        """The worker's process, None while there is none."""
        raise NotImplementedError

    async def client(self, at: Process, number: int) -> None:
        """Somebody with a request or a session, patient or not."""
        random, service = self.random, at.service
        poisoned = random.random() < 0.002
        if poisoned:
            self.autoscaler.poison.add(number)
        session = random.random() < 0.2
        duration = random.choice((None, 0.0, random.uniform(0.5, 30.0)))
        terms = None
        if session:
            duration = random.uniform(1.0, 40.0)
            terms = SessionTerms(duration, "http://owner/" if random.random() < 0.7 else None)
        try:
            reservation = service.claim(
                Claim("session" if session else "request", duration, request_idx=number, session=terms)
            )
        except LogUnavailable:
            self.figures["refused_without_a_trace"] += 1
            return
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
        """An observer: the consumer, which pulls a job when it holds the worker."""
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

    def consumer_detaches(self, service: Service, reservation_id: str) -> None:
        if self.process is not None and service is self.process.service:
            service.detach(reservation_id)
            self.attached = None

    def dead_consumer_is_noticed(self, service: Service, held: Reservation) -> None:
        if self.process is None or service is not self.process.service or service.log_is_down:
            return
        assert held.state in ENDED, "a consumer that is dead over a restart is noticed"
        self.figures["dead_consumers"] += held.reason == "consumer_lost"
