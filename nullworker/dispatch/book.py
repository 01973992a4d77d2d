"""The open claims of a dispatcher: each change goes to the ledger, then to this book, then to the observers.

While the ledger cannot be written, decisions of this dispatcher (a claim, the use of a grant) are refused and change
nothing. Facts reported by others (a session is held, a consumer has attached, a session has ended) are applied, and
written as soon as the ledger accepts them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

from nullworker.clock import Clock
from nullworker.dispatch.claims import (
    Attached,
    Claim,
    Data,
    Ended,
    Event,
    EventKind,
    Granted,
    Held,
    Pending,
    Priced,
    Refused,
    apply,
)
from nullworker.dispatch.decision import Counts, Open
from nullworker.dispatch.ledger import Credential, Ledger
from nullworker.dispatch.trouble import Trouble
from nullworker.errors import LogUnavailable

#: Bytes that must fit into the ledger before a trouble is over: less than a claim needs may fit on a full disk.
RECOVERY_BYTES: Final = 64 * 1024
#: Called with the claim after an event, and the event.
Observer = Callable[[Claim, Event], None]


class Book:
    """The open claims, by id, in the order in which they were opened.

    Attributes:
        unwritten: events that have happened and are not in the ledger yet.
    """

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self.claims: dict[str, Claim] = ledger.open_claims()
        self.unwritten: list[Event] = []
        self._trouble = Trouble("ledger_unwritable", "no worker is reserved; held sessions stay held")
        self.observers: list[Observer] = []

    @property
    def trouble(self) -> str | None:
        """Why the ledger cannot be written; None when it can."""
        return self._trouble.why

    def in_state(self, state: str) -> list[Claim]:
        """The open claims in a state."""
        return [claim for claim in self.claims.values() if claim.state == state]

    @property
    def open(self) -> Open:
        """The open claims, as the decision needs them."""
        held = tuple(claim.hold for claim in self.in_state("held"))
        return Open(len(self.in_state("pending")), len(self.in_state("granted")), held)

    def claim(self, counts: Counts, *, reclaim: bool = False, metadata: dict[str, Any] | None = None) -> Claim:
        """Open a claim, `pending`. Its id is added to the metadata as `claim`, by which the worker's log can be joined.

        Raises:
            LogUnavailable: no claim was opened.
        """
        claim_id = uuid.uuid4().hex[:16]
        opened = Pending(counts.waiting, counts.in_flight, reclaim, {**(metadata or {}), "claim": claim_id})
        return self._decided(claim_id, "pending", opened)

    def granted(self, claim_id: str, url: str, body: str) -> Claim:
        """The autoscaler has chosen a worker, which is about to be asked with this body.

        Raises:
            LogUnavailable: the worker must not be asked.
        """
        return self._decided(claim_id, "granted", Granted(url), Credential(url, body))

    def refused(self, claim_id: str, why: str, status: int | None = None) -> Claim:
        """The worker has certainly not taken it."""
        return self._happened(claim_id, "refused", Refused(why, status))

    def held(
        self, claim_id: str, session_id: str, lifetime: float, counts: Counts, instance: int | None = None
    ) -> Claim:
        """The worker holds a session for it."""
        return self._happened(claim_id, "held", Held(session_id, lifetime, *counts, instance))

    def priced(self, claim_id: str, price: float, instance: int | None = None) -> Claim:
        """The price of its instance is known: dollars per hour."""
        return self._happened(claim_id, "priced", Priced(price, instance))

    def attached(self, claim_id: str) -> Claim:
        """A consumer has attached."""
        return self._happened(claim_id, "attached", Attached())

    def ended(self, claim_id: str, reason: str, end: Ended = Ended()) -> Claim:  # noqa: B008  # it is frozen
        """The claim has ended."""
        return self._happened(claim_id, "ended", end, reason)

    def write(self) -> None:
        """Write the unwritten events, or check that the ledger can be written.

        Raises:
            LogUnavailable: it cannot.
        """
        with self._said():
            if self.unwritten:
                self._ledger.append(self.unwritten)
                self.unwritten = []
            else:
                self._ledger.probe(RECOVERY_BYTES if self.trouble else 0)

    def _decided(self, claim_id: str, kind: EventKind, data: Data, credential: Credential | None = None) -> Claim:
        event = Event(self._clock.now(), claim_id, kind, data)
        claim = apply(self.claims.get(claim_id), event)
        with self._said():
            self._ledger.append([*self.unwritten, event], {claim_id: credential} if credential else None)
        self.unwritten = []
        return self._apply(claim, event)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except LogUnavailable as error:
            self._trouble.met(str(error))
            raise
        self._trouble.over()

    def _happened(self, claim_id: str, kind: EventKind, data: Data, reason: str | None = None) -> Claim:
        event = Event(self._clock.now(), claim_id, kind, data, reason)
        claim = apply(self.claims.get(claim_id), event)
        self.unwritten.append(event)
        with contextlib.suppress(LogUnavailable):
            self.write()
        return self._apply(claim, event)

    def _apply(self, claim: Claim, event: Event) -> Claim:
        if claim.state == "ended":
            self.claims.pop(claim.id, None)
        else:
            self.claims[claim.id] = claim
        for observer in self.observers:
            observer(claim, event)
        return claim
