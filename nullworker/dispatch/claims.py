"""A claim on a worker as an explicit state machine: states, events and edges as data, and the fold over events.

```mermaid
stateDiagram-v2
    [*] --> pending
    pending --> granted: granted
    granted --> pending: refused
    granted --> held: held
    held --> held: priced, attached
    pending --> ended: ended
    granted --> ended: ended
    held --> ended: ended
    ended --> [*]
```

An event is in the ledger before its effect: `pending` before the autoscaler is asked, `granted` before the worker is
asked. Events reported by others are written when they are received. Times are epoch seconds and are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec

from nullworker.dispatch.decision import Counts, EndedHold, Hold
from nullworker.errors import IllegalMove, LogDamaged

State = Literal["pending", "granted", "held", "ended"]
EventKind = Literal["pending", "granted", "refused", "held", "priced", "attached", "ended"]


class Edge(NamedTuple):
    """A transition. `source` None: the claim does not exist yet."""

    source: State | None
    event: EventKind
    target: State


EDGES: Final = (
    Edge(None, "pending", "pending"),
    Edge("pending", "granted", "granted"),
    Edge("granted", "refused", "pending"),  # the worker has certainly not taken it: another one is asked for
    Edge("granted", "held", "held"),
    Edge("held", "priced", "held"),  # the price of its instance is known
    Edge("held", "attached", "held"),  # a consumer works there: its job must not be interrupted
    Edge("pending", "ended", "ended"),
    Edge("granted", "ended", "ended"),
    Edge("held", "ended", "ended"),
)
_AFTER: Final = {(edge.source, edge.event): edge.target for edge in EDGES}

#: Ends that the dispatcher decides on; all others are the worker's own reasons.
OWN_REASONS: Final = (
    "not_needed",  # fewer jobs are waiting; it had reached no worker
    "dispatcher_restart",  # the dispatcher was stopped before a worker was asked
    "refused",  # the worker that was asked before a restart of the dispatcher did not take it
    "lost",  # the worker was silent for a lifetime, and no consumer had attached
    "gone",  # the worker was silent, and Vast lists it no more, or as stopped
    "silent",  # the worker was silent for a day
    "limit",  # a spending limit was reached; of held claims, with --at-limit end
    "end_all",  # --end-all
)


class Pending(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `pending`: the claim waits for a worker."""

    waiting: int
    in_flight: int | None = None
    reclaim: bool = False
    metadata: dict[str, Any] | None = None


class Granted(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `granted`: the autoscaler has chosen a worker. The grant itself is in the ledger's credentials."""

    url: str  # of the worker


class Refused(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `refused`: the worker did not take it."""

    why: str
    status: int | None = None


class Held(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `held`: the worker holds a session. The queue's numbers are those of the last poll before."""

    session_id: str
    lifetime: float  # seconds, as the worker has capped it
    waiting: int
    in_flight: int | None = None
    instance: int | None = None  # from the worker's answer


class Priced(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `priced`: the price of the worker's instance is known."""

    price: float  # dollars per hour
    instance: int | None = None


class Attached(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `attached`: a consumer has attached."""


class Ended(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `ended`: the claim has ended."""

    final: dict[str, Any] | None = None  # the reservation's final status, from the worker
    held_seconds: float | None = None  # by the worker's clock; an upper bound if it could not be asked
    why: str | None = None


Data = Pending | Granted | Refused | Held | Priced | Attached | Ended

DATA_OF: Final[dict[EventKind, type[Data]]] = {
    "pending": Pending,
    "granted": Granted,
    "refused": Refused,
    "held": Held,
    "priced": Priced,
    "attached": Attached,
    "ended": Ended,
}


class Event(msgspec.Struct, frozen=True):
    """One event of one claim."""

    at: float  # epoch seconds
    claim_id: str
    kind: EventKind
    data: Data
    reason: str | None = None  # of an end


class Claim(msgspec.Struct, frozen=True):
    """The state of one claim, folded from its events."""

    id: str
    state: State
    opened_at: float
    opened: Pending
    url: str | None = None
    granted_at: float | None = None
    held: Held | None = None
    held_at: float | None = None
    attached_at: float | None = None
    price: float | None = None  # dollars per hour
    instance: int | None = None
    ended_at: float | None = None
    reason: str | None = None
    end: Ended | None = None

    @property
    def hold(self) -> Hold:
        """The hold, as the decision needs it. Only for a claim that is or was held."""
        assert self.held is not None
        assert self.held_at is not None
        before = Counts(self.held.waiting, self.held.in_flight)
        return Hold(self.id, self.opened_at, self.held_at, before, self.opened.reclaim)

    @property
    def held_seconds(self) -> float | None:
        """By the worker's clock if it is known; None if the claim was never held, or has not ended.

        Of a `lost` one that may have been held, it is the lifetime.
        """
        if self.ended_at is None or self.end is None:
            return None
        reported = self.end.held_seconds
        if reported is None and self.held_at is not None:
            return max(0.0, self.ended_at - self.held_at)
        return reported

    @property
    def ended_hold(self) -> EndedHold | None:
        """The ended hold, as the decision needs it; None if the claim was never held, or has not ended."""
        if self.held_at is None or self.ended_at is None or self.end is None:
            return None
        final = self.end.final or {}
        result = final.get("result")
        failed = final.get("state") != "released" or says_failed(result)
        worked = isinstance(result, dict) and isinstance(result.get("runs"), int) and result["runs"] > 0
        return EndedHold(self.hold, self.ended_at, failed, worked)


def says_failed(result: Any) -> bool:
    """Whether a consumer's result is a failure: it has an `exit_code` other than 0, or an `error`."""
    return isinstance(result, dict) and (result.get("exit_code", 0) != 0 or bool(result.get("error")))


def step(state: State | None, event: EventKind) -> State:
    """The state after an event.

    Raises:
        IllegalMove: there is no such edge.
    """
    after = _AFTER.get((state, event))
    if after is None:
        allowed = ", ".join(edge.event for edge in EDGES if edge.source == state) or "nothing"
        raise IllegalMove(f"{event} is not allowed in state {state}; allowed: {allowed}")
    return after


def apply(claim: Claim | None, event: Event) -> Claim:
    """The claim after an event; None: there was none.

    Raises:
        IllegalMove: there is no such edge.
    """
    state = step(None if claim is None else claim.state, event.kind)
    data = event.data
    if claim is None:
        assert isinstance(data, Pending)
        return Claim(event.claim_id, state, event.at, data)
    changes: dict[str, Any] = {"state": state}
    match data:
        case Granted():
            changes.update(url=data.url, granted_at=event.at)
        case Refused():
            changes.update(url=None, granted_at=None)
        case Held():
            changes.update(held=data, held_at=event.at, instance=data.instance)
        case Priced():
            changes.update(price=data.price, instance=data.instance or claim.instance)
        case Attached():
            changes.update(attached_at=claim.attached_at or event.at)
        case Ended():
            changes.update(end=data, ended_at=event.at, reason=event.reason)
    return msgspec.structs.replace(claim, **changes)


def replay(events: Mapping[str, list[Event]]) -> dict[str, Claim]:
    """The claims, folded from events that are grouped by claim and in order.

    Raises:
        LogDamaged: they are not those of a claim.
    """
    claims = {}
    for claim_id, of_claim in events.items():
        claim: Claim | None = None
        try:
            for event in of_claim:
                claim = apply(claim, event)
        except IllegalMove as error:
            raise LogDamaged(f"the events of claim {claim_id} are out of order: {error}") from error
        assert claim is not None
        claims[claim_id] = claim
    return claims


_encoder = msgspec.json.Encoder()
_decoders: Final = {kind: msgspec.json.Decoder(data) for kind, data in DATA_OF.items()}

#: The columns of the table `events` after `seq`.
Row = tuple[float, str, str, "str | None", str]


def to_row(event: Event) -> Row:
    """The event as it is stored."""
    return (event.at, event.claim_id, event.kind, event.reason, _encoder.encode(event.data).decode())


def from_row(row: Row) -> Event:
    """The event that was stored.

    Raises:
        LogDamaged: the row is no event of a ledger.
    """
    at, claim_id, kind, reason, data = row
    try:
        decoder = _decoders[kind]  # type: ignore[index]  # an unknown kind is the KeyError below
        return Event(float(at), str(claim_id), kind, decoder.decode(data), reason)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise LogDamaged(f"an event of kind {kind!r} for claim {claim_id!r} cannot be read: {error}") from error
