"""The book of a dispatcher: what it decides and what it is told, with and without a ledger that can be written."""

from __future__ import annotations

from typing import Any

import pytest
from ledgers import StillClock
from ledgers import opened_ledger as opened_ledger
from ledgers import still_clock as still_clock

from nullworker.dispatch.book import RECOVERY_BYTES, Book
from nullworker.dispatch.claims import Ended, says_failed
from nullworker.dispatch.decision import Counts
from nullworker.dispatch.ledger import Ledger
from nullworker.errors import LogUnavailable


@pytest.fixture
def book(ledger: Ledger, clock: StillClock) -> Book:
    return Book(ledger, clock)


@pytest.mark.parametrize(
    ("result", "failed"),
    [
        (None, False),
        ({"exit_code": 0}, False),
        ({"exit_code": 3}, True),
        ({"exit_code": 0, "runs": 4, "failed": 1}, False),
        ({"error": "no GPU"}, True),
        ({"error": None}, False),
        ("error", False),
    ],
)
def test_a_result_that_says_failed(result: Any, failed: bool) -> None:
    assert says_failed(result) is failed


def test_what_the_decision_is_told_of_an_end(book: Book) -> None:
    claim = book.claim(Counts(4, 0), reclaim=True)
    book.granted(claim.id, "http://w", "{}")
    book.held(claim.id, "s1", 300.0, Counts(5, 1))
    final = {"state": "released", "result": {"exit_code": 0, "runs": 2, "failed": 0}}
    over = book.ended(claim.id, "consumer_exit", Ended(final)).ended_hold
    assert over is not None
    assert (over.failed, over.worked, over.hold.before, over.hold.reclaim) == (False, True, Counts(5, 1), True)
    claim = book.claim(Counts(4, 0))
    assert book.ended(claim.id, "not_needed").ended_hold is None


@pytest.mark.parametrize(
    ("final", "failed", "worked"),
    [
        (None, True, False),
        ({"state": "released", "result": None}, False, False),
        ({"state": "released", "result": {"exit_code": 1}}, True, False),
        ({"state": "cancelled", "result": {"exit_code": 0, "runs": 3}}, True, True),
        ({"state": "released", "result": {"runs": 0}}, False, False),
        ({"state": "released", "result": {"runs": "3"}}, False, False),
        ({"state": "released", "result": "runs"}, False, False),
    ],
)
def test_an_end_has_failed_or_worked(book: Book, final: dict[str, Any] | None, failed: bool, worked: bool) -> None:
    claim = book.claim(Counts(4, 0))
    book.granted(claim.id, "http://w", "{}")
    assert book.held(claim.id, "s1", 300.0, Counts(5, 1)).ended_hold is None
    over = book.ended(claim.id, "consumer_exit", Ended(final)).ended_hold
    assert over is not None
    assert (over.failed, over.worked) == (failed, worked)


def test_a_claim_was_held_for_as_long_as_its_worker_says_or_as_the_ledger_saw(book: Book, clock: StillClock) -> None:
    told, seen = (book.claim(Counts(2, 0)) for _ in range(2))
    for each in (told, seen):
        book.granted(each.id, "http://w", "{}")
        assert book.held(each.id, "s" + each.id, 300.0, Counts(1, 1)).held_seconds is None
    clock.time += 7
    assert book.ended(told.id, "consumer_exit", Ended(held_seconds=5.5)).held_seconds == 5.5
    assert book.ended(seen.id, "consumer_exit").held_seconds == 7.0
    never, lost = (book.claim(Counts(2, 0)) for _ in range(2))
    assert book.ended(never.id, "not_needed").held_seconds is None
    book.granted(lost.id, "http://w", "{}")
    assert book.ended(lost.id, "lost", Ended(held_seconds=300.0)).held_seconds == 300.0


def test_what_was_not_written_is_written_once_with_the_next_decision_and_a_full_disk_needs_room_to_be_well(
    book: Book, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(ledger, "probe", sizes.append)
    first = book.claim(Counts(2, 0))
    hidden = ledger.path.with_suffix(".hidden")
    ledger.path.rename(hidden)
    book.ended(first.id, "not_needed")
    with pytest.raises(LogUnavailable):
        book.claim(Counts(1, 0))
    hidden.rename(ledger.path)
    book.claim(Counts(1, 0))
    assert (book.unwritten, book.trouble) == ([], None)
    book.claim(Counts(1, 0))
    assert ledger._conn.execute("SELECT count(*) FROM events").fetchone() == (4,)
    book.write()
    book._trouble.met("the disk is full")
    book.write()
    assert sizes == [0, RECOVERY_BYTES]


def test_what_is_decided_is_refused_without_a_ledger_and_what_has_happened_is_kept(book: Book, ledger: Ledger) -> None:
    held, granted, pending = (book.claim(Counts(3, 0)) for _ in range(3))
    for each in (held, granted):
        book.granted(each.id, "http://w", "{}")
    book.held(held.id, "s1", 300.0, Counts(2, 1))
    hidden = ledger.path.with_suffix(".hidden")
    ledger.path.rename(hidden)
    with pytest.raises(LogUnavailable):
        book.claim(Counts(3, 0))
    with pytest.raises(LogUnavailable):
        book.granted(pending.id, "http://w", "{}")
    book.attached(held.id)
    book.held(granted.id, "s2", 300.0, Counts(1, 2))
    book.ended(held.id, "consumer_exit")
    assert (len(book.unwritten), book.trouble is None) == (3, False)
    assert {claim.id: claim.state for claim in book.claims.values()} == {granted.id: "held", pending.id: "pending"}
    with pytest.raises(LogUnavailable):
        book.write()
    hidden.rename(ledger.path)
    book.write()
    assert (book.unwritten, book.trouble) == ([], None)
    assert ledger.open_claims() == book.claims


def test_a_full_disk_is_said_and_survived(book: Book, ledger: Ledger) -> None:
    claim = book.claim(Counts(3, 0))
    book.granted(claim.id, "http://w", "{}")
    pages = ledger._conn.execute("PRAGMA page_count").fetchone()[0]
    ledger._conn.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LogUnavailable, match="full"):
        book.claim(Counts(3, 0), metadata={"padding": "x" * 400_000})
    book.held(claim.id, "s1", 300.0, Counts(2, 1))
    assert book.claims[claim.id].state == "held"
    ledger._conn.execute("PRAGMA max_page_count = 100000")
    book.write()
    assert ledger.open_claims() == book.claims


def test_observers_hear_of_each_event_once_it_is_written(book: Book, ledger: Ledger) -> None:
    heard: list[tuple[str, int]] = []
    book.observers.append(lambda claim, event: heard.append((event.kind, len(ledger.open_claims()))))
    claim = book.claim(Counts(3, 0), metadata={"job": "7"})
    assert claim.opened.metadata == {"job": "7", "claim": claim.id}
    book.ended(claim.id, "not_needed")
    assert heard == [("pending", 1), ("ended", 0)]
