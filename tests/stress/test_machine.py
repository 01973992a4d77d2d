"""The service as a Hypothesis state machine, with a fake clock, a failing disk and restarts.

The invariants are the project's promises. The model beside the service does not use the book.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from nullworker.errors import IllegalMove, LogUnavailable
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Book, Claim, Limits
from nullworker.fsm.events import Event, Extended, Held, Queued, SessionTerms
from nullworker.fsm.table import EDGES, ENDED
from nullworker.readiness import Readiness
from nullworker.service import MAX_UNWRITTEN, RETRY_SECONDS, Commit, Service
from nullworker.testing.fakes import FakeClock, MemoryJournal

CAP, MAX_QUEUED = 60.0, 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of failures happen here on purpose."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Reservations(RuleBasedStateMachine):
    """Any order of commands, failures and restarts."""

    @initialize(max_queue=st.sampled_from([0.0, 5.0, 30.0]))
    def begin(self, max_queue: float) -> None:
        self.clock = FakeClock()
        self.limits = Limits(CAP, max_queue, MAX_QUEUED)
        self.journal = self.make_journal()
        self.known: list[str] = []
        self.ended: dict[str, tuple[str, str | None]] = {}
        self.seen: list[tuple[int, Event]] = []  # by the observer, since the first start
        self.lost_before = 0
        self.numbers = 0
        self.start()

    def make_journal(self) -> Any:
        return MemoryJournal()

    def reopen(self) -> None:
        """The process has died; the journal is as it was."""

    def fail(self, cause: str | None) -> None:
        self.journal.failing = cause

    def rows(self) -> list[tuple[int, Event]]:
        return list(self.journal.rows)

    def new_id(self) -> str:
        self.numbers += 1
        return f"r{self.numbers}"

    def start(self) -> None:
        self.service = Service(self.journal, self.clock, self.limits, Readiness(), self.new_id)
        self.service.observers.append(self.hear)
        self.service.observers.append(self.break_down)
        self.service.resume()

    def hear(self, commit: Commit) -> None:
        reservation, event = commit.reservation, commit.event
        assert reservation.id not in self.ended, "an end is final"
        self.seen.append((commit.seq, event))
        if event.kind in ENDED:
            self.ended[reservation.id] = (event.kind, event.reason)

    def break_down(self, commit: Commit) -> None:
        if commit.seq % 7 == 0:
            raise RuntimeError("an observer with a bug must not hurt the core")

    # -- commands ------------------------------------------------------------------------------------------------

    @rule(duration=st.sampled_from([None, 0.0, 1.0, 10.0, CAP, 10 * CAP]))
    def reserve(self, duration: float | None) -> None:
        busy, before = self.service.book.held is not None, self.service.readiness.refusal
        reservation = self.service.claim(Claim(duration=duration, request_idx=self.numbers))
        self.known.append(reservation.id)
        asked = CAP if duration is None else min(duration, CAP)
        assert reservation.terms.duration_cap == asked
        refusal = self.service.readiness.refusal
        if reservation.state == "cancelled":  # the very record of a refusal may be what finds the log working again
            assert reservation.reason in ("log_unavailable", before, refusal)
        elif refusal is not None:
            raise AssertionError(f"taken in spite of {refusal}")
        elif not busy:
            assert reservation.state == ("expired" if asked == 0 else "held")
        elif self.limits.max_queue_seconds == 0:
            assert reservation.reason == "queue_timeout"

    @rule(lifetime=st.sampled_from([1.0, 20.0, 10 * CAP]), callback=st.booleans())
    def create_session(self, lifetime: float, callback: bool) -> None:
        busy, refusal = self.service.book.held is not None, self.service.readiness.refusal
        terms = SessionTerms(lifetime, "http://owner/" if callback else None)
        session = self.service.claim(Claim("session", lifetime, session=terms))
        self.known.append(session.id)
        if refusal is None and session.reason != "log_unavailable":
            assert (session.state, session.reason) == (("expired", "busy") if busy else ("held", None))

    @rule(result=st.sampled_from([None, {"ok": True}]))
    def release(self, result: Any) -> None:
        held = self.service.book.held
        if held is None:
            with pytest.raises(IllegalMove):
                self.service.release("nobody")
            return
        next_up = next(iter(self.service.book.queue), None)
        batches = len(self.seen)
        released = self.service.release(held.id, result=result)
        assert (released.state, released.reason, released.result) == ("released", "explicit", result)
        if next_up is not None and not self.service.log_is_down:
            assert [(e.kind, e.reservation_id) for _, e in self.seen[batches : batches + 2]] == [
                ("released", held.id),
                ("held", next_up),
            ], "the slot goes to the oldest who waits, at once"

    @rule(data=st.data())
    def release_something_old(self, data: st.DataObject) -> None:
        if not self.known:
            return
        reservation_id = data.draw(st.sampled_from(self.known))
        held = self.service.book.held
        if held is not None and held.id == reservation_id:
            return
        before = self.picture()
        with pytest.raises(IllegalMove):
            self.service.release(reservation_id)
        with pytest.raises(IllegalMove):
            self.service.extend(reservation_id, 5.0)
        assert self.picture() == before, "a command that is refused has changed nothing"

    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        requests = [r.id for r in self.service.book.live() if r.terms.kind == "request"]
        if requests:
            self.service.cancel(data.draw(st.sampled_from(requests)), "client_disconnect")

    @rule(data=st.data())
    def hang_up_too_late(self, data: st.DataObject) -> None:
        if self.ended:
            before = self.picture()
            self.service.cancel(data.draw(st.sampled_from(sorted(self.ended))), "client_disconnect")
            assert self.picture() == before

    @rule(seconds=st.sampled_from([0.0, 3.0, 100 * CAP]))
    def extend(self, seconds: float) -> None:
        held = self.service.book.held
        if held is None:
            return
        before = self.picture()
        try:
            extended = self.service.extend(held.id, seconds)
        except LogUnavailable:
            assert self.picture() == before
        else:
            assert extended.ends_at == self.service.now() + min(seconds, CAP)

    @rule()
    def ping(self) -> None:
        held = self.service.book.held
        if held is None:
            return
        before, deadline = self.picture(), held.ends_at
        assert deadline is not None
        try:
            self.service.renew(held.id)
        except (LogUnavailable, IllegalMove):
            assert self.picture() == before
            assert held.terms.session is None or self.service.log_is_down
        else:
            assert held.terms.session is not None
            lifetime = min(held.terms.session.lifetime, CAP)
            now = self.service.now()
            moved = now + lifetime - deadline
            assert held.ends_at == (deadline if moved < min(1.0, lifetime / 10) else now + lifetime)

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 5.0, 20.0, 2 * CAP]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.service.tick()
        now = self.clock.now()
        for reservation in self.service.book.live():
            deadline = reservation.ends_at if reservation.state == "held" else reservation.terms.give_up_at
            assert deadline is not None
            assert deadline > now, "nobody lives past its deadline"
        due = self.service.book.next_deadline()
        assert due is None or due > now

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def set_the_wall_clock(self, seconds: float) -> None:
        self.clock.step_wall(seconds)

    @rule()
    def consumer_fails(self) -> None:
        self.service.consumer_unhealthy("it does not answer", cancel_held=False)
        assert not self.service.book.queue

    @rule()
    def consumer_fails_and_the_operator_wants_it_ended(self) -> None:
        self.service.consumer_unhealthy("it does not answer", cancel_held=True)
        assert not list(self.service.book.live())

    @rule()
    def consumer_recovers(self) -> None:
        self.service.readiness.consumer_is_healthy()

    @rule()
    def disk_fails(self) -> None:
        self.fail("the disk is full")

    @rule()
    def disk_works(self) -> None:
        self.fail(None)

    @rule()
    def disk_works_and_is_tried(self) -> None:
        self.fail(None)
        self.clock.advance(RETRY_SECONDS + 0.01)
        self.service.tick()
        assert not self.service.unwritten
        assert self.service.readiness.log is None

    @rule()
    def probe(self) -> None:
        self.service.probe()

    @rule()
    def drain_and_start_again(self) -> None:
        self.service.drain("told to")
        held = self.service.book.held
        assert not self.service.book.queue
        self.service.end_drain()
        assert held is None or held.terms.kind == "session" or held.reason == "draining"
        self.restart()

    @rule()
    def killed(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What waited in memory for the log is gone; the world saw it, the log never will."""
        lost = len(self.service.unwritten)
        sessions = None if lost else [r for r in self.service.book.live() if r.terms.kind == "session"]
        if lost:
            self.seen = self.seen[:-lost]
            self.ended = {e.reservation_id: (e.kind, e.reason) for _, e in self.seen if e.kind in ENDED}
        self.fail(None)
        self.reopen()
        before = len(self.seen)
        self.start()
        for reservation in self.service.book.live():
            assert reservation.terms.kind == "session", "a request has lost its connection"
        for _, event in self.seen[before:]:
            assert (event.kind, event.reason) in {
                ("cancelled", "worker_restart"),
                ("expired", "duration_elapsed"),
            }
        for session in sessions or []:
            assert session.ends_at is not None
            alive = self.service.book.get(session.id)
            assert (alive is not None) == (session.ends_at > self.clock.now()), "a session goes on with its deadline"
            assert alive is None or alive == session

    # -- promises ------------------------------------------------------------------------------------------------

    def waiting(self) -> list[tuple[int, Event]]:
        return [(commit.seq, commit.event) for commit in self.service.unwritten]

    def picture(self) -> tuple[Any, ...]:
        return deepcopy(
            (self.service.book.held, list(self.service.book.queue.values()), self.service.seq, len(self.seen))
        )

    @invariant()
    def observers_have_heard_the_log_and_nothing_else(self) -> None:
        assert self.seen == self.rows() + self.waiting()
        assert [seq for seq, _ in self.seen] == list(range(1, len(self.seen) + 1))

    @invariant()
    def the_state_is_what_replay_gives(self) -> None:
        book = Book(self.limits)
        for _, event in self.rows() + self.waiting():
            book.apply(event)
        assert book.held == self.service.book.held
        assert book.queue == self.service.book.queue
        assert list(book.queue) == list(self.service.book.queue)

    @invariant()
    def one_is_held_at_a_time_and_who_came_first_is_served_first(self) -> None:
        held: str | None = None
        waiting: list[str] = []
        for _, event in self.seen:
            name = event.reservation_id
            if event.kind == "queued":
                waiting.append(name)
            elif event.kind == "held":
                assert held is None, "two are held"
                assert waiting[0] == name, "somebody was passed over"
                held = waiting.pop(0)
            elif event.kind in ENDED:
                if held == name:
                    held = None
                else:
                    waiting.remove(name)
        free = held is None and not self.service.log_is_down  # nobody is held without a commit
        assert not free or not waiting, "the slot is free and somebody waits"
        assert len(waiting) <= MAX_QUEUED

    @invariant()
    def deadlines_are_what_was_asked_for(self) -> None:
        caps = {e.reservation_id: e.data.duration_cap for _, e in self.seen if isinstance(e.data, Queued)}
        for _, event in self.seen:
            if isinstance(event.data, Held):
                assert event.data.ends_at == event.at + caps[event.reservation_id]
            elif isinstance(event.data, Extended):
                assert event.data.ends_at <= event.at + CAP
            elif isinstance(event.data, Queued):
                waits = self.limits.max_queue_seconds
                assert event.data.give_up_at in (event.at, event.at + waits), "at once, or after its wait"

    @invariant()
    def everything_ends_in_a_way_of_the_table(self) -> None:
        ends = {(edge.event, edge.reason) for edge in EDGES if edge.target in ENDED}
        assert set(self.ended.values()) <= ends

    @invariant()
    def little_waits_in_memory(self) -> None:
        assert len(self.service.unwritten) <= MAX_UNWRITTEN + MAX_QUEUED + 4
        if self.service.unwritten:
            assert self.service.refusal in ("log_unavailable", "draining")
            assert self.service.next_deadline() is not None, "somebody will try the log again"


class ReservationsOnDisk(Reservations):
    """The same on the real log, reopened as after a kill -9."""

    def make_journal(self) -> EventLog:
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "log.db"
        return open_log(self.path, sync="normal")

    def reopen(self) -> None:
        self.journal.close()
        self.journal = open_log(self.path, sync="normal")

    def fail(self, cause: str | None) -> None:
        self.journal.conn.execute(f"PRAGMA query_only = {int(cause is not None)}")

    def rows(self) -> list[tuple[int, Event]]:
        from nullworker.fsm.events import from_row

        query = "SELECT seq, at, reservation_id, kind, reason, data FROM events ORDER BY seq"
        return [(seq, from_row(tuple(row))) for seq, *row in self.journal.conn.execute(query)]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            assert self.journal.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            self.journal.close()
            self.folder.cleanup()


QUICK = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_whatever_happens_the_promises_hold() -> None:
    run_state_machine_as_test(Reservations, settings=QUICK)


def test_whatever_happens_the_promises_hold_on_the_real_log() -> None:
    run_state_machine_as_test(ReservationsOnDisk, settings=settings(QUICK, max_examples=25))
