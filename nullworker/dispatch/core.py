"""One step of the dispatcher, without network: the queue's numbers in, claims opened and given up in the ledger.

The simulation drives it. Claims are counted as of the moment when the read of the queue began: call `snapshot` before
the read, and pass it to `step` after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from nullworker.clock import Clock
from nullworker.dispatch.book import Book
from nullworker.dispatch.claims import Claim, Ended, Event
from nullworker.dispatch.decision import (
    LONGEST_PAUSE_SECONDS,
    NOTHING,
    Counts,
    Decision,
    EndedHold,
    Open,
    Policy,
    decide,
    seen_in_queue,
)
from nullworker.dispatch.ledger import Ledger
from nullworker.dispatch.limits import DAY_SECONDS, Limits, Room, room
from nullworker.errors import LogUnavailable


class Step(NamedTuple):
    """The result of one poll of the queue."""

    decision: Decision
    room: Room
    opened: tuple[Claim, ...]
    given_up: tuple[Claim, ...]
    trouble: str | None  # why fewer were opened than decided: the ledger cannot be written


class Core:
    """Decides, and keeps the inputs of decisions: open claims, ended holds, and the memory of the last decision."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        policy: Policy,
        *,
        limits: Limits = Limits(),  # noqa: B008  # it is frozen
        lifetime: float = 300.0,
        metadata: dict[str, Any] | None = None,
        price: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.book = Book(ledger, clock)
        self.policy = policy
        self.memory = NOTHING
        self.counts = Counts(0)  # of the last poll
        self._ledger = ledger
        self._clock = clock
        self._limits = limits
        self._lifetime = lifetime
        self._metadata = metadata
        self._price = price
        self._ended = self._ended_before(clock.now())
        self.book.observers.append(self._observe)

    def snapshot(self) -> Open:
        """The claims that are open now; to be called before the queue is read."""
        return self.book.open

    def clock_was_set(self, seconds: float) -> None:
        """The clock was set forward by `seconds`, or back; this happens only while no claim is open."""
        self.memory = self.memory.shifted(seconds)
        self._ended = [over.shifted(seconds) for over in self._ended]

    def room(self) -> Room:
        """The room that the limits leave."""
        now = self._clock.now()
        open_ = self.book.open
        holds = self._ledger.held_time(now - DAY_SECONDS)
        return room(
            now, holds, open_.pending + open_.granted, self._limits, lifetime=self._lifetime, price=self._price()
        )

    def step(self, counts: Counts, open_: Open) -> Step:
        """Decide, open claims and give claims up."""
        now = self._clock.now()
        decision = decide(now, counts, open_, self._ended, self.memory, policy=self.policy)
        self.memory, self._ended, self.counts = decision.memory, [], counts
        left = self.room()
        gives_up = len(self.book.in_state("pending")) if left.over else decision.gives_up
        # The newest first: the others have waited for longer, and are closer to a worker.
        candidates = self.book.in_state("pending")[::-1][:gives_up]
        given_up = [self.book.ended(claim.id, "limit" if left.over else "not_needed", Ended()) for claim in candidates]
        opened: list[Claim] = []
        trouble = None
        opens = decision.opens if left.opens is None else min(decision.opens, left.opens)
        try:
            for number in range(opens):
                reclaim = decision.reclaim and number == 0
                opened.append(self.book.claim(counts, reclaim=reclaim, metadata=self._metadata))
        except LogUnavailable as error:
            trouble = str(error)
        return Step(decision, left, tuple(opened), tuple(given_up), trouble)

    def _observe(self, claim: Claim, event: Event) -> None:
        if event.kind == "ended" and (over := claim.ended_hold) is not None:
            self._ended.append(over)

    def _ended_before(self, now: float) -> list[EndedHold]:
        """The holds whose pause may still last, so that a restart does not forget them.

        The queue's numbers of that time are known only from claims that were held later. An end in the future is one
        from before the clock was set back.
        """
        recent = self._ledger.ended_since(now - 2 * LONGEST_PAUSE_SECONDS)
        looks = [claim.hold for claim in (*recent, *self.book.claims.values()) if claim.held is not None]
        useless: list[EndedHold] = []
        for claim in recent:
            if (over := claim.ended_hold) is None:
                continue
            later = [look.before for look in looks if look.held_at > over.hold.held_at]
            if over.failed or not (over.worked or any(seen_in_queue(over.hold, counts) for counts in later)):
                useless.append(over)
            else:
                useless.clear()
        ahead = max(0.0, max((over.ended_at for over in useless), default=now) - now)
        return [over.shifted(-ahead) for over in useless]
