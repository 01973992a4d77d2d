"""Reports the load of this worker and the outcome of each request to the autoscaler.

Figures are counted as events are committed; after a start they are rebuilt from the log, from a cursor on. Outcomes are
the end events after a second cursor. A cursor moves only when the autoscaler has accepted the message, so everything
is delivered at least once and in order, also after a restart or a long outage, and the backlog uses no memory.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nullworker import aio
from nullworker.aio import AutoResetEvent, Backoff
from nullworker.autoscaler.connection import CALL_SECONDS, AutoscalerClient, Delivery
from nullworker.autoscaler.messages import (
    OUTCOMES_PATH,
    STATUS_PATH,
    HeldTime,
    Identity,
    Load,
    delete_requests,
    outcome_of,
    worker_status,
    workload,
)
from nullworker.errors import LogUnavailable
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.fsm.book import refused_at_once
from nullworker.fsm.table import ENDED
from nullworker.logs import get_log
from nullworker.service import Commit, Service

log = get_log(__name__)

#: Seconds between two reports after a change, and without one (vastai 1.9.1, server/lib/metrics.py).
CHANGED_SECONDS, IDLE_SECONDS = 1.0, 10.0
#: Outcomes in one call.
BATCH = 200

STATUS, OUTCOMES = "worker_status", "delete_requests"  # names of the cursors and of the calls in the metrics

Count = Callable[[str, str], None]  # call, result


class Reporter:
    """Reports on one worker. Add `observe` to the service's observers and `changed` to the readiness's listeners.

    `report_held`: cur_perf is max_perf for each second in which something was held, in place of the load served.

    Attributes:
        backlog: outcomes that the autoscaler has not acknowledged.
    """

    def __init__(
        self,
        identity: Identity,
        service: Service,
        event_log: EventLog,
        autoscaler: AutoscalerClient,
        count: Count,
        *,
        report_held: bool = False,
    ) -> None:
        self._identity = identity
        self._service = service
        self._log = event_log
        self._autoscaler = autoscaler
        self._count = count
        self._load = Load()
        held = service.book.held
        # which seconds before this start have been reported is not known
        self._held_time = HeldTime(None if held is None else service.now()) if report_held else None
        self._received = 0
        self._started_at = service.now()
        self._loaded_after: float | None = None
        self._disk_gb = self._disk_reported_gb = _disk_gb()
        self._batch_size = BATCH  # smaller while a refused outcome is looked for
        self._one_status, self._one_batch = asyncio.Lock(), asyncio.Lock()  # one call at a time, to keep the order
        self._changed = AutoResetEvent()
        self._urgent = AutoResetEvent()
        self._ended = AutoResetEvent()
        since = event_log.cursor(STATUS)
        self._load.received = queries.begun_load(event_log.conn, after=since, load=identity.perf)
        for batch in self._finished_since(since):
            for end in batch:
                self._load.ended(end.outcome, workload(end.cost, identity.perf), at_once=end.refused_at_once)
        self._cursor = event_log.cursor(OUTCOMES)
        self.backlog = queries.count_finished(event_log.conn, after=self._cursor)
        if self.backlog:
            self._ended.set()

    def observe(self, commit: Commit) -> None:
        """An event was committed."""
        reservation = commit.reservation
        load = workload(reservation.terms.cost, self._identity.perf)
        if commit.event.kind == "queued":
            self._load.begun(load)
            self._received += 1
        elif commit.event.kind == "held":
            if self._held_time is not None:
                self._held_time.held(commit.event.at)
        elif commit.event.kind in ENDED:
            if self._held_time is not None and reservation.held_at is not None:
                self._held_time.ended(commit.event.at)
            at_once = refused_at_once(reservation.queued_at, reservation.held_at, reservation.terms.give_up_at)
            outcome = outcome_of(reservation)
            self._load.ended(outcome, load, at_once=at_once)
            if outcome is None:
                self._received -= 1
            self.backlog += 1
            self._ended.set()
        self._changed.set()

    def changed(self) -> None:
        """The readiness has changed; when the worker becomes ready, that is reported at once."""
        self._changed.set()
        if self._loaded_after is None and self._service.readiness.loaded:
            self._urgent.set()

    async def run(self) -> None:
        """Send reports until cancelled."""
        await asyncio.gather(self._report_status(), self._report_outcomes())

    async def flush(self, seconds: float) -> None:
        """Send the last outcomes and then the last status, within `seconds`.

        Call it while `run` is running: it waits for a call that is under way, which would otherwise be sent twice.
        """
        try:
            await aio.wait_for(self._flush(), seconds)
        except asyncio.TimeoutError:
            log.warning("last_reports_unsent", owed=self.backlog, message="they stay in the log for the next start")

    # -- worker_status -------------------------------------------------------------------------------------------

    async def _report_status(self) -> None:
        backoff = Backoff()
        while True:
            self._changed.clear()
            self._urgent.clear()
            if await self._send_status(CALL_SECONDS) == "ok":
                backoff.worked()
                await self._urgent.wait(CHANGED_SECONDS)
                if self._held_time is None or self._service.book.held is None:
                    await self._changed.wait(IDLE_SECONDS - CHANGED_SECONDS)
            else:
                await asyncio.sleep(backoff.failed())

    async def _send_status(self, seconds: float) -> Delivery:
        async with self._one_status:
            return await self._send_status_now(seconds)

    async def _send_status_now(self, seconds: float) -> Delivery:
        readiness, sent, seq = self._service.readiness, self._load.copy(), self._service.seq
        if self._loaded_after is None and readiness.loaded:
            self._loaded_after = self._service.now() - self._started_at
        self._disk_gb = _disk_gb()
        held_seconds = 0.0 if self._held_time is None else self._held_time.total(self._service.now())
        served = sent.served
        if self._held_time is not None:
            served = self._held_time.undelivered(held_seconds) * self._identity.perf
        body = worker_status(
            self._identity,
            load=sent,
            served=served,
            live=self._service.book.live(),
            requests_received=self._received,
            load_seconds=self._loaded_after,
            error_msg=readiness.error_msg,
            disk_gb=self._disk_gb,
            disk_added_gb=self._disk_gb - self._disk_reported_gb,
        )
        delivery = await self._autoscaler.post(STATUS_PATH, body, seconds=seconds)
        self._count(STATUS, delivery)
        if delivery == "ok":
            self._load.set_back(sent)
            if self._held_time is not None:
                self._held_time.delivered(held_seconds)
            self._disk_reported_gb = self._disk_gb
            self._move(STATUS, seq)
        else:
            log.warning("report_not_delivered", call=STATUS, why=self._autoscaler.trouble, message="it is sent again")
        return delivery

    # -- delete_requests -----------------------------------------------------------------------------------------

    async def _report_outcomes(self) -> None:
        backoff = Backoff()
        while True:
            await self._ended.wait()
            owed = True
            while owed:
                delivery, owed = await self._send_outcomes(CALL_SECONDS)
                if delivery == "failed":
                    await asyncio.sleep(backoff.failed())
                    continue
                backoff.worked()
            if self._service.unwritten:  # an outcome is sent only after its event is in the log
                self._ended.set()
            await asyncio.sleep(CHANGED_SECONDS)

    async def _send_outcomes(self, seconds: float) -> tuple[Delivery, bool]:
        """Send a batch. Returns its delivery, and whether more outcomes are to be sent.

        A batch that is refused is halved until the refused outcome is found; after it the batches grow again.
        """
        async with self._one_batch:
            return await self._send_outcomes_now(seconds)

    async def _send_outcomes_now(self, seconds: float) -> tuple[Delivery, bool]:
        size = self._batch_size
        try:
            batch = queries.finished(self._log.conn, after=self._cursor, limit=size)
        except sqlite3.Error as error:
            log.error("outcomes_not_read", error=str(error), message="the event log cannot be read; trying again")
            return "failed", True
        if not batch:
            return "ok", False
        last = batch[-1].seq
        outcomes = [end for end in batch if end.request_idx is not None and end.outcome is not None]
        delivery: Delivery = "ok"
        if outcomes:
            delivery = await self._autoscaler.post(
                OUTCOMES_PATH, delete_requests(self._identity, outcomes), seconds=seconds
            )
            self._count(OUTCOMES, delivery)
        if delivery == "failed":
            log.warning("report_not_delivered", call=OUTCOMES, why=self._autoscaler.trouble, owed=self.backlog)
            return delivery, True
        if delivery == "refused":
            if len(outcomes) > 1:
                self._batch_size = len(batch) // 2
                return delivery, True
            if not self._set_aside(outcomes[0].seq):
                return "failed", True
        self._batch_size = min(size * 2, BATCH)
        self._cursor = last
        self.backlog = max(self.backlog - len(batch), 0)
        self._move(OUTCOMES, last)
        return delivery, len(batch) == size  # a full batch: there may be more

    def _set_aside(self, seq: int) -> bool:
        """Store an outcome that is refused for good, for people; False: it was not stored and is sent again."""
        try:
            self._log.settle(OUTCOMES, [seq], self._service.now(), "refused", self._autoscaler.trouble)
        except LogUnavailable:
            return False
        log.error(
            "outcome_refused",
            seq=seq,
            why=self._autoscaler.trouble,
            message="the autoscaler refuses this outcome for good; it is kept in the table `settled` and skipped",
        )
        return True

    def _move(self, name: str, seq: int) -> None:
        with _best_effort():
            if seq > self._log.cursor(name):
                self._log.move_cursor(name, seq)

    async def _flush(self) -> None:
        # the usual timeout: a call that ended together with the time limit could swallow its cancellation
        told = -1
        while told < self._service.seq:  # the deadline of a session that stays held may pass meanwhile
            told, owed = self._service.seq, True
            while owed:
                delivery, owed = await self._send_outcomes(CALL_SECONDS)
                if delivery == "failed":
                    break
            await self._send_status(CALL_SECONDS)

    def _finished_since(self, seq: int) -> Iterator[list[queries.Finished]]:
        while batch := queries.finished(self._log.conn, after=seq, limit=1000):
            yield batch
            seq = batch[-1].seq


@contextmanager
def _best_effort() -> Iterator[None]:
    """Ignore that a cursor cannot be moved: its events are then sent again after a restart."""
    try:
        yield
    except (LogUnavailable, sqlite3.Error) as error:
        log.warning("cursor_not_moved", error=str(error), message="delivered messages are sent again after a restart")


def _disk_gb() -> float:
    """The space used on `/`, in GiB, as the SDK's worker measures it."""
    return shutil.disk_usage("/").used / 2**30
