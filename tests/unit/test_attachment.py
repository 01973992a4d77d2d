"""The liveness connection in the core, on a fake clock: what it writes, when its loss ends a hold, and a restart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nullworker.errors import IllegalMove, LogUnavailable
from nullworker.fsm import attachment
from nullworker.fsm.attachment import MOVES, Attachment, Extends
from nullworker.fsm.book import Claim, Limits, Reservation
from nullworker.fsm.events import Ended, Extended, SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.testing.fakes import FakeClock, MemoryJournal

#: Deadlines in a row that do not move the clock: more of them would be a loop that spins.
MAX_AT_ONCE = 5


class Desk:
    """A service on a journal in memory; `restart` gives another one on the same journal."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.clock, self.journal = FakeClock(), MemoryJournal()
        self.begun = self.clock.now()
        self.limits = limits or Limits()
        self.service = Service(self.journal, self.clock, self.limits, Readiness())
        self.service.listening()

    def restart(self, limits: Limits | None = None) -> None:
        """All but the answer of the control port, which `listening` is."""
        self.service = Service(self.journal, self.clock, limits or self.limits, Readiness())
        self.service.resume()

    def session(self, lifetime: float = 600.0) -> Reservation:
        terms = SessionTerms(lifetime)
        return self.service.claim(Claim("session", lifetime, session=terms))

    def request(self, duration: float = 600.0) -> Reservation:
        return self.service.claim(Claim(duration=duration))

    def attach(self, reservation: Reservation, extends: Extends = "1") -> None:
        self.service.attach(reservation.id, extends)

    def wait(self, seconds: float) -> None:
        """Let time pass, as the worker's timer does it."""
        end, at_once = self.clock.now() + seconds, 0
        while (deadline := self.service.next_deadline()) is not None and deadline <= end:
            at_once = at_once + 1 if deadline <= self.clock.now() else 0
            assert at_once < MAX_AT_ONCE, "it spins"
            self.clock.advance(max(deadline - self.clock.now(), 0.0))
            self.service.tick()
        self.clock.advance(end - self.clock.now())

    def story(self) -> list[tuple[float, str]]:
        """When, in seconds from the beginning, and what."""
        return [
            (round(event.at - self.begun, 3), event.kind if event.reason is None else event.reason)
            for _, event in self.journal.rows
        ]

    def end(self) -> tuple[float, str]:
        return self.story()[-1]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_the_first_attachment_of_a_session_is_logged_with_the_deadline_as_it_was(desk: Desk) -> None:
    session = desk.session()
    desk.wait(7)
    desk.attach(session)
    desk.service.detach(session.id)
    desk.attach(session)
    assert desk.story() == [(0, "queued"), (0, "held"), (7, "attached")]
    data = desk.journal.rows[-1][1].data
    assert isinstance(data, Extended)
    assert data.ends_at == desk.begun + 600


def test_the_attachment_of_a_request_writes_nothing_and_its_end_tells_of_it(desk: Desk) -> None:
    request = desk.request()
    desk.wait(7)
    desk.attach(request)
    desk.service.release(request.id)
    assert desk.story() == [(0, "queued"), (0, "held"), (7, "explicit")]
    assert desk.journal.rows[-1][1].data == Ended(attached_at=desk.begun + 7)


def test_an_end_without_a_consumer_tells_of_none(desk: Desk) -> None:
    desk.service.release(desk.request().id)
    assert desk.journal.rows[-1][1].data == Ended()


def test_one_connection_at_a_time(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    with pytest.raises(IllegalMove, match="attached"):
        desk.attach(session)


def test_a_timer_hears_of_each_change_of_a_connection_also_where_none_is_a_commit(desk: Desk) -> None:
    heard: list[str] = []
    request = desk.request()
    desk.service.on_deadline.append(lambda: heard.append(request.attachment.state))
    desk.service.listening()
    desk.attach(request)
    desk.service.detach(request.id)
    assert heard == ["awaited", "attached", "broken"]
    assert desk.service.seq == 2


def test_the_break_of_a_connection_whose_hold_has_ended_is_nothing(desk: Desk) -> None:
    first, second = desk.request(), desk.request()
    desk.attach(first)
    desk.service.release(first.id)
    desk.attach(second)
    desk.service.detach(first.id)
    assert second.attachment.state == "attached"
    desk.service.release(second.id)
    desk.service.detach(second.id)
    assert [reservation.state for reservation in (first, second)] == ["released", "released"]


def test_a_broken_connection_ends_the_hold_after_the_grace(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    desk.wait(10)
    desk.service.detach(session.id)
    desk.wait(100)
    assert desk.end() == (15, "consumer_lost")
    assert desk.journal.rows[-1][1].data == Ended(attached_at=desk.begun)


def test_a_grace_of_nothing_is_over_at_once() -> None:
    desk = Desk(Limits(consumer_grace_seconds=0))
    session = desk.session()
    desk.attach(session)
    desk.service.detach(session.id)
    desk.wait(0)
    assert desk.end() == (0, "consumer_lost")


def test_a_connection_that_comes_back_in_time_keeps_the_hold(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    desk.service.detach(session.id)
    desk.wait(4.9)
    desk.attach(session)
    desk.wait(300)
    assert session.state == "held"


def test_the_next_in_the_queue_is_held_when_a_consumer_is_lost(desk: Desk) -> None:
    first, second = desk.request(), desk.request()
    desk.attach(first)
    desk.service.detach(first.id)
    desk.wait(5)
    assert desk.story()[-2:] == [(5, "consumer_lost"), (5, "held")]
    assert second.attachment.state == "awaited"


def test_a_session_is_extended_for_as_long_as_its_consumer_is_attached_in_few_commits(desk: Desk) -> None:
    session = desk.session(lifetime=20.0)
    desk.attach(session)
    desk.wait(3600)
    assert session.state == "held"
    assert 3600 / 30 <= len(desk.journal.rows) <= 3600 / 30 + 4
    assert desk.story()[:4] == [(0, "queued"), (0, "held"), (0, "attached"), (30, "attached")]
    ends = [event.data.ends_at for _, event in desk.journal.rows if isinstance(event.data, Extended)]
    assert ends == sorted(ends)


def test_a_session_with_a_small_cap_is_given_no_more_than_that() -> None:
    desk = Desk(Limits(max_reservation_seconds=10.0))
    session = desk.session(lifetime=10.0)
    desk.attach(session)
    desk.wait(100)
    assert session.state == "held"
    assert session.ends_at is not None
    assert session.ends_at <= desk.clock.now() + 10
    assert len(desk.journal.rows) <= 100 / 5 + 4


@pytest.mark.parametrize(("extends", "state"), [("", "expired"), ("1", "expired"), ("all", "held")])
def test_the_duration_of_a_request_is_its_callers_word_unless_all_are_extended(
    desk: Desk, extends: Extends, state: str
) -> None:
    request = desk.request(duration=20)
    desk.attach(request, extends)
    desk.wait(120)
    assert request.state == state


def test_a_session_is_not_extended_unasked(desk: Desk) -> None:
    session = desk.session(lifetime=20.0)
    desk.attach(session, "")
    desk.wait(120)
    assert desk.end() == (20, "duration_elapsed")


@pytest.mark.parametrize("kind", ["attached", "pinged", "extended"])
def test_a_whole_hold_has_a_cap_whoever_extends_it(kind: str) -> None:
    desk = Desk(Limits(max_hold_seconds=1000))
    session = desk.session(lifetime=300.0)
    if kind == "attached":
        desk.attach(session)
    for _ in range(200):
        if session.state == "held" and kind == "pinged":
            desk.service.renew(session.id)
        elif session.state == "held" and kind == "extended":
            desk.service.extend(session.id, 600)
        desk.wait(10)
    assert desk.end() == (1000, "duration_elapsed")


def test_a_claim_is_never_held_for_longer_than_the_cap_of_a_hold() -> None:
    desk = Desk(Limits(max_hold_seconds=50))
    assert desk.request().terms.duration_cap == 50
    desk.wait(100)
    assert desk.end() == (50, "duration_elapsed")


def test_a_hold_to_which_nobody_attaches_ends_after_the_timeout() -> None:
    desk = Desk(Limits(attach_timeout=10))
    desk.wait(3)
    desk.request()
    desk.wait(100)
    assert desk.end() == (13, "consumer_absent")


def test_a_hold_to_which_somebody_has_attached_in_time_does_not() -> None:
    desk = Desk(Limits(attach_timeout=10))
    request = desk.request()
    desk.wait(9)
    desk.attach(request)
    desk.wait(100)
    assert request.state == "held"


def test_one_that_was_handed_the_slot_has_its_whole_timeout() -> None:
    desk = Desk(Limits(attach_timeout=10))
    first, second = desk.request(), desk.request()
    desk.attach(first)
    desk.wait(20)
    desk.service.release(first.id)
    desk.wait(9)
    assert second.state == "held"
    desk.wait(1)
    assert desk.end() == (30, "consumer_absent")


# -- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grace", "time"), [(5.0, 30.0), (50.0, 50.0)])
@pytest.mark.parametrize("away", [1.0, 10_000.0])
@pytest.mark.parametrize("pings", [False, True])
def test_after_a_restart_a_session_has_time_to_get_its_consumer_back(
    grace: float, time: float, away: float, pings: bool
) -> None:
    desk = Desk(Limits(consumer_grace_seconds=grace))
    session = desk.session(lifetime=600.0)
    desk.attach(session)
    desk.clock.advance(away)
    desk.restart()
    desk.wait(2)  # the control port does not answer yet
    desk.service.listening()
    for _ in range(100):
        if pings and desk.service.book.held:
            desk.service.renew(session.id)
        desk.wait(1)
    assert desk.end() == (away + 2 + time, "consumer_lost")


def test_after_a_restart_the_consumer_comes_back_however_late(desk: Desk) -> None:
    session = desk.session(lifetime=20.0)
    desk.attach(session)
    desk.clock.advance(10_000)
    desk.restart()
    desk.service.listening()
    held = desk.service.book.held
    assert held is not None
    assert held.ends_at == desk.clock.now() + 30
    desk.wait(29)
    desk.attach(held)
    desk.wait(300)
    assert held.state == "held"
    assert held.attachment.first_at == desk.begun


def test_after_a_restart_the_first_grace_is_over_and_the_next_is_the_usual_one(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    desk.restart()
    desk.service.listening()
    desk.attach(session)
    desk.wait(1)
    desk.service.detach(session.id)
    desk.wait(100)
    assert desk.end() == (6, "consumer_lost")


def test_after_a_restart_the_timeout_of_a_session_begins_anew(desk: Desk) -> None:
    desk.session()
    desk.wait(100)
    desk.restart(Limits(attach_timeout=10))
    desk.wait(3)
    desk.service.listening()
    desk.wait(50)
    assert desk.end() == (113, "consumer_absent")


def test_after_a_restart_the_cap_of_the_whole_hold_still_counts(desk: Desk) -> None:
    desk.attach(desk.session())
    desk.clock.advance(10_000)
    desk.restart(Limits(max_hold_seconds=5_000))
    assert desk.end() == (10_000, "duration_elapsed")


def test_a_session_without_a_consumer_expires_over_a_restart_as_ever(desk: Desk) -> None:
    desk.session()
    desk.clock.advance(10_000)
    desk.restart()
    assert desk.end() == (10_000, "duration_elapsed")


def test_a_stop_of_the_worker_starts_no_grace_and_ends_one(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    desk.service.drain("it stops")
    desk.service.detach(session.id)
    desk.wait(100)
    assert session.state == "held"

    desk = Desk()
    session = desk.session()
    desk.attach(session)
    desk.service.detach(session.id)
    desk.wait(1)
    desk.service.drain("it stops")
    desk.wait(100)
    assert session.state == "held"


def test_a_connection_that_the_worker_has_closed_starts_no_grace(desk: Desk) -> None:
    session = desk.session(lifetime=60)
    desk.attach(session)
    desk.service.detach(session.id, by_worker=True)
    desk.wait(100)
    assert desk.end() == (60, "duration_elapsed")


# -- a log that cannot be written ----------------------------------------------------------------------------------


def test_while_the_log_cannot_be_written_an_attached_session_does_not_expire_and_is_extended_afterwards(
    desk: Desk,
) -> None:
    session = desk.session(lifetime=20.0)
    desk.attach(session)
    desk.journal.failing = "the disk is full"
    desk.wait(1000)
    assert session.state == "held"
    desk.journal.failing = None
    desk.wait(1)
    assert session.state == "held"
    assert desk.story()[-1][1] == "attached"
    assert session.ends_at is not None
    assert session.ends_at > desk.clock.now()


def test_while_the_log_cannot_be_written_an_attached_request_does_not_expire_but_at_once_when_it_can(
    desk: Desk,
) -> None:
    request = desk.request(duration=20)
    desk.attach(request)
    desk.journal.failing = "the disk is full"
    desk.wait(1000)
    assert request.state == "held"
    desk.journal.failing = None
    desk.wait(1)
    assert desk.end()[1] == "duration_elapsed"


def test_while_the_log_cannot_be_written_what_has_no_consumer_expires(desk: Desk) -> None:
    request = desk.request(duration=20)
    desk.journal.failing = "the disk is full"
    desk.wait(1000)
    assert request.state == "expired"


def test_while_the_log_cannot_be_written_a_lost_consumer_ends_the_hold(desk: Desk) -> None:
    session = desk.session()
    desk.attach(session)
    desk.journal.failing = "the disk is full"
    desk.service.detach(session.id)
    desk.wait(10)
    assert (session.state, session.reason) == ("cancelled", "consumer_lost")


def test_a_first_attachment_that_cannot_be_logged_has_not_happened(desk: Desk) -> None:
    session = desk.session()
    desk.journal.failing = "the disk is full"
    with pytest.raises(LogUnavailable):
        desk.attach(session)
    assert (session.attachment.state, session.attachment.first_at) == ("awaited", None)


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_picture_is_the_table() -> None:
    picture = re.search(r"stateDiagram-v2\n(.*?)```", Path(attachment.__file__).read_text(), re.DOTALL)
    assert picture is not None
    drawn = re.findall(r"^\s*(\w+) --> (\w+): (\w+)$", picture[1], re.MULTILINE)
    assert {(source, move): target for source, target, move in drawn} == MOVES


@pytest.mark.parametrize("state", ["awaited", "restarted", "attached", "broken"])
@pytest.mark.parametrize("move", ["attach", "break"])
def test_each_move_leads_where_the_table_says_or_is_refused(state: str, move: str) -> None:
    connection = Attachment(state=state)  # type: ignore[arg-type]  # one of the literals above
    after = MOVES.get((state, move))  # type: ignore[arg-type]  # and here
    if after is None:
        with pytest.raises(IllegalMove, match=f"is {state}"):
            connection.check(move)  # type: ignore[arg-type]
    else:
        assert connection.check(move) == after  # type: ignore[arg-type]
