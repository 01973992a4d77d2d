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
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from nullworker.errors import IllegalMove
from nullworker.fsm.attachment import Attachment, Extends
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued, ReservationKind, SessionTerms
from nullworker.fsm.table import ENDED, EventKind, State, step

#: Seconds from now to which the worker extends a hold with an attached consumer, or the cap if that is less. It extends
#: when half of them have passed: one commit in half a minute.
ATTACHED_SECONDS: Final = 60.0
#: Minimum of the seconds within which a consumer must attach again after a restart of the worker.
RESTART_GRACE_SECONDS: Final = 30.0
#: Seconds that a renewal moves a deadline by, at least, or a tenth of the lifetime if that is less.
SMALLEST_RENEWAL_SECONDS: Final = 1.0


class Limits(msgspec.Struct, frozen=True):
    """Limits from the settings: times in seconds, and a length; None: no limit."""

    max_reservation_seconds: float = 3600.0
    max_queue_seconds: float = 30.0
    max_queued: int = 1000
    max_hold_seconds: float | None = None
    consumer_grace_seconds: float = 5.0
    attach_timeout: float | None = None


class Claim(msgspec.Struct, frozen=True):
    """An authenticated request for the slot. `duration` in seconds; None asks for the cap."""

    kind: ReservationKind = "request"
    duration: float | None = None
    request_idx: int | None = None
    metadata: dict[str, Any] | None = None
    session: SessionTerms | None = None
    auth_sha256: str | None = None
    cost: float | None = None


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
    attachment: Attachment = msgspec.field(default_factory=Attachment)


class _End(NamedTuple):
    """What the passing of time alone will do to the held reservation."""

    at: float
    kind: EventKind
    reason: str


def refused_at_once(queued_at: float, held_at: float | None, give_up_at: float) -> bool:
    """Whether a claim that has ended was refused in the commit that made it, so that it never waited."""
    return held_at is None and give_up_at <= queued_at


class Book:
    """The live reservations of one worker."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held: Reservation | None = None
        self._listening_since: float | None = None  # when the control port began to answer
        # In the order of arrival. A dict finds its first key by walking past removed ones, so that with a long queue
        # each promotion would take time in proportion to its length.
        self.queue: OrderedDict[str, Reservation] = OrderedDict()
        self._by_request_idx: dict[int, str] = {}  # the live reservation that the autoscaler knows by it

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

    def next_deadline(self, *, log_is_down: bool = False) -> float | None:
        """When `give_time` or `due` will next return events, in epoch seconds; None while neither will."""
        deadlines = [reservation.terms.give_up_at for reservation in islice(self.queue.values(), 1)]
        if (end := self._next_end(log_is_down)) is not None:
            deadlines.append(end.at)
        held = self.held
        if held is not None and held.attachment.state == "attached" and not log_is_down:
            low_at = self._low_at(held, held.attachment.extends)
            deadlines += [] if low_at is None else [low_at]
        return min(deadlines, default=None)

    # -- commands: decide ----------------------------------------------------------------------------------------

    def claim(self, reservation_id: str, claim: Claim, now: float, refusal: str | None = None) -> list[Event]:
        """A new reservation: held at once, queued, or refused. `refusal`: the reason why every claim is refused now.

        A request_idx that is live here is refused before all else: the autoscaler knows its reservation by that
        number, and must not be told that it was rejected.
        """
        longest = min(self.limits.max_reservation_seconds, self._max_hold)
        cap = longest if claim.duration is None else min(claim.duration, longest)
        end: tuple[EventKind, str] | None = None
        taken = self.held is not None or bool(self.queue)  # some may wait for a free slot while the log is down
        if claim.request_idx in self._by_request_idx:
            end = "expired", "duplicate"
        elif refusal is not None:
            end = "cancelled", refusal
        elif taken and claim.kind == "session":
            end = "expired", "busy"
        elif taken and self.limits.max_queue_seconds == 0:
            end = "expired", "queue_timeout"
        elif taken and len(self.queue) >= self.limits.max_queued:
            end = "expired", "queue_full"
        terms = Queued(
            kind=claim.kind,
            duration_cap=cap,
            give_up_at=now + (self.limits.max_queue_seconds if end is None else 0),
            request_idx=claim.request_idx,
            metadata=claim.metadata,
            session=claim.session,
            auth_sha256=claim.auth_sha256,
            cost=claim.cost,
        )
        events = [Event(now, reservation_id, "queued", None, terms)]
        if end is not None:
            events.append(Event(now, reservation_id, *end, Ended()))
        elif not taken:
            events += _hold(reservation_id, cap, now)
        return events

    def release(self, reservation_id: str, reason: str, now: float, result: Any | UnsetType = UNSET) -> list[Event]:
        """Release the held reservation; the next in the queue is held in the same batch."""
        held = self._held(reservation_id)
        return [_end(held, "released", reason, now, result), *self._promote(now)]

    def extend(self, reservation_id: str, seconds: float, now: float) -> list[Event]:
        """Move the deadline to now + seconds, at most the cap of this worker from now."""
        held = self._held(reservation_id)
        ends_at = self._at_most(held, now + seconds, now)
        return [Event(now, held.id, "extended", "extend", Extended(ends_at))]

    def renew(self, reservation_id: str, now: float) -> list[Event]:
        """Move a session's deadline to its lifetime from now, at most the cap; a later deadline stays.

        One that would hardly move stays too: the official client repeats a ping whose answer was lost without a
        pause, and each would cost a commit.
        """
        held = self._held(reservation_id)
        if held.terms.session is None or held.ends_at is None:
            raise IllegalMove(f"reservation {reservation_id} is not a session")
        lifetime = min(held.terms.session.lifetime, self.limits.max_reservation_seconds)
        ends_at = self._at_most(held, now + lifetime, now)
        if ends_at - held.ends_at < min(SMALLEST_RENEWAL_SECONDS, lifetime / 10):
            return []
        return [Event(now, held.id, "extended", "ping", Extended(ends_at))]

    def cancel(self, reservation_id: str, reason: str, now: float) -> list[Event]:
        """Cancel a live reservation, held or queued."""
        reservation = self.get(reservation_id)
        if reservation is None:
            raise IllegalMove(f"reservation {reservation_id} is not live")
        ended = _end(reservation, "cancelled", reason, now)
        return [ended, *self._promote(now)] if reservation is self.held else [ended]

    def cancel_queued(self, reason: str, now: float) -> list[Event]:
        """Cancel all queued reservations."""
        return [_end(reservation, "cancelled", reason, now) for reservation in self.queue.values()]

    def cancel_requests(self, reason: str, now: float) -> list[Event]:
        """Cancel all request reservations, held or queued; a session stays."""
        requests = [r for r in self.live() if r.terms.kind == "request"]
        return [_end(reservation, "cancelled", reason, now) for reservation in requests]

    def attach(self, reservation_id: str, extends: Extends, now: float) -> list[Event]:
        """A consumer attaches: the first of a session is an event, so that a restart knows of it."""
        held = self._held(reservation_id)
        held.attachment.check("attach")
        if held.attachment.first_at is None and held.terms.session is not None:
            return [self._more_time(held, extends, now) or self._extended(held, held.ends_at or now, now)]
        more = self._more_time(held, extends, now)
        return [] if more is None else [more]

    def give_time(self, now: float) -> list[Event]:
        """Extend the held reservation for its attached consumer, if little time is left."""
        if self.held is None or self.held.attachment.state != "attached":
            return []
        more = self._more_time(self.held, self.held.attachment.extends, now)
        return [] if more is None else [more]

    def reopen(self, now: float) -> list[Event]:
        """The control port answers after a restart: the held session's consumer has time to attach again."""
        held = self.held
        if held is None or held.attachment.state != "restarted" or held.ends_at is None:
            return []
        ends_at = self._at_most(held, now + self._restart_grace, now)
        return [self._extended(held, ends_at, now)] if ends_at > held.ends_at else []

    def due(self, now: float, *, log_is_down: bool = False) -> list[Event]:
        """The events of all deadlines that have passed, in their order: ends of holds and waits, and promotions.

        While the log cannot be written, a hold with an attached consumer does not expire, and no hold begins; when it
        can be again, the oldest who waits is.
        """
        events: list[Event] = []
        waiting = iter(self.queue.values())
        head = next(waiting, None)
        held, end = self.held, self._next_end(log_is_down)
        while True:
            if end is not None and end.at <= now and (head is None or end.at <= head.terms.give_up_at):
                assert held is not None
                events.append(_end(held, end.kind, end.reason, now))
                held, end = None, None
            elif head is not None and head.terms.give_up_at <= now:
                events.append(_end(head, "expired", "queue_timeout", now))
                head = next(waiting, None)
                continue
            elif held is not None or head is None or log_is_down:
                return events
            if head is not None and not log_is_down:
                held, end = head, _End(now + head.terms.duration_cap, "expired", "duration_elapsed")
                events.append(Event(now, head.id, "held", None, Held(end.at)))
                head = next(waiting, None)

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
            if data.request_idx is not None:
                self._by_request_idx.setdefault(data.request_idx, reservation.id)
            return reservation
        live = self.get(event.reservation_id)
        if live is None:
            raise IllegalMove(f"{event.kind} for reservation {event.reservation_id}, which is not live")
        state = step(live.state, event.kind, event.reason)
        if event.kind == "held" and self.held is not None:
            raise IllegalMove(f"reservation {event.reservation_id} cannot be held while {self.held.id} is")
        live.state = state
        if isinstance(data, Held):
            del self.queue[live.id]
            self.held, live.held_at, live.ends_at = live, event.at, data.ends_at
        elif isinstance(data, Extended):
            live.ends_at = data.ends_at
            if event.reason == "attached" and live.attachment.first_at is None:
                live.attachment.first_at = event.at
                live.attachment.state = "restarted"  # `attached` follows in the process that has the connection
        else:
            live.reason, live.ended_at, live.result = event.reason, event.at, data.result
        if state in ENDED:
            if (idx := live.terms.request_idx) is not None and self._by_request_idx.get(idx) == live.id:
                del self._by_request_idx[idx]
            if live is self.held:
                self.held = None
            else:
                del self.queue[live.id]
        return live

    # -- the consumer's connection, which is not in the log ----------------------------------------------------------

    def attached(self, reservation_id: str, extends: Extends, now: float) -> None:
        """The connection that `attach` has allowed is open."""
        attachment = self._held(reservation_id).attachment
        attachment.state, attachment.extends = attachment.check("attach"), extends
        if attachment.first_at is None:
            attachment.first_at = now

    def detached(self, reservation_id: str, now: float | None) -> None:
        """The connection broke at `now`; None: the worker itself has closed it, so no grace runs."""
        attachment = self._held(reservation_id).attachment
        attachment.state = attachment.check("break")
        attachment.lost_at = None if now is None else now + self.limits.consumer_grace_seconds

    def count_from(self, now: float | None) -> None:
        """Consumers are waited for from `now` on, the moment at which the control port answers; None: no more."""
        self._listening_since = now
        if self.held is not None:
            self.held.attachment.lost_at = None if now is None else now + self._restart_grace

    # -- private -------------------------------------------------------------------------------------------------

    @property
    def _max_hold(self) -> float:
        return float("inf") if self.limits.max_hold_seconds is None else self.limits.max_hold_seconds

    @property
    def _attached_seconds(self) -> float:
        return min(ATTACHED_SECONDS, self.limits.max_reservation_seconds)

    @property
    def _restart_grace(self) -> float:
        return max(self.limits.consumer_grace_seconds, RESTART_GRACE_SECONDS)

    def _at_most(self, held: Reservation, ends_at: float, now: float) -> float:
        """A new deadline, within the caps of one extension and of the whole hold."""
        assert held.held_at is not None
        return min(ends_at, now + self.limits.max_reservation_seconds, held.held_at + self._max_hold)

    def _low_at(self, held: Reservation, extends: Extends) -> float | None:
        """When the reservation should be extended for its consumer; None: never."""
        assert held.ends_at is not None
        assert held.held_at is not None
        if extends == "" or (extends == "1" and held.terms.session is None):
            return None
        if held.ends_at >= held.held_at + self._max_hold:
            return None
        return held.ends_at - self._attached_seconds / 2

    def _more_time(self, held: Reservation, extends: Extends, now: float) -> Event | None:
        low_at = self._low_at(held, extends)
        if low_at is None or low_at > now:
            return None
        return self._extended(held, self._at_most(held, now + self._attached_seconds, now), now)

    @staticmethod
    def _extended(held: Reservation, ends_at: float, now: float) -> Event:
        return Event(now, held.id, "extended", "attached", Extended(ends_at))

    def _next_end(self, log_is_down: bool) -> _End | None:
        """How and when the held reservation ends without a command."""
        held = self.held
        if held is None or held.ends_at is None or held.held_at is None:
            return None
        attachment, ends = held.attachment, list[_End]()
        if attachment.state == "attached" and log_is_down:
            return None
        if attachment.state != "restarted":  # there the consumer has its time to attach again, however late it is
            ends.append(_End(held.ends_at, "expired", "duration_elapsed"))
        elif self.limits.max_hold_seconds is not None:
            ends.append(_End(held.held_at + self.limits.max_hold_seconds, "expired", "duration_elapsed"))
        if attachment.state in ("restarted", "broken") and attachment.lost_at is not None:
            ends.append(_End(attachment.lost_at, "cancelled", "consumer_lost"))
        timeout, listening = self.limits.attach_timeout, self._listening_since
        if attachment.state == "awaited" and timeout is not None and listening is not None and not log_is_down:
            ends.append(_End(max(held.held_at, listening) + timeout, "cancelled", "consumer_absent"))
        return min(ends, default=None)

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


def _end(reservation: Reservation, kind: EventKind, reason: str, now: float, result: Any | UnsetType = UNSET) -> Event:
    first_at = reservation.attachment.first_at
    return Event(now, reservation.id, kind, reason, Ended(result, UNSET if first_at is None else first_at))
