"""The live reservations of one worker: at most one held, and a first-come, first-served queue.

Command methods (`claim`, `release`, `due`, ...) only decide: they change nothing, and return the events to log, or
raise. `apply` makes a logged event true, after `table.step` has allowed it; live and replayed history share it.

A reservation that has ended is no longer in the book, only in the log. The command that ends the held reservation
returns the promotion of the next in the queue in the same list, so both are committed together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from nullworker.errors import IllegalMove
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, ReservationKind, SessionTerms
from nullworker.fsm.table import ENDED, EventKind, State, step


class Limits(msgspec.Struct, frozen=True):
    """Limits from the settings: two times in seconds, and a length."""

    max_reservation_seconds: float = 3600.0
    max_queue_seconds: float = 30.0
    max_queued: int = 1000


class Claim(msgspec.Struct, frozen=True):
    """An authenticated request for the slot. `duration` in seconds; None asks for the cap."""

    kind: ReservationKind = "request"
    duration: float | None = None
    request_idx: int | None = None
    metadata: dict[str, Any] | None = None
    session: SessionTerms | None = None


class Reservation(msgspec.Struct):
    """The present state of one claim. Times are epoch seconds. Only the book changes it."""

    id: str
    terms: Queued
    queued_at: float
    state: State = "queued"
    reason: str | None = None
    held_at: float | None = None
    ends_at: float | None = None
    ended_at: float | None = None
    result: Any | UnsetType = UNSET


def refused_at_once(queued_at: float, held_at: float | None, give_up_at: float) -> bool:
    """Whether a claim that has ended was refused in the commit that made it, so that it never waited."""
    return held_at is None and give_up_at <= queued_at


class Book:
    """The live reservations of one worker."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held: Reservation | None = None
        # In the order of arrival. A dict finds its first key by walking past removed ones, so that with a long queue
        # each promotion would take time in proportion to its length.
        self.queue: OrderedDict[str, Reservation] = OrderedDict()

    # -- queries -------------------------------------------------------------------------------------------------

    def get(self, reservation_id: str) -> Reservation | None:
        """The live reservation with that id, or None."""
        if self.held is not None and self.held.id == reservation_id:
            return self.held
        return self.queue.get(reservation_id)

    def live(self) -> Iterator[Reservation]:
        """The held reservation, then the queue, oldest first."""
        if self.held is not None:
            yield self.held
        yield from self.queue.values()

    def next_deadline(self) -> float | None:
        """When `due` will next return events, in epoch seconds; None while nothing is live."""
        deadlines = [reservation.terms.give_up_at for reservation in islice(self.queue.values(), 1)]
        if self.held is not None and self.held.ends_at is not None:
            deadlines.append(self.held.ends_at)
        return min(deadlines, default=None)

    # -- commands: decide ----------------------------------------------------------------------------------------

    def claim(self, reservation_id: str, claim: Claim, now: float, refusal: str | None = None) -> list[Event]:
        """A new reservation: held at once, queued, or refused. `refusal`: the reason why every claim is refused now."""
        longest = self.limits.max_reservation_seconds
        cap = longest if claim.duration is None else min(claim.duration, longest)
        end: tuple[EventKind, str] | None = None
        if refusal is not None:
            end = "cancelled", refusal
        elif self.held is not None and claim.kind == "session":
            end = "expired", "busy"
        elif self.held is not None and self.limits.max_queue_seconds == 0:
            end = "expired", "queue_timeout"
        elif self.held is not None and len(self.queue) >= self.limits.max_queued:
            end = "expired", "queue_full"
        terms = Queued(
            kind=claim.kind,
            duration_cap=cap,
            give_up_at=now + (self.limits.max_queue_seconds if end is None else 0),
            request_idx=claim.request_idx,
            metadata=claim.metadata,
            session=claim.session,
        )
        events = [Event(now, reservation_id, "queued", None, terms)]
        if end is not None:
            events.append(Event(now, reservation_id, *end, Ended()))
        elif self.held is None:
            events += _hold(reservation_id, cap, now)
        return events

    def release(self, reservation_id: str, reason: str, now: float, result: Any | UnsetType = UNSET) -> list[Event]:
        """Release the held reservation; the next in the queue is held in the same batch."""
        held = self._held(reservation_id)
        return [Event(now, held.id, "released", reason, Ended(result)), *self._promote(now)]

    def extend(self, reservation_id: str, seconds: float, now: float) -> list[Event]:
        """Move the deadline to now + seconds, at most the cap of this worker from now."""
        held = self._held(reservation_id)
        ends_at = now + min(seconds, self.limits.max_reservation_seconds)
        return [Event(now, held.id, "extended", "extend", Extended(ends_at))]

    def renew(self, reservation_id: str, now: float) -> list[Event]:
        """Move a session's deadline to its lifetime from now, at most the cap; a later deadline stays."""
        held = self._held(reservation_id)
        if held.terms.session is None or held.ends_at is None:
            raise IllegalMove(f"reservation {reservation_id} is no session")
        ends_at = now + min(held.terms.session.lifetime, self.limits.max_reservation_seconds)
        return [Event(now, held.id, "extended", "ping", Extended(max(ends_at, held.ends_at)))]

    def cancel(self, reservation_id: str, reason: str, now: float) -> list[Event]:
        """Cancel a live reservation, held or queued."""
        reservation = self.get(reservation_id)
        if reservation is None:
            raise IllegalMove(f"reservation {reservation_id} is not live")
        ended = Event(now, reservation.id, "cancelled", reason, Ended())
        return [ended, *self._promote(now)] if reservation is self.held else [ended]

    def cancel_queued(self, reason: str, now: float) -> list[Event]:
        """Cancel all queued reservations."""
        return [Event(now, reservation_id, "cancelled", reason, Ended()) for reservation_id in self.queue]

    def cancel_requests(self, reason: str, now: float) -> list[Event]:
        """Cancel all request reservations, held or queued; a session stays."""
        requests = [r for r in self.live() if r.terms.kind == "request"]
        return [Event(now, reservation.id, "cancelled", reason, Ended()) for reservation in requests]

    def due(self, now: float) -> list[Event]:
        """The events of all deadlines that have passed, in their order: expired holds and waits, and promotions."""
        events: list[Event] = []
        waiting = iter(self.queue.values())
        head = next(waiting, None)
        held, ends_at = (None, None) if self.held is None else (self.held.id, self.held.ends_at)
        while True:
            if ends_at is not None and ends_at <= now and (head is None or ends_at <= head.terms.give_up_at):
                assert held is not None
                events.append(Event(now, held, "expired", "duration_elapsed", Ended()))
                held, ends_at = None, None
                if head is not None:
                    held, ends_at = head.id, now + head.terms.duration_cap
                    events.append(Event(now, held, "held", None, Held(ends_at)))
                    head = next(waiting, None)
            elif head is not None and head.terms.give_up_at <= now:
                events.append(Event(now, head.id, "expired", "queue_timeout", Ended()))
                head = next(waiting, None)
            else:
                return events

    # -- events: apply -------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> Reservation:
        """Apply an event. Returns the changed reservation.

        Raises:
            IllegalMove: the event does not follow from the present state; nothing has changed.
        """
        data = event.data
        if isinstance(data, Queued):
            if self.get(event.reservation_id) is not None:
                raise IllegalMove(f"reservation {event.reservation_id} is queued already")
            reservation = Reservation(event.reservation_id, data, event.at)
            self.queue[reservation.id] = reservation
            return reservation
        known = self.get(event.reservation_id)
        if known is None:
            raise IllegalMove(f"{event.kind} for reservation {event.reservation_id}, which is not live")
        state = step(known.state, event.kind, event.reason)
        if event.kind == "held" and self.held is not None:
            raise IllegalMove(f"reservation {event.reservation_id} cannot be held while {self.held.id} is")
        known.state = state
        if isinstance(data, Held):
            del self.queue[known.id]
            self.held, known.held_at, known.ends_at = known, event.at, data.ends_at
        elif isinstance(data, Extended):
            known.ends_at = data.ends_at
        else:
            known.reason, known.ended_at, known.result = event.reason, event.at, data.result
        if state in ENDED:
            if known is self.held:
                self.held = None
            else:
                del self.queue[known.id]
        return known

    # -- private -------------------------------------------------------------------------------------------------

    def _held(self, reservation_id: str) -> Reservation:
        if self.held is None or self.held.id != reservation_id:
            raise IllegalMove(f"reservation {reservation_id} is not held")
        return self.held

    def _promote(self, now: float) -> list[Event]:
        """Hold the oldest in the queue; one with a cap of 0 s expires at once and the next is held."""
        events: list[Event] = []
        for reservation in self.queue.values():
            events += _hold(reservation.id, reservation.terms.duration_cap, now)
            if reservation.terms.duration_cap > 0:
                break
        return events


def _hold(reservation_id: str, cap: float, now: float) -> list[Event]:
    held = Event(now, reservation_id, "held", None, Held(now + cap))
    return [held] if cap > 0 else [held, Event(now, reservation_id, "expired", "duration_elapsed", Ended())]
