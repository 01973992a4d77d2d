"""The service on a journal in memory: failures of the log, and which observers are called."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

import pytest

from nullworker import service as module
from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import Event, SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import RETRY_SECONDS, Commit, Service, new_id
from nullworker.testing.fakes import FakeClock, MemoryJournal

SESSION = Claim("session", 60.0, session=SessionTerms(20.0))


class Journal(MemoryJournal):
    """Counts the batches of events, and how often anything is written at all."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = self.writes = 0

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        assert events, "to ask whether it can be written there is probe"
        self.batches += 1
        super().append(events)

    def probe(self) -> None:
        self.writes += 1  # of events too: an append begins with it
        super().probe()


class Desk:
    """A service that has just been started, on a clock that stands still."""

    def __init__(self, journal: Journal | None = None, clock: FakeClock | None = None) -> None:
        self.clock, self.journal = clock or FakeClock(), journal or Journal()
        self.readiness = Readiness()
        self.heard: list[Commit] = []
        self.service = Service(self.journal, self.clock, Limits(60.0, 30.0, 3), self.readiness)
        self.service.observers.append(self.heard.append)
        self.service.resume()

    def kinds(self) -> list[str]:
        return [f"{commit.event.kind}/{commit.event.reason}" for commit in self.heard]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_times_are_as_precise_as_they_are_shown() -> None:
    """So the time of an event, as it was shown, is the time of that event, and of no other between it and the next."""
    desk = Desk(clock=FakeClock(1_800_000_000.12345))
    held = desk.service.claim(Claim())
    assert (held.queued_at, held.ends_at) == (1_800_000_000.123, 1_800_000_060.123)


def test_an_id_is_sixteen_letters_and_digits_and_no_two_are_the_same() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[a-z2-7]{16}", each) for each in ids)


def test_while_all_is_well_nothing_is_written_but_events(desk: Desk) -> None:
    for _ in range(3):
        desk.service.release(desk.service.claim(Claim()).id)
        desk.service.tick()
    assert (desk.journal.batches, desk.journal.writes) == (6, 6)


def test_before_the_end_of_a_hold_the_log_is_asked_only_if_a_consumer_is_attached(desk: Desk) -> None:
    """Its end must not come while the log is down; for every other hold the question would cost a commit."""
    desk.service.claim(Claim(duration=5.0))
    desk.clock.advance(5.0)
    desk.service.tick()
    assert desk.kinds()[-1] == "expired/duration_elapsed"
    held = desk.service.claim(Claim(duration=5.0))
    desk.service.attach(held.id, "")
    desk.clock.advance(4.0)
    desk.service.tick()
    assert desk.journal.writes == desk.journal.batches
    desk.clock.advance(1.0)
    desk.service.tick()
    assert held.state == "expired"
    assert desk.journal.writes == desk.journal.batches + 1


def test_a_claim_finds_that_the_log_is_back(desk: Desk) -> None:
    desk.journal.failing = "the disk is full"
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    assert desk.service.next_deadline() == desk.clock.now() + RETRY_SECONDS
    desk.journal.failing = None
    assert desk.service.claim(Claim()).reason == "log_unavailable", "it is not tried for each claim"
    desk.clock.advance(RETRY_SECONDS)
    assert desk.service.claim(Claim()).state == "held"
    assert [seq for seq, _ in desk.journal.rows] == list(range(1, 7)), "and nothing is missing in it"
    assert desk.service.next_deadline() == desk.clock.now() + 60


def test_a_probe_finds_that_the_log_fails_and_that_it_is_back(desk: Desk) -> None:
    desk.service.claim(Claim())
    desk.journal.failing = "the disk is full"
    desk.service.probe()
    assert desk.readiness.log == "the disk is full"
    assert desk.service.next_deadline() == desk.clock.now() + RETRY_SECONDS, "sooner than the end of the hold"
    desk.clock.advance(RETRY_SECONDS)
    desk.service.tick()
    assert desk.readiness.log == "the disk is full", "it is tried before it is believed"
    assert desk.service.next_deadline() == desk.clock.now() + RETRY_SECONDS, "and not without a pause"
    desk.journal.failing = None
    desk.service.probe()
    assert desk.readiness.log is None


def test_a_log_that_fails_and_is_back_and_a_clock_that_is_followed_are_a_line_each(
    desk: Desk, logged: Callable[[], list[str]]
) -> None:
    for _ in range(2):
        desk.service.release(desk.service.claim(Claim()).id)
        desk.journal.failing = "the disk is full"
        for _ in range(3):
            desk.service.claim(Claim())
            desk.clock.advance(RETRY_SECONDS)
            desk.service.tick()
        desk.journal.failing = None
        desk.service.tick()
        desk.clock.advance(RETRY_SECONDS)
        desk.service.tick()
    desk.clock.step_wall(5.0)
    desk.service.claim(Claim())
    assert logged() == ["event_log_unavailable", "event_log_recovered"] * 2 + ["clock_moved"]


def test_whatever_is_written_says_that_the_log_is_back(desk: Desk) -> None:
    held = desk.service.claim(Claim())
    desk.journal.failing = "the disk is full"
    desk.service.probe()
    desk.journal.failing = None
    desk.service.release(held.id)
    assert desk.readiness.log is None


def test_what_waits_is_written_before_what_comes_next(desk: Desk) -> None:
    held = desk.service.claim(Claim())
    desk.journal.failing = "the disk is full"
    desk.service.claim(Claim())
    desk.journal.failing = None
    with pytest.raises(LogUnavailable):
        desk.service.extend(held.id, 5.0)
    desk.clock.advance(RETRY_SECONDS)
    desk.service.extend(held.id, 5.0)
    assert [event.kind for _, event in desk.journal.rows] == ["queued", "held", "queued", "cancelled", "extended"]


def test_a_probe_says_nothing_of_a_log_for_which_events_wait(desk: Desk) -> None:
    held = desk.service.claim(Claim())
    desk.journal.failing = "the disk is full"
    desk.service.release(held.id)
    desk.journal.failing = None
    desk.service.probe()
    assert desk.readiness.log == "the disk is full", "until they are written"


def test_the_number_of_events_in_memory_is_limited(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNWRITTEN", 4)
    desk.journal.failing = "the disk is full"
    for _ in range(2):
        assert desk.service.claim(Claim()).reason == "log_unavailable"
    with pytest.raises(LogUnavailable, match="the disk is full; 4 events wait in memory"):
        desk.service.claim(Claim())
    assert len(desk.service.unwritten) == 4


def test_a_deadline_that_cannot_be_logged_is_not_moved(desk: Desk) -> None:
    session = desk.service.claim(SESSION)
    deadline = session.ends_at
    desk.clock.advance(50)
    desk.journal.failing = "the disk is full"
    with pytest.raises(LogUnavailable, match="the disk is full"):
        desk.service.extend(session.id, 30.0)
    with pytest.raises(LogUnavailable, match="the disk is full"):
        desk.service.renew(session.id)
    assert session.ends_at == deadline
    assert not desk.service.unwritten


def test_claims_are_refused_while_errored_or_draining(desk: Desk) -> None:
    held = desk.service.claim(Claim())
    desk.service.consumer_unhealthy("it does not answer", cancel_held=False)
    assert (held.state, desk.readiness.consumer) == ("held", "it does not answer")
    assert desk.service.claim(Claim()).reason == "errored"
    desk.service.consumer_unhealthy("it does not answer", cancel_held=True)
    assert held.reason == "consumer_unhealthy"
    desk.service.drain("told to")
    assert desk.readiness.draining == "told to"
    assert desk.service.claim(Claim()).reason == "draining"


@pytest.mark.parametrize(("claim", "ended"), [(Claim(), "draining"), (SESSION, None)])
def test_the_end_of_a_drain_cancels_a_request_and_spares_a_session(desk: Desk, claim: Claim, ended: str | None) -> None:
    held = desk.service.claim(claim)
    desk.service.drain("told to")
    assert held.state == "held"
    desk.service.end_drain()
    assert held.reason == ended


def test_a_session_whose_time_passed_while_nobody_ran_is_over_at_the_start(desk: Desk) -> None:
    desk.service.claim(SESSION)
    desk.clock.advance(61)
    again = Desk(desk.journal, desk.clock)
    assert again.kinds() == ["expired/duration_elapsed"], "of what is replayed nobody hears"
    assert again.heard[0].seq == 3
    assert again.service.book.held is None


def test_a_failing_observer_is_logged_and_ignored(desk: Desk, logged: Callable[[], list[str]]) -> None:
    def break_down(commit: Commit) -> None:
        raise RuntimeError("a bug")

    held = desk.service.claim(Claim())
    desk.service.watch(held.id, break_down)
    desk.service.release(held.id)
    assert desk.kinds()[-1] == "released/explicit"
    assert logged() == ["observer_failed"]
    assert not desk.service._watchers, "nobody watches what is over"


async def test_a_waiter_gets_its_own_end_and_is_removed(desk: Desk) -> None:
    first, second = desk.service.claim(Claim()), desk.service.claim(Claim())
    waiting = [asyncio.create_task(desk.service.ended(each)) for each in (first, first, second)]
    gone = asyncio.create_task(desk.service.ended(second))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    assert len(desk.service._watchers[second.id]) == 1
    desk.service.extend(first.id, 5.0)
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    desk.service.release(first.id)
    assert (await waiting[0], await waiting[1]) == (first, first)
    assert not waiting[2].done()
    desk.service.cancel(second.id, "client_disconnect")
    assert (await waiting[2]).reason == "client_disconnect"
    assert await desk.service.ended(first) is first, "which is over already"
    assert not desk.service._watchers


async def test_a_cancelled_waiter_at_the_moment_of_the_end_is_no_error(
    desk: Desk, logged: Callable[[], list[str]]
) -> None:
    held = desk.service.claim(Claim())
    waiting = asyncio.create_task(desk.service.ended(held))
    await asyncio.sleep(0)
    waiting.cancel()
    desk.service.release(held.id)
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert logged() == []


def test_a_removed_watcher_is_not_called(desk: Desk) -> None:
    held = desk.service.claim(Claim())
    heard: list[Commit] = []
    desk.service.watch(held.id, heard.append)
    desk.service.extend(held.id, 5.0)
    for _ in range(2):
        desk.service.unwatch(held.id, heard.append)
    assert not desk.service._watchers
    desk.service.release(held.id)
    assert [commit.event.kind for commit in heard] == ["extended"]


def test_the_wall_clock_is_followed_when_nothing_is_held_and_nothing_waits(desk: Desk) -> None:
    began = desk.clock.now()
    held = desk.service.claim(Claim())
    desk.clock.step_wall(-3600.0)
    assert desk.service.claim(Claim()).queued_at == began
    desk.service.consumer_unhealthy("it does not answer", cancel_held=False)  # sends away who waits
    desk.readiness.consumer_is_healthy()
    desk.journal.failing = "the disk is full"
    desk.service.release(held.id)
    assert desk.service.claim(Claim()).queued_at == began, "the end that waits is of the old time"
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    desk.service.tick()
    assert desk.service.claim(Claim()).queued_at == began + RETRY_SECONDS - 3600
    assert desk.journal.anchor is not None, "and is kept for a restart"


def test_a_clock_set_back_does_not_keep_the_log_from_being_tried(desk: Desk) -> None:
    desk.journal.failing = "the disk is full"
    desk.service.probe()
    desk.journal.failing = None
    desk.clock.step_wall(-3600.0)
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    desk.clock.advance(RETRY_SECONDS)
    assert desk.service.claim(Claim()).state == "held"


def test_a_claim_is_refused_when_the_clock_was_set_and_only_that_cannot_be_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise LogUnavailable("the disk is full")

    monkeypatch.setattr(desk.journal, "store_anchor", fail)
    desk.clock.step_wall(-3600.0)
    assert desk.service.claim(Claim()).reason == "log_unavailable"


def test_an_anchor_that_cannot_be_kept_is_a_log_that_fails(desk: Desk) -> None:
    desk.journal.failing = "the disk is full"
    desk.clock.step_wall(-3600.0)
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    assert desk.readiness.log == "the disk is full"
