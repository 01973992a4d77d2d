"""Delivers session callbacks: a POST to a session's on_close_route when it ends, for whatever reason.

A pending callback is in the log, committed together with the end of its session, so it survives a restart and is
delivered at least once; a receiver recognizes a repetition by `session_id`. Retries have backoff, and stop a day after
the end. Route and payload are read from the log for each attempt, and not kept in memory.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nullworker.aio import AutoResetEvent
from nullworker.errors import LogUnavailable
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.fsm.table import ENDED
from nullworker.logs import get_log
from nullworker.service import Commit, Service

log = get_log(__name__)

GIVE_UP_SECONDS: Final = 86_400.0
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 300.0
#: Seconds between two tries to store the outcome of a callback.
SETTLE_SECONDS: Final = 5.0
#: First tries at a time. One that hangs occupies its place for 10 s, and must not delay those of other owners. With the
#: repeats they stay below the 100 connections that aiohttp opens at most.
FIRST_TRIES_AT_ONCE: Final = 90
#: Repeats at a time. They have their own limit, so that failing receivers do not delay the first tries.
REPEATS_AT_ONCE: Final = 8

NAME: Final = "callbacks"


Post = Callable[[str, dict[str, Any]], Awaitable["str | None"]]  # (route, body) -> None, or why it failed


class Callbacks:
    """Delivers pending callbacks. Add `observe` to the service's observers, then run `run`."""

    def __init__(self, service: Service, event_log: EventLog, post: Post, count: Callable[[str], None]) -> None:
        self._service = service
        self._log = event_log
        self._post = post
        self._count = count
        self._wakeup = AutoResetEvent()
        self._wakeup.set()
        self._first_tries = asyncio.Semaphore(FIRST_TRIES_AT_ONCE)
        self._repeats = asyncio.Semaphore(REPEATS_AT_ONCE)
        self._under_way: dict[int, asyncio.Task[None]] = {}

    def observe(self, commit: Commit) -> None:
        """An event was committed."""
        session = commit.reservation.terms.session
        if commit.event.kind in ENDED and session is not None and session.on_close_route is not None:
            self._wakeup.set()

    async def run(self) -> None:
        """Deliver callbacks until cancelled."""
        last_seq = 0
        try:
            while True:
                await self._wakeup.wait()
                owed = self._owed(last_seq)
                for callback in owed or ():
                    last_seq = callback.seq
                    task = asyncio.ensure_future(self._deliver(callback))
                    self._under_way[last_seq] = task
                    task.add_done_callback(functools.partial(self._over, last_seq))
                if owed is None or self._service.unwritten:  # a callback is sent only after the end is in the log
                    await asyncio.sleep(FIRST_PAUSE_SECONDS)
                    self._wakeup.set()
        finally:
            for task in self._under_way.values():
                task.cancel()

    def _over(self, seq: int, _: asyncio.Task[None]) -> None:
        self._under_way.pop(seq, None)

    def _owed(self, after: int) -> list[queries.Callback] | None:
        try:
            return queries.callbacks(self._log.conn, after=after)
        except sqlite3.Error as error:
            log.error("callbacks_not_read", error=str(error), message="the event log cannot be read; trying again")
            return None

    async def _deliver(self, callback: queries.Callback) -> None:
        pause = FIRST_PAUSE_SECONDS
        session_id = callback.session_id
        lane = self._first_tries
        while True:
            async with lane:
                trouble = await self._call(callback.seq)
            if trouble is None:
                self._count("delivered")
                await self._settle(callback, "delivered", None)
                log.info("callback_delivered", reservation_id=session_id, seq=callback.seq)
                return
            self._count("failed")
            if self._service.now() + pause - callback.ended_at > GIVE_UP_SECONDS:
                self._count("given_up")
                await self._settle(callback, "given_up", trouble)
                log.error("callback_given_up", reservation_id=session_id, seq=callback.seq, why=trouble)
                return
            log.warning("callback_failed", reservation_id=session_id, seq=callback.seq, why=trouble, again_in=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            lane = self._repeats

    async def _call(self, seq: int) -> str | None:
        """POST a callback; None when it was accepted, else the reason."""
        try:
            route, body = queries.callback_call(self._log.conn, seq)
        except (sqlite3.Error, KeyError, TypeError, ValueError) as error:  # their messages may quote what was read
            return f"it cannot be read from the event log: {type(error).__name__}"
        return await self._post(route, body)

    async def _settle(self, callback: queries.Callback, outcome: str, detail: str | None) -> None:
        """Store the outcome, with retries; until it is stored, a restart would send the callback again."""
        while True:
            try:
                self._log.settle(NAME, [callback.seq], self._service.now(), outcome, detail)
            except LogUnavailable as error:
                log.warning("callback_not_settled", seq=callback.seq, error=str(error), message="trying again")
                await asyncio.sleep(SETTLE_SECONDS)
            else:
                return
