"""Tells a session's owner that it has ended: POST to its on_close_route, whatever ended it.

What is owed is in the log, written with the end itself, so a callback survives a restart and is delivered at least
once; a receiver tells a second delivery by `session_id`. It is tried again with growing pauses, and given up a day
after the end.

What it leaves out: which routes are allowed (http/sessions.py).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Final

import aiohttp
import msgspec
import structlog

from nullworker import history
from nullworker.errors import LogUnavailable
from nullworker.fsm.table import ENDED
from nullworker.log import EventLog
from nullworker.service import Commit, Service

log = structlog.get_logger(__name__)

CALL_SECONDS: Final = 10.0
GIVE_UP_SECONDS: Final = 86_400.0
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 300.0
#: Callbacks under way at once.
AT_ONCE: Final = 8

NAME: Final = "callbacks"


class Callbacks:
    """Delivers what is owed. Add `observe` to the service's observers, then run `run`."""

    def __init__(self, service: Service, event_log: EventLog, count: Callable[[str], None]) -> None:
        self._service = service
        self._log = event_log
        self._count = count
        self._bell = asyncio.Event()
        self._bell.set()
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def observe(self, commit: Commit) -> None:
        """An event was committed."""
        session = commit.reservation.terms.session
        if commit.event.kind in ENDED and session is not None and session.on_close_route is not None:
            self._bell.set()

    async def run(self) -> None:
        """Deliver for as long as the worker lives."""
        seen = 0
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_SECONDS)) as http:
                while True:
                    await self._bell.wait()
                    self._bell.clear()
                    for callback in self._owed(seen):
                        seen = callback.seq
                        task = asyncio.ensure_future(self._deliver(http, callback))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                    if self._service.unwritten:  # an end that waits for the log is owed only when it is written
                        await asyncio.sleep(FIRST_PAUSE_SECONDS)
                        self._bell.set()
        finally:
            for task in self._tasks:
                task.cancel()

    def _owed(self, after: int) -> list[history.Callback]:
        try:
            return history.callbacks(self._log.conn, after=after)
        except sqlite3.Error as error:
            log.error("callbacks_not_read", error=str(error), message="the event log cannot be read")
            return []

    async def _deliver(self, http: aiohttp.ClientSession, callback: history.Callback) -> None:
        pause = FIRST_PAUSE_SECONDS
        session_id = callback.body["session_id"]
        while True:
            async with self._at_once:
                trouble = await self._post(http, callback)
            if trouble is None:
                self._count("delivered")
                self._settle(callback, "delivered", None)
                log.info("callback_delivered", reservation_id=session_id, seq=callback.seq)
                return
            self._count("failed")
            if self._service.now() + pause - callback.ended_at > GIVE_UP_SECONDS:
                self._count("given_up")
                self._settle(callback, "given_up", trouble)
                log.error("callback_given_up", reservation_id=session_id, seq=callback.seq, why=trouble)
                return
            log.warning("callback_failed", reservation_id=session_id, seq=callback.seq, why=trouble, again_in=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _post(self, http: aiohttp.ClientSession, callback: history.Callback) -> str | None:
        headers = {"Content-Type": "application/json"}
        try:
            async with http.post(
                callback.route, data=msgspec.json.encode(callback.body), headers=headers, allow_redirects=False
            ) as answer:
                return None if 200 <= answer.status < 300 else f"it answered {answer.status}"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            return str(error) or type(error).__name__

    def _settle(self, callback: history.Callback, outcome: str, detail: str | None) -> None:
        try:
            self._log.settle(NAME, [callback.seq], self._service.now(), outcome, detail)
        except LogUnavailable as error:
            log.warning(
                "callback_not_settled", seq=callback.seq, error=str(error), message="it is sent again at a restart"
            )
