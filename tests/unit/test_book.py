"""Corner cases of the book: the last place in the queue, two deadlines at once, a hold of zero seconds."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from nullworker.errors import IllegalMove
from nullworker.fsm.book import Book, Claim, Limits
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, SessionTerms

NOW = 1000.0


class Desk:
    """A book, and the events that have come of it as `name kind/reason`."""

    def __init__(self, **limits: float) -> None:
        self.book = Book(Limits(60.0, limits.get("wait", 30.0), int(limits.get("queued", 3))))
        self._names = count(1)

    def does(self, events: list[Event]) -> list[str]:
        for event in events:
            self.book.apply(event)
        return [f"{e.reservation_id} {e.kind}" + (f"/{e.reason}" if e.reason else "") for e in events]

    def claim(self, duration: float | None = None, now: float = NOW) -> list[str]:
        return self.does(self.book.claim(f"r{next(self._names)}", Claim(duration=duration), now))


def test_the_queue_takes_as_many_as_it_may_and_not_one_more() -> None:
    desk = Desk(queued=2)
    assert desk.claim() == ["r1 queued", "r1 held"]
    assert desk.claim() == ["r2 queued"]
    assert desk.claim() == ["r3 queued"]
    assert desk.claim() == ["r4 queued", "r4 expired/queue_full"]
    desk.does(desk.book.release("r1", "explicit", NOW))
    assert desk.claim() == ["r5 queued"]


def test_a_hold_and_a_wait_that_end_together_end_well_for_who_waits() -> None:
    desk = Desk(wait=60.0)
    desk.claim(60.0)
    desk.claim()
    assert desk.does(desk.book.due(NOW + 59.999)) == []
    assert desk.does(desk.book.due(NOW + 60.0)) == ["r1 expired/duration_elapsed", "r2 held"]


def test_a_slot_that_comes_at_the_end_of_two_waits_is_for_the_one_that_came_first() -> None:
    desk = Desk(wait=60.0)
    for _ in range(3):
        desk.claim(60.0)
    ends = desk.does(desk.book.due(NOW + 60.0))
    assert ends == ["r1 expired/duration_elapsed", "r2 held", "r3 expired/queue_timeout"]


def test_without_time_to_wait_a_claim_is_held_or_refused_at_once() -> None:
    desk = Desk(wait=0.0)
    assert desk.claim() == ["r1 queued", "r1 held"]
    assert desk.claim() == ["r2 queued", "r2 expired/queue_timeout"]


def test_a_wait_that_was_over_before_the_hold_is_over() -> None:
    desk = Desk(wait=30.0)
    desk.claim(60.0)
    desk.claim()
    desk.claim(now=NOW + 40)
    assert desk.does(desk.book.due(NOW + 65)) == ["r2 expired/queue_timeout", "r1 expired/duration_elapsed", "r3 held"]


def test_a_duration_of_0_is_held_and_expires_in_one_batch() -> None:
    desk = Desk()
    desk.claim()
    desk.claim(0.0)
    desk.claim(0.0)
    desk.claim(5.0)
    assert desk.does(desk.book.release("r1", "explicit", NOW + 1)) == [
        *("r1 released/explicit", "r2 held", "r2 expired/duration_elapsed"),
        *("r3 held", "r3 expired/duration_elapsed", "r4 held"),
    ]
    assert desk.book.next_deadline() == NOW + 6


def test_a_request_is_not_renewed_and_a_session_never_to_less() -> None:
    desk = Desk()
    desk.claim()
    with pytest.raises(IllegalMove, match="is not a session"):
        desk.book.renew("r1", NOW)
    desk = Desk()
    desk.does(desk.book.claim("s", Claim("session", 10.0, session=SessionTerms(10.0)), NOW))
    desk.does(desk.book.extend("s", 50.0, NOW))
    desk.does(desk.book.renew("s", NOW + 1))
    assert desk.book.next_deadline() == NOW + 50
    desk.does(desk.book.renew("s", NOW + 45))
    assert desk.book.next_deadline() == NOW + 55


@pytest.mark.parametrize(("lifetime", "least"), [(10.0, 1.0), (60.0, 1.0), (3.0, 0.3), (0.4, 0.04)])
def test_a_renewal_that_would_hardly_move_the_deadline_is_no_event(lifetime: float, least: float) -> None:
    desk = Desk()
    desk.does(desk.book.claim("s", Claim("session", lifetime, session=SessionTerms(lifetime)), NOW))
    assert desk.does(desk.book.renew("s", NOW + least * 0.95)) == []
    assert desk.does(desk.book.renew("s", NOW + least * 1.1)) == ["s extended/ping"]
    assert desk.book.next_deadline() == pytest.approx(NOW + least * 1.1 + lifetime)


@pytest.mark.parametrize("refusal", [None, "draining", "not_ready"])
def test_a_request_idx_that_is_live_is_a_duplicate_before_all_else(refusal: str | None) -> None:
    desk = Desk(queued=0)
    live = Claim(request_idx=7)
    assert desk.does(desk.book.claim("a", live, NOW)) == ["a queued", "a held"]
    assert desk.does(desk.book.claim("b", live, NOW, refusal)) == ["b queued", "b expired/duplicate"]
    session = Claim("session", 5.0, request_idx=7, session=SessionTerms(5.0))
    assert desk.does(desk.book.claim("c", session, NOW, refusal)) == ["c queued", "c expired/duplicate"]
    desk.does(desk.book.release("a", "explicit", NOW))
    assert desk.does(desk.book.claim("d", live, NOW)) == ["d queued", "d held"]


def test_a_request_idx_that_waits_is_live_too() -> None:
    desk = Desk()
    desk.claim()
    desk.does(desk.book.claim("a", Claim(request_idx=7), NOW))
    assert desk.does(desk.book.claim("b", Claim(request_idx=7), NOW)) == ["b queued", "b expired/duplicate"]
    desk.does(desk.book.cancel("a", "client_disconnect", NOW))
    assert desk.does(desk.book.claim("c", Claim(request_idx=7), NOW)) == ["c queued"]


def test_a_second_hold_is_no_history() -> None:
    desk = Desk()
    desk.claim()
    desk.claim()
    with pytest.raises(IllegalMove, match="r2 cannot be held while r1 is"):
        desk.book.apply(Event(NOW, "r2", "held", None, Held(NOW + 60)))
    assert [reservation.state for reservation in desk.book.live()] == ["held", "queued"]


def test_the_next_deadline_is_the_sooner_one_of_the_hold_and_of_the_oldest_wait() -> None:
    desk = Desk(wait=30.0)
    assert desk.book.next_deadline() is None
    desk.claim(60.0)
    assert desk.book.next_deadline() == NOW + 60
    desk.claim(now=NOW + 1)
    desk.claim(now=NOW + 2)
    assert desk.book.next_deadline() == NOW + 31
    desk.does(desk.book.extend("r1", 5.0, NOW + 2))
    assert desk.book.next_deadline() == NOW + 7


def test_who_asks_for_less_than_a_second_has_the_slot_alone() -> None:
    desk = Desk()
    desk.claim()
    desk.claim(0.5)
    desk.claim()
    assert desk.does(desk.book.release("r1", "explicit", NOW)) == ["r1 released/explicit", "r2 held"]
    assert desk.does(desk.book.due(NOW + 0.5)) == ["r2 expired/duration_elapsed", "r3 held"]


@pytest.mark.parametrize("held", ["r2", None])
@pytest.mark.parametrize("name", ["r1", "nobody"])
def test_ended_and_unknown_reservations_accept_no_event(name: str, held: str | None) -> None:
    desk = Desk()
    desk.claim()
    desk.does(desk.book.release("r1", "explicit", NOW))
    if held is not None:
        desk.claim()
    book = desk.book
    for refused in (
        lambda: book.release(name, "explicit", NOW),
        lambda: book.extend(name, 5.0, NOW),
        lambda: book.renew(name, NOW),
        lambda: book.cancel(name, "client_disconnect", NOW),
        lambda: book.apply(Event(NOW, name, "held", None, Held(NOW + 60))),
        lambda: book.apply(Event(NOW, name, "released", "explicit", Ended())),
    ):
        with pytest.raises(IllegalMove, match=f"reservation {name}"):
            refused()
    assert [(reservation.id, reservation.state) for reservation in book.live()] == ([(held, "held")] if held else [])


def test_a_live_reservation_cannot_be_queued_again() -> None:
    desk = Desk()
    queued, held = desk.book.claim("r", Claim(), NOW)
    for event in (queued, held):
        desk.book.apply(event)
        with pytest.raises(IllegalMove, match="reservation r is queued already"):
            desk.book.apply(queued)
    assert [(reservation.id, reservation.state) for reservation in desk.book.live()] == [("r", "held")]


@pytest.mark.parametrize(
    "word",
    [
        *(Limits(), Claim(), Event(NOW, "r", "held", None, Held(NOW)), Held(NOW), Extended(NOW), Ended()),
        *(SessionTerms(10.0), Queued(kind="request", duration_cap=1.0, give_up_at=NOW)),
    ],
    ids=lambda word: type(word).__name__,
)
def test_what_was_asked_and_what_has_happened_cannot_be_changed(word: Any) -> None:
    for field in word.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(word, field, None)


def test_a_reservation_keeps_all_that_was_asked_for() -> None:
    asked = Claim("session", 10.0, 7, {"job": "a"}, SessionTerms(10.0, "http://10.0.0.1/", {"a": 1}))
    terms = Desk().book.claim("r", asked, NOW)[0].data
    assert terms == Queued("session", 10.0, NOW + 30, 7, {"job": "a"}, asked.session)
