"""A clock that is moved by hand and a journal in memory, to run the service without a machine.

`check_journal` is the contract of every journal: tests run it against this fake and against the real log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nullworker.clock import Anchor
from nullworker.errors import LogUnavailable
from nullworker.fsm.events import Ended, Event, Held, Queued, from_row, to_row
from nullworker.fsm.table import ENDED
from nullworker.service import Journal


class FakeClock:
    """A clock in epoch seconds that moves only with `advance`."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._wall_ahead = 0.0

    def now(self) -> float:
        """The worker's time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the time forward."""
        if seconds < 0:
            raise ValueError("time does not go backwards; to set the wall clock there is step_wall")
        self._now += seconds

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock; the worker's time follows when nothing is held (`settle`)."""
        self._wall_ahead += seconds

    def moved(self) -> Anchor | None:
        """The wall clock, if it was set."""
        return Anchor("fake", self._now + self._wall_ahead) if self._wall_ahead else None

    def follow(self, anchor: Anchor) -> None:
        """Take the wall clock."""
        self._now, self._wall_ahead = anchor.offset, 0.0


class MemoryJournal:
    """A journal in memory. While `failing` is set it cannot be written, as on a full disk."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Event]] = []
        self.failing: str | None = None
        self.anchor: Anchor | None = None

    @property
    def last_seq(self) -> int:
        """The seq of the last event; 0 if there is none."""
        return self.rows[-1][0] if self.rows else 0

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """Append all events or none, encoded and decoded as in a file."""
        self.probe()
        if [seq for seq, _ in events] != list(range(self.last_seq + 1, self.last_seq + 1 + len(events))):
            raise LogUnavailable("each seq must be greater than the last")
        self.rows += [(seq, from_row(to_row(event))) for seq, event in events]

    def take_back(self) -> None:
        """Nothing of what was not written is here."""

    def live(self) -> Iterator[tuple[int, Event]]:
        """The events of live reservations, in order."""
        ended = {event.reservation_id for _, event in self.rows if event.kind in ENDED}
        return iter([row for row in self.rows if row[1].reservation_id not in ended])

    def store_anchor(self, anchor: Anchor) -> None:
        """Store the clock's anchor."""
        self.probe()
        self.anchor = anchor

    def probe(self) -> None:
        """Raise LogUnavailable if the journal cannot be written."""
        if self.failing is not None:
            raise LogUnavailable(self.failing)


def check_journal(make: Callable[[], Journal], reopen: Callable[[Journal], Journal]) -> None:
    """Check the contract of a journal. `make` returns an empty one, `reopen` the same one after a restart.

    Raises:
        AssertionError: the contract is broken.
    """
    journal = make()
    assert journal.last_seq == 0
    assert list(journal.live()) == []

    terms = Queued(kind="request", duration_cap=60.0, give_up_at=130.0, request_idx=7, metadata={"job": "ä"})
    first = [(1, Event(100.0, "a", "queued", None, terms)), (2, Event(100.0, "a", "held", None, Held(160.0)))]
    journal.append(first)
    assert journal.last_seq == 2
    assert list(journal.live()) == first, "what was written is read back, in order"

    waits = (3, Event(101.0, "b", "queued", None, terms))
    journal.append([waits])
    journal.append([(4, Event(102.0, "a", "released", "explicit", Ended({"ok": True})))])
    assert list(journal.live()) == [waits], "what has ended is not live"

    stale = [(4, Event(103.0, "c", "queued", None, terms))]
    try:
        journal.append(stale)
    except LogUnavailable:
        pass
    else:
        raise AssertionError("a seq that was given away is refused")
    half = [(5, Event(103.0, "d", "queued", None, terms)), (5, Event(103.0, "e", "queued", None, terms))]
    try:
        journal.append(half)
    except LogUnavailable:
        pass
    else:
        raise AssertionError("a batch with a wrong seq is refused")
    assert journal.last_seq == 4
    assert list(journal.live()) == [waits], "nothing of a refused batch is there"

    again = reopen(journal)
    assert again.last_seq == 4, "a restart finds everything"
    assert list(again.live()) == [waits]
    again.append([(5, Event(104.0, "b", "cancelled", "worker_restart", Ended()))])
    assert list(again.live()) == []
