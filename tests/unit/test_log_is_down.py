"""While the log cannot be written, only ends are seen before their commit; and a moment is not a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from test_service import Desk, Journal

from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Claim
from nullworker.fsm.events import Event
from nullworker.service import PATIENCE_SECONDS, RETRY_SECONDS

FULL = "the disk is full"


class Locked(Journal):
    """Somebody else's lock, while `locked`. `taken_back`: how often a refused append was."""

    def __init__(self) -> None:
        super().__init__()
        self.locked = False
        self.taken_back = 0
        self.fills_up_after = 1_000  # batches

    def probe(self) -> None:
        if self.locked:
            raise LogUnavailable("database is locked", momentary=True)
        super().probe()

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        if self.batches >= self.fills_up_after:
            self.failing = FULL
        super().append(events)

    def take_back(self) -> None:
        self.taken_back += 1


@pytest.fixture
def journal() -> Locked:
    return Locked()


@pytest.fixture
def desk(journal: Locked) -> Iterator[Desk]:
    desk = Desk(journal)
    yield desk
    assert [seq for seq, _ in journal.rows] == list(range(1, len(journal.rows) + 1))


def states(desk: Desk, *ids: str) -> list[str]:
    return [reservation.state if (reservation := desk.service.book.get(each)) else "ended" for each in ids]


def three(desk: Desk) -> tuple[str, str, str]:
    """One is held, two wait."""
    first, second, third = (desk.service.claim(Claim()).id for _ in range(3))
    assert states(desk, first, second, third) == ["held", "queued", "queued"]
    return first, second, third


def over(desk: Desk) -> None:
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    desk.service.tick()


@pytest.mark.parametrize("end", ["released", "cancelled", "expired"])
def test_nobody_is_held_before_it_is_in_the_log(desk: Desk, end: str) -> None:
    first, second, third = three(desk)
    desk.clock.advance(20.0)
    desk.journal.failing = None if end == "expired" else FULL
    if end == "released":
        desk.service.release(first)
    elif end == "cancelled":
        desk.service.cancel(first, "client_disconnect")
    else:
        desk.service.extend(first, 0.0)
        desk.journal.failing = FULL
        desk.service.tick()
    assert states(desk, first, second, third) == ["ended", "queued", "queued"]
    assert desk.kinds()[-1].startswith(end)
    over(desk)
    assert states(desk, second, third) == ["held", "queued"]
    assert desk.kinds()[-1] == "held/None"
    assert desk.journal.rows[-1][1].kind == "held"


def test_who_waits_gives_up_in_his_time_also_without_a_log(desk: Desk) -> None:
    first, second, third = three(desk)
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.clock.advance(30.0)
    desk.service.tick()
    assert states(desk, second, third) == ["ended", "ended"]
    over(desk)
    assert [event.kind for _, event in desk.journal.rows[-3:]] == ["released", "expired", "expired"]


def test_what_has_ended_without_a_log_is_found_until_its_end_is_written(desk: Desk) -> None:
    def found(reservation_id: str) -> str | None:
        reservation = desk.service.find(reservation_id)
        return None if reservation is None else reservation.state

    first, second, third = three(desk)
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.service.cancel(second, "client_disconnect")
    assert [found(each) for each in (first, second, third, "nobody")] == ["released", "cancelled", "queued", None]
    over(desk)
    assert [found(each) for each in (first, second, third, "nobody")] == [None, None, "held", None]


def test_who_comes_when_the_log_is_back_has_the_place_of_the_one_that_is_held_now(desk: Desk) -> None:
    first, *_ = three(desk)
    assert desk.service.claim(Claim()).state == "queued", "the last place"
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    assert desk.service.claim(Claim()).state == "queued"


def test_who_comes_waits_behind_those_who_waited_for_the_log(desk: Desk) -> None:
    first, second, third = three(desk)
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    late = desk.service.claim(Claim())
    assert states(desk, second, third, late.id) == ["held", "queued", "queued"]


@pytest.mark.parametrize("how", ["tick", "cancel"])
def test_whatever_finds_that_the_log_is_back_hands_on_the_slot(desk: Desk, how: str) -> None:
    first, second, third = three(desk)
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    if how == "cancel":
        desk.service.cancel(third, "client_disconnect")
    else:
        desk.service.tick()
    assert states(desk, second) == ["held"]


def test_a_slot_that_could_not_be_handed_on_although_its_end_was_written_is_handed_on_by_the_probe(
    desk: Desk, journal: Locked
) -> None:
    first, second, _ = three(desk)
    journal.failing = FULL
    desk.service.release(first)
    journal.failing, journal.fills_up_after = None, journal.batches + 1
    desk.clock.advance(RETRY_SECONDS)
    desk.service.tick()
    assert not desk.service.unwritten
    assert states(desk, first, second) == ["ended", "queued"]
    journal.failing, journal.fills_up_after = None, 1_000
    desk.service.probe()
    assert states(desk, second) == ["held"]


def test_nothing_is_written_past_the_events_that_wait(desk: Desk, journal: Locked) -> None:
    first, second, _ = three(desk)
    journal.failing = FULL
    desk.service.release(first)
    desk.clock.advance(RETRY_SECONDS)
    before = journal.batches
    desk.service.cancel(second, "client_disconnect")
    assert journal.batches == before + 1


def test_more_time_for_a_consumer_does_not_wait_in_memory(desk: Desk, journal: Locked) -> None:
    held = desk.service.claim(Claim(duration=50.0))
    desk.service.attach(held.id, "all")
    deadline = held.ends_at
    desk.clock.advance(25.0)
    journal.failing = FULL
    desk.service.tick()
    assert held.ends_at == deadline
    assert not desk.service.unwritten
    over(desk)
    assert held.ends_at == desk.clock.now() + 60.0


def test_of_one_that_asked_for_no_time_neither_the_hold_nor_its_end_comes_before_the_commit(desk: Desk) -> None:
    first = desk.service.claim(Claim()).id
    none = desk.service.claim(Claim(duration=0.0)).id
    last = desk.service.claim(Claim()).id
    desk.journal.failing = FULL
    desk.service.release(first)
    assert states(desk, none, last) == ["queued", "queued"]
    over(desk)
    assert states(desk, none, last) == ["ended", "held"]


# -- refused, and taken back -----------------------------------------------------------------------------------------


def test_what_is_refused_is_taken_back_and_what_has_ended_is_not(desk: Desk, journal: Locked) -> None:
    first, *_ = three(desk)
    journal.failing = FULL
    with pytest.raises(LogUnavailable, match=FULL):
        desk.service.extend(first, 5.0)
    assert journal.taken_back == 1
    over(desk)
    journal.failing = FULL
    desk.service.drain("told to")  # the ends of two who wait
    assert journal.taken_back == 1, "a restart may find them: they are true"
    over(desk)
    assert [event.kind for _, event in journal.rows[-2:]] == ["cancelled", "cancelled"]


def test_an_end_with_a_hold_behind_it_is_taken_back_and_written_by_itself(desk: Desk, journal: Locked) -> None:
    first, *_ = three(desk)
    journal.failing = FULL
    desk.service.release(first)
    assert journal.taken_back == 1


def test_a_claim_that_could_not_be_written_is_taken_back_before_it_is_refused(desk: Desk, journal: Locked) -> None:
    journal.failing = FULL
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    assert journal.taken_back == 1


# -- a lock is waited out --------------------------------------------------------------------------------------------


def test_a_lock_is_no_state_until_it_has_lasted(desk: Desk, journal: Locked) -> None:
    journal.locked = True
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    for _ in range(int(PATIENCE_SECONDS / RETRY_SECONDS) - 1):
        assert desk.readiness.log is None
        assert desk.service.refusal == "log_unavailable"
        assert desk.service.next_deadline() == desk.clock.now() + RETRY_SECONDS
        desk.clock.advance(RETRY_SECONDS)
        desk.service.tick()
    desk.clock.advance(RETRY_SECONDS)
    desk.service.tick()
    assert desk.readiness.log == "database is locked"
    assert "locked" in desk.readiness.error_msg
    assert journal.taken_back == 0, "behind a lock nothing was written"
    journal.locked = False
    assert desk.service.claim(Claim()).state == "held"
    assert desk.readiness.log is None


def test_a_lock_that_comes_again_begins_its_time_anew(desk: Desk, journal: Locked) -> None:
    for _ in range(3):
        journal.locked = True
        desk.service.probe()
        desk.clock.advance(PATIENCE_SECONDS - 1.0)
        desk.service.tick()
        assert desk.readiness.log is None
        journal.locked = False
        desk.service.tick()
        assert not desk.service.log_is_down


def test_a_full_disk_is_told_at_once(desk: Desk) -> None:
    desk.journal.failing = FULL
    desk.service.probe()
    assert desk.readiness.state == "errored"


def test_whoever_sets_a_timer_hears_of_each_failure(desk: Desk, journal: Locked) -> None:
    calls: list[float | None] = []
    desk.service.on_deadline.append(lambda: calls.append(desk.service.next_deadline()))
    journal.locked = True
    desk.service.probe()
    assert calls == [desk.clock.now() + RETRY_SECONDS]


# -- the clock is followed when that is in the log -------------------------------------------------------------------


def test_the_clock_is_not_followed_before_its_anchor_is_stored(desk: Desk) -> None:
    desk.clock.step_wall(7200.0)
    before = desk.clock.now()
    desk.journal.failing = FULL
    assert desk.service.claim(Claim()).reason == "log_unavailable"
    assert desk.clock.now() == before
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    assert desk.service.claim(Claim()).state == "held"
    assert desk.clock.now() == before + 7200.0 + RETRY_SECONDS
    assert desk.journal.anchor is not None


def test_the_clock_is_not_followed_while_somebody_waits(desk: Desk) -> None:
    first, second, _ = three(desk)
    desk.journal.failing = FULL
    desk.service.release(first)
    desk.clock.step_wall(-7200.0)
    desk.journal.failing = None
    desk.clock.advance(RETRY_SECONDS)
    desk.service.claim(Claim())
    held = desk.service.book.get(second)
    assert held is not None
    assert held.held_at is not None
    assert held.held_at >= held.queued_at
