"""The commands on this worker's reservations: read the clock, decide, log, apply, tell.

Each command runs these steps in one call without `await`, so no other command can run in between and no lock is
needed. The book decides, the journal makes the events durable, the book applies them, and only then are waiters and
observers called.

While the log cannot be written, new claims are refused. Live reservations can still end: their events are applied at
once, wait in memory in order, and are written as soon as the log accepts them, which is the only case in which an
effect is visible before its commit.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

from msgspec import UNSET, UnsetType

from nullworker.clock import Anchor, WorkerClock, to_ms
from nullworker.errors import LogUnavailable
from nullworker.fsm.attachment import Extends
from nullworker.fsm.book import Book, Claim, Limits, Reservation
from nullworker.fsm.events import Event
from nullworker.fsm.table import ENDED
from nullworker.logs import get_log
from nullworker.readiness import Readiness

log = get_log(__name__)

#: Seconds between two tries of a log that cannot be written.
RETRY_SECONDS: Final = 0.25
#: Seconds that another program's lock may last before the worker is `errored`; VACUUM of 100 MB takes 2.
PATIENCE_SECONDS: Final = 5.0
#: Events that may wait in memory for the log. Above that, a refused claim is not recorded.
MAX_UNWRITTEN = 10_000


class Journal(Protocol):
    """Where events are stored: the log, or a fake with the same contract (nullworker.testing.fakes)."""

    @property
    def last_seq(self) -> int:
        """The seq of the last stored event."""

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """All or none. Raises LogUnavailable; until `take_back`, the events may still be there after a restart."""

    def take_back(self) -> None:
        """What the last append could not write is refused: it must not be there after a restart either."""

    def live(self) -> Iterator[tuple[int, Event]]:
        """The events of live reservations, in order."""

    def store_anchor(self, anchor: Anchor) -> None:
        """Store the clock's anchor. Raises LogUnavailable."""

    def probe(self) -> None:
        """Test whether it can be written. Raises LogUnavailable."""


class Commit(NamedTuple):
    """An applied event, and its reservation after it."""

    seq: int
    event: Event
    reservation: Reservation


Observer = Callable[[Commit], None]


def new_id() -> str:
    """A new reservation id: 16 letters and digits with 80 random bits, since a session's id must not be guessed."""
    return base64.b32encode(os.urandom(10)).decode().lower()


class Service:
    """The reservations of one worker, beginning with those that are live in its journal.

    Attributes:
        book: the live reservations; read it, but change it only through the commands here.
        readiness: whether claims are taken.
        observers: called with every commit, in order; their exceptions are logged and ignored.
        on_deadline: called when `next_deadline` may have moved: by a commit, by a consumer's connection, or because the
            log has failed and is tried again.
        unwritten: commits that are applied but not yet in the log, in order.
    """

    def __init__(
        self,
        journal: Journal,
        clock: WorkerClock,
        limits: Limits,
        readiness: Readiness,
        make_id: Callable[[], str] = new_id,
    ) -> None:
        self.book = Book(limits)
        self.readiness = readiness
        self.observers: list[Observer] = []
        self.on_deadline: list[Callable[[], None]] = []
        self.unwritten: list[Commit] = []
        self._journal = journal
        self._clock = clock
        self._make_id = make_id
        self._watchers: dict[str, list[Observer]] = {}
        self._seq = journal.last_seq
        self._trouble: LogUnavailable | None = None
        self._trouble_since = self._retry_at = 0.0
        for _, event in journal.live():
            self.book.apply(event)

    @property
    def seq(self) -> int:
        """The seq of the last applied event, written or not."""
        return self._seq

    def now(self) -> float:
        """The worker's time in epoch seconds, rounded to the millisecond as it is shown."""
        return to_ms(self._clock.now())

    @property
    def log_is_down(self) -> bool:
        """Whether the last write of the log has failed; the readiness says so a little later, see PATIENCE_SECONDS."""
        return self._trouble is not None

    @property
    def refusal(self) -> str | None:
        """The reason with which a claim is refused now, one of fsm/table.py; None: it is not refused."""
        return self.readiness.refusal or ("log_unavailable" if self.log_is_down else None)

    def find(self, reservation_id: str) -> Reservation | None:
        """A reservation that is live, or whose end is not yet in the log; else None."""
        waiting = (commit.reservation for commit in self.unwritten if commit.event.reservation_id == reservation_id)
        return self.book.get(reservation_id) or next(waiting, None)

    # -- commands ------------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Reservation:
        """A new reservation: held, queued, or ended with the reason why not.

        Raises:
            LogUnavailable: the log cannot be written, and MAX_UNWRITTEN events already wait for it.
        """
        self._try_log()
        self._follow_the_wall_clock()
        now, reservation_id = self.now(), self._make_id()
        if self.refusal is None:
            try:
                return self._commit(self.book.claim(reservation_id, claim, now), must=False)[-1].reservation
            except LogUnavailable:
                pass  # `refusal` now has the cause; the refused claim below is logged when the log is back
        if len(self.unwritten) >= MAX_UNWRITTEN:
            raise LogUnavailable(f"{self._trouble}; {len(self.unwritten)} events wait in memory")
        return self._commit(self.book.claim(reservation_id, claim, now, self.refusal))[-1].reservation

    def release(self, reservation_id: str, *, reason: str = "explicit", result: Any | UnsetType = UNSET) -> Reservation:
        """End the held reservation as released, and hold the next.

        Raises:
            IllegalMove: it is not held.
        """
        return self._commit(self.book.release(reservation_id, reason, self.now(), result))[0].reservation

    def extend(self, reservation_id: str, seconds: float) -> Reservation:
        """Move the deadline of the held reservation to now + seconds, at most the cap from now.

        Raises:
            IllegalMove: it is not held.
            LogUnavailable: it could not be logged; nothing has changed.
        """
        events = self.book.extend(reservation_id, seconds, self.now())
        return self._commit(events, must=False)[0].reservation

    def renew(self, reservation_id: str) -> None:
        """A session's owner is there: it lives for its lifetime from now, but for less than a tenth of it.

        Raises:
            IllegalMove: it is not held, or is not a session.
            LogUnavailable: it could not be logged; nothing has changed.
        """
        self._commit(self.book.renew(reservation_id, self.now()), must=False)

    def attach(self, reservation_id: str, extends: Extends) -> None:
        """A consumer holds its liveness connection to the held reservation from now on, until `detach`.

        Raises:
            IllegalMove: it is not held, or another connection is there.
            LogUnavailable: it could not be logged, so it was not done.
        """
        now = self.now()
        self._commit(self.book.attach(reservation_id, extends, now), must=False)
        self.book.attached(reservation_id, extends, now)
        self._tell_deadline()

    def detach(self, reservation_id: str, *, by_worker: bool = False) -> None:
        """The liveness connection has ended; unless the worker has closed it or stops, the grace begins."""
        if self.book.held is None or self.book.held.id != reservation_id:
            return
        self.book.detached(reservation_id, None if by_worker or self.readiness.draining else self.now())
        self._tell_deadline()

    def listening(self) -> None:
        """The control port answers: from now on consumers are waited for, also for one from before a restart."""
        now = self.now()
        self._commit(self.book.reopen(now))
        self.book.count_from(now)
        self._tell_deadline()

    def cancel(self, reservation_id: str, reason: str) -> None:
        """Cancel a live reservation; does nothing if it has ended."""
        if self.book.get(reservation_id) is not None:
            self._commit(self.book.cancel(reservation_id, reason, self.now()))

    def consumer_unhealthy(self, cause: str, *, cancel_held: bool) -> None:
        """The consumer is unhealthy: cancel the queue, and with `cancel_held` the held reservation."""
        self.readiness.consumer_is_unhealthy(cause)
        self._commit(self.book.cancel_queued("errored", self.now()))
        if cancel_held and self.book.held is not None:
            self.cancel(self.book.held.id, "consumer_unhealthy")

    def drain(self, why: str) -> None:
        """Refuse new claims and cancel the queue; a held reservation stays."""
        self.readiness.drain(why)
        self.book.count_from(None)
        self._commit(self.book.cancel_queued("draining", self.now()))

    def end_drain(self) -> None:
        """The drain time is over: cancel a held request. A session stays held and survives the restart."""
        self._commit(self.book.cancel_requests("draining", self.now()))

    def resume(self) -> None:
        """After a restart: cancel requests, whose connections are gone, and end what has expired."""
        self._commit(self.book.cancel_requests("worker_restart", self.now()))
        self.tick()

    def tick(self) -> None:
        """Apply all deadlines that have passed. Call it at `next_deadline`."""
        self._try_log()
        now = self.now()
        self._give_time(now)
        held = self.book.held
        if held is not None and held.attachment.state == "attached" and (held.ends_at or now) <= now:
            self.probe()  # an end that could not be logged must not come
        self._commit(self.book.due(now, log_is_down=self.log_is_down))

    def probe(self) -> None:
        """Test whether the log can be written; call it regularly, for idle times."""
        if not self.unwritten:
            try:
                self._journal.probe()
            except LogUnavailable as error:
                self._log_failed(error)
            else:
                self._log_works()
                self._hand_on()

    def next_deadline(self) -> float | None:
        """When to call `tick`, in epoch seconds; None while there is no deadline."""
        deadline = self.book.next_deadline(log_is_down=self.log_is_down)
        if not self.log_is_down:
            return deadline
        return self._retry_at if deadline is None else min(deadline, self._retry_at)

    # -- notifications ------------------------------------------------------------------------------------------

    def watch(self, reservation_id: str, watcher: Observer) -> None:
        """Call `watcher` with each commit of one live reservation, until it has ended."""
        self._watchers.setdefault(reservation_id, []).append(watcher)

    def unwatch(self, reservation_id: str, watcher: Observer) -> None:
        """Remove a watcher."""
        watchers = self._watchers.get(reservation_id, [])
        if watcher in watchers:
            watchers.remove(watcher)
        if not watchers:
            self._watchers.pop(reservation_id, None)

    async def ended(self, reservation: Reservation) -> Reservation:
        """Wait for the end of a reservation, and return it."""
        if reservation.state in ENDED:
            return reservation
        future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()

        def watcher(commit: Commit) -> None:
            if commit.reservation.state in ENDED and not future.done():
                future.set_result(commit.reservation)

        self.watch(reservation.id, watcher)
        try:
            return await future
        finally:
            self.unwatch(reservation.id, watcher)

    # -- private -------------------------------------------------------------------------------------------------

    def _give_time(self, now: float) -> None:
        """More time for the consumer that is attached; while it cannot be logged, the hold does not expire."""
        if not self.log_is_down:
            with contextlib.suppress(LogUnavailable):
                self._commit(self.book.give_time(now), must=False)

    def _tell_deadline(self) -> None:
        for listener in self.on_deadline:
            listener()

    def _commit(self, events: list[Event], *, must: bool = True) -> list[Commit]:
        """Log, apply, tell. With `must`, ends that cannot be logged wait in memory; else raise LogUnavailable."""
        numbered = self._store(events, must=must) if events else []
        if not numbered:
            return []
        self._seq += len(numbered)
        commits = [Commit(seq, event, self.book.apply(event)) for seq, event in numbered]
        if self.log_is_down:
            self.unwritten += commits
        for commit in commits:
            for observer in (*self._watchers.get(commit.event.reservation_id, ()), *self.observers):
                try:
                    observer(commit)
                except Exception:
                    log.exception("observer_failed", seq=commit.seq)
            if commit.event.kind in ENDED:
                self._watchers.pop(commit.event.reservation_id, None)
        self._tell_deadline()
        self._hand_on()
        return commits

    def _store(self, events: list[Event], *, must: bool) -> list[tuple[int, Event]]:
        """Write these events. Returns those that are true now, with their seqs: all, or only what must not wait."""
        if not self.unwritten or self._flush(self.now()):
            numbered = list(enumerate(events, self._seq + 1))
            try:
                self._journal.append(numbered)
            except LogUnavailable as error:
                # what becomes true in any case may be found by a restart; behind somebody's lock nothing was begun
                if not (must and _seen_before_its_commit(events) == events) and not error.momentary:
                    self._journal.take_back()
                self._log_failed(error)
            else:
                self._log_works()
                return numbered
        if not must:
            raise LogUnavailable(str(self._trouble))
        return list(enumerate(_seen_before_its_commit(events), self._seq + 1))

    def _try_log(self) -> None:
        """If the log could not be written, find out whether it can be now."""
        if self.log_is_down and self._flush(self.now()):
            self._hand_on()

    def _hand_on(self) -> None:
        """Who waits gets the slot that became free while the log could not be written."""
        if self.book.held is None and self.book.queue and not self.log_is_down:
            self._commit(self.book.due(self.now()))

    def _flush(self, now: float) -> bool:
        """Write the events that wait in memory. Returns whether none waits any more."""
        if now < self._retry_at and self._trouble is not None and not self._trouble.momentary:
            return False  # a lock costs nothing to be asked for again (EventLog waits for it only once)
        try:
            if self.unwritten:
                self._journal.append([(commit.seq, commit.event) for commit in self.unwritten])
            else:
                self._journal.probe()
        except LogUnavailable as error:
            self._log_failed(error)
            return False
        self.unwritten = []
        self._log_works()
        return True

    def _log_failed(self, error: LogUnavailable) -> None:
        now = self.now()
        if self._trouble is None:
            self._trouble_since = now
            log.error(
                "event_log_unavailable", error=str(error), message="no new reservations until it can be written again"
            )
        self._trouble, self._retry_at = error, now + RETRY_SECONDS
        if not error.momentary or now - self._trouble_since >= PATIENCE_SECONDS:
            self.readiness.log_has_failed(str(error))
        self._tell_deadline()

    def _log_works(self) -> None:
        if self._trouble is not None:
            log.warning("event_log_recovered", message="the event log can be written again; no event is missing")
            self._trouble = None
            self.readiness.log_works()

    def _follow_the_wall_clock(self) -> None:
        """If it was set, and nothing is live that was timed by it, neither here nor in what waits for the log."""
        busy = self.book.held is not None or self.book.queue or self.log_is_down
        if busy or (anchor := self._clock.moved()) is None:
            return
        try:
            self._journal.store_anchor(anchor)
        except LogUnavailable as error:
            self._log_failed(error)
            return
        self._clock.follow(anchor)
        log.warning("clock_moved", message="the wall clock was set; the worker follows it now that nothing is held")


def _seen_before_its_commit(events: list[Event]) -> list[Event]:
    """What may become true while the log cannot be written: ends, and claims that are refused. No hold."""
    held = {event.reservation_id for event in events if event.kind == "held"}
    return [event for event in events if event.reservation_id not in held]
