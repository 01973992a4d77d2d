"""`nullworker work -- CMD ...`: runs one command for each reservation, as a consumer in any language.

CMD is started when a reservation is held, and its exit releases the reservation, with the exit code as the result.
When the reservation ends first, the process group of CMD gets SIGTERM, and SIGKILL after --kill-after. No process of
CMD runs when the next reservation is taken, and no reservation stays held without a running command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit

from nullworker.aio import Backoff, on_signals
from nullworker.clock import stopwatch
from nullworker.consumer.health import health_endpoint
from nullworker.consumer.reservations import Reservation, reservations
from nullworker.errors import CannotStart
from nullworker.logs import get_log
from nullworker.processes import OrphanGuard, ProcessGroup

log = get_log(__name__)

#: A command that fails within this many seconds has done no work.
AT_ONCE_SECONDS = 2.0
#: Immediate failures in a row that cause no pause; from the next one on there is a pause before the next reservation.
PATIENT_FAILURES = 2
#: Seconds of the first pause, which doubles, and of the longest.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
#: With --until: immediate failures in a row, or failures of any kind in a row, that release the reservation.
MAX_AT_ONCE, MAX_FAILURES = 2, 10
#: Exit codes: of timeout(1) for a command that it ended, and of shells for one that cannot be run or does not exist.
TIMED_OUT, CANNOT_RUN, NOT_FOUND = 124, 126, 127


class Work:
    """Runs a command for each reservation, until told to stop.

    Args:
        kill_after: seconds from SIGTERM to SIGKILL.
        until: the exit code with which the command says that the queue is empty; it is run again and again in the same
            reservation until then. None: one run for each reservation.
        idle: seconds for which an empty queue is polled before the release.
        run_timeout: seconds after which a run is ended, with the exit code 124; None: no limit.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        url: str,
        *,
        kill_after: float,
        extend: bool,
        patience: float,
        until: int | None = None,
        idle: float = 0.0,
        run_timeout: float | None = None,
    ) -> None:
        self._command = command
        self._url = url
        self._kill_after = kill_after
        self._extend, self._patience = extend, patience
        self._until, self._idle, self._run_timeout = until, idle, run_timeout
        self._at_once = 0  # runs in a row that failed at once
        self._released = 0  # reservations in a row that were released because of failures
        self._busy = False
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._guard: OrphanGuard
        self._group: ProcessGroup | None = None

    def trouble(self) -> str | None:
        """For the health endpoint: why the worker should take no reservation now; None: it may."""
        if self._stop.is_set():
            return "nullworker work is stopping"
        if self._released:
            return f"{self._command[0]} keeps failing"
        if self._at_once > PATIENT_FAILURES:
            return f"{self._command[0]} failed at once {self._at_once} times in a row"
        return None

    def stop(self, *_: object) -> None:
        """End CMD and release what is held; the second call kills CMD at once. A signal handler."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def reap(self, *_: object) -> None:
        """Collect the exit of CMD, or of a process that it left behind. The handler of SIGCHLD."""
        if self._group is not None:
            self._group.reap()

    async def run(self) -> None:
        """Work until told to stop."""
        self._guard = OrphanGuard(signal.SIGKILL)  # at our death nobody is left to wait for a graceful end
        serving = asyncio.ensure_future(self._serve())
        try:
            await _first_of(serving, self._stop.wait())
            if not self._busy:
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            self._guard.close()

    async def _serve(self) -> None:
        async for reservation in reservations(
            self._url, extend=self._extend, cancel=False, reason="consumer_exit", patience=self._patience
        ):
            self._busy = True
            async with reservation:
                if self._until is None:
                    result = {"exit_code": await self._run_once(reservation)}
                else:
                    result = await self._drain(reservation)
                reservation.result = result
            self._busy = False
            fields = {"reservation_id": reservation.id, **result}
            if reservation.released:
                log.info("work_done", **fields)
            else:
                log.warning("work_ended_late", **fields, why=reservation.gone_because or "the worker does not answer")
            if self._stop.is_set():
                return
            await self._pause()

    async def _drain(self, reservation: Reservation) -> dict[str, Any]:
        """Run CMD again and again, until it says that the queue is empty or keeps failing. Returns the result."""
        loop, backoff = asyncio.get_running_loop(), Backoff(1.0, 10.0)
        result = {"exit_code": 0, "runs": 0, "failed": 0}
        in_a_row = self._at_once = 0
        empty_since: float | None = None
        while reservation.may_begin() and not self._stop.is_set():
            code = await self._run_once(reservation)
            if code == self._until:
                self._released = 0
                empty_since = empty_since or loop.time()
                left = empty_since + self._idle - loop.time()
                if left <= 0:
                    break
                await _first_of(asyncio.sleep(min(backoff.failed(), left)), reservation.gone.wait(), self._stop.wait())
                continue
            empty_since = None
            backoff.worked()
            result["runs"] += 1
            in_a_row = 0 if code == 0 else in_a_row + 1
            if code == 0:
                self._released = 0
            else:
                result["failed"] += 1
                result["exit_code"] = code
            if not self._stop.is_set() and (self._at_once >= MAX_AT_ONCE or in_a_row >= MAX_FAILURES):
                self._released += 1
                break
        return result

    async def _run_once(self, reservation: Reservation) -> int:
        """Run CMD, until the last process of its group has ended. Returns the exit code."""
        started, by_itself = stopwatch(), True
        try:
            group = self._group = ProcessGroup(self._command, self._environment(reservation), self._guard)
        except OSError as error:
            log.error("work_cannot_start", command=self._command[0], why=str(error))
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
        else:
            log.info("work_started", reservation_id=reservation.id, pid=group.pid, ends_at=reservation.ends_at)
            limit = asyncio.Event().wait() if self._run_timeout is None else asyncio.sleep(self._run_timeout)
            await _first_of(group.ended.wait(), reservation.gone.wait(), self._stop.wait(), limit)
            by_itself = group.ended.is_set()
            timed_out = not (by_itself or reservation.gone.is_set() or self._stop.is_set())
            if not by_itself:
                why = f"it ran for {self._run_timeout:g} s" if timed_out else reservation.gone_because or "told to stop"
                log.warning("work_stops", reservation_id=reservation.id, why=why, ends_at=reservation.ends_at)
            code = await group.end(self._kill_after, self._hurry)
            code = TIMED_OUT if timed_out else code
        failed = code not in (0, self._until)
        at_once = by_itself and failed and stopwatch() - started < AT_ONCE_SECONDS
        self._at_once = self._at_once + 1 if at_once else 0
        return code

    async def _pause(self) -> None:
        """Wait before the next reservation, if CMD keeps failing: each failure would cost a reservation."""
        times = self._released if self._until is not None else self._at_once - PATIENT_FAILURES
        if times > 0:
            seconds = min(FIRST_PAUSE_SECONDS * 2 ** min(times - 1, 10), LONGEST_PAUSE_SECONDS)
            log.error("work_fails", why=self.trouble(), pause_seconds=seconds)
            await asyncio.sleep(seconds)

    def _environment(self, reservation: Reservation) -> dict[str, str]:
        return {
            **os.environ,
            "NULL_CONTROL_PORT": str(urlsplit(self._url).port),  # so that `nullworker extend` finds the worker
            "NULLWORKER_RESERVATION_ID": reservation.id,
            "NULLWORKER_RESERVATION_DEADLINE": reservation.ends_at,
            "NULLWORKER_RESERVATION_METADATA": json.dumps(reservation.metadata),
        }


async def _first_of(*waits: Awaitable[Any]) -> None:
    """Wait for the first of them; the others are cancelled, unless they are tasks of the caller."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


async def run(work: Work, health_port: int | None) -> None:
    """Run `work` until SIGTERM, SIGINT or SIGHUP, with a health endpoint on `health_port` (0: any; None: none).

    Under nohup, SIGHUP stays ignored.
    """
    on_signals(work.stop)
    on_signals(work.reap, [signal.SIGCHLD])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])  # the parent process may have blocked it
    async with contextlib.AsyncExitStack() as stack:
        if health_port is not None:
            try:
                port = await stack.enter_async_context(health_endpoint(health_port, work.trouble))
            except OSError as error:
                raise CannotStart(f"--health-port {health_port} cannot be opened: {error.strerror}") from error
            log.info("health_endpoint", url=f"http://127.0.0.1:{port}/health")
        await work.run()
