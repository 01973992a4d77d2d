"""`nullworker work -- CMD ...`: a consumer in any language, as one command for each reservation.

CMD is started when a reservation is held, and its end is the end of the reservation, with the exit code as the result.
When the reservation ends first, CMD and all of its process group get SIGTERM, and SIGKILL after --kill-after. Either
way nothing of CMD runs any more when the next reservation is taken, and no reservation is held for nobody.

What it leaves out: how a reservation is had, watched and released (consumer.py), and how processes end (group.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit

import click

from nullworker import logs
from nullworker.clock import stopwatch
from nullworker.consumer import PATIENCE_SECONDS, Reservation, health_endpoint, reservations
from nullworker.control_client import Control, with_control
from nullworker.errors import CannotStart
from nullworker.group import Group
from nullworker.lifeline import Lifeline
from nullworker.logs import get_log
from nullworker.options import SECONDS

log = get_log(__name__)

#: A command that fails within this many seconds has done no work.
AT_ONCE_SECONDS = 2.0
#: So many failures at once in a row may be bad luck; from the next on there is a pause before the next reservation.
PATIENT_FAILURES = 2
#: Seconds of the first pause, which doubles, and of the longest.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
#: What shells answer for a command that cannot be run, and for one that is not there.
CANNOT_RUN, NOT_FOUND = 126, 127


class Work:
    """Runs a command for each reservation, until told to stop."""

    def __init__(self, command: tuple[str, ...], url: str, *, kill_after: float, extend: bool, patience: float) -> None:
        self._command = command
        self._url = url
        self._kill_after = kill_after
        self._extend, self._patience = extend, patience
        self._failures = 0
        self._busy = False
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._lifeline: Lifeline
        self._group: Group | None = None

    def trouble(self) -> str | None:
        """For the health endpoint: why it should get no reservation now."""
        if self._stop.is_set():
            return "it was told to stop"
        if self._failures > PATIENT_FAILURES:
            return f"{self._command[0]} failed at once {self._failures} times in a row"
        return None

    def told_to_stop(self) -> None:
        """The first time CMD may end by itself; the second time it may not."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def child_ended(self) -> None:
        """At SIGCHLD: the command, or a process that it has left behind, at any time."""
        if self._group is not None:
            self._group.reap()

    async def run(self) -> None:
        """Work until told to stop."""
        self._lifeline = Lifeline(signal.SIGKILL)  # nobody is left who could wait for an end in order
        serving = asyncio.ensure_future(self._serve())
        try:
            await _first_of(serving, self._stop.wait())
            if not self._busy:
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            self._lifeline.close()

    async def _serve(self) -> None:
        found = reservations(
            self._url, extend=self._extend, cancel=False, reason="consumer_exit", patience=self._patience
        )
        async for reservation in found:
            self._busy = True
            async with reservation:
                code = await self._one(reservation)
            self._busy = False
            fields = {"reservation_id": reservation.id, "exit_code": code}
            if reservation.released:
                log.info("work_done", **fields)
            else:
                log.warning("work_ended_late", **fields, why=reservation.gone_because or "the worker does not answer")
            if self._stop.is_set():
                return
            await self._pause()

    async def _one(self, reservation: Reservation) -> int:
        """CMD for one reservation, to the end of its last process. Its exit code."""
        started, by_itself = stopwatch(), True
        try:
            group = self._group = Group(self._command, self._environment(reservation), self._lifeline)
        except OSError as error:
            log.error("work_cannot_start", command=self._command[0], why=str(error))
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
        else:
            log.info("work_started", reservation_id=reservation.id, pid=group.pid, ends_at=reservation.ends_at)
            await _first_of(group.ended.wait(), reservation.gone.wait(), self._stop.wait())
            by_itself = group.ended.is_set()
            if not by_itself:
                log.warning("work_stops", reservation_id=reservation.id, why=reservation.gone_because or "told to stop")
            code = await group.end(self._kill_after, self._hurry)
        reservation.result = {"exit_code": code}
        at_once = by_itself and code != 0 and stopwatch() - started < AT_ONCE_SECONDS
        self._failures = self._failures + 1 if at_once else 0
        return code

    async def _pause(self) -> None:
        """A command that cannot work should not burn reservation after reservation."""
        if self._failures > PATIENT_FAILURES:
            doublings = min(self._failures - PATIENT_FAILURES - 1, 10)
            seconds = min(FIRST_PAUSE_SECONDS * 2**doublings, LONGEST_PAUSE_SECONDS)
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
    """Wait for the first; those of the others that are no tasks of the caller's are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


async def _work(work: Work, health_port: int | None) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, work.told_to_stop)
    loop.add_signal_handler(signal.SIGCHLD, work.child_ended)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])  # whoever has started this may have blocked it
    async with contextlib.AsyncExitStack() as stack:
        if health_port is not None:
            try:
                port = await stack.enter_async_context(health_endpoint(health_port, work.trouble))
            except OSError as error:
                raise CannotStart(f"--health-port {health_port} cannot be had: {error.strerror}") from error
            log.info("health_endpoint", url=f"http://127.0.0.1:{port}/health")
        await work.run()


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--kill-after",
    metavar="SECONDS",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="From SIGTERM to SIGKILL. Vast's supervisor allows 10 for all.",
)
@click.option("--extend", is_flag=True, help="Move the deadline for as long as CMD runs.")
@click.option("--health-port", type=click.IntRange(0, 65535), help="Serve GET /health here, for BACKEND_HEALTH_URL.")
@click.option(
    "--patience",
    metavar="SECONDS",
    type=SECONDS,
    default=PATIENCE_SECONDS,
    show_default=True,
    help="How long the worker may be silent before CMD is ended.",
)
@click.option("--log-format", envvar="NULL_LOG_FORMAT", type=click.Choice(["console", "json"]), default="console")
@click.option(
    "--log-level", envvar="NULL_LOG_LEVEL", type=click.Choice(["debug", "info", "warning", "error"]), default="info"
)
@with_control
def work(
    command: tuple[str, ...],
    control: Control,
    kill_after: float,
    extend: bool,
    health_port: int | None,
    patience: float,
    log_format: str,
    log_level: str,
) -> None:
    """Run CMD once for each reservation; its end ends the reservation, with the exit code as the result.

    CMD finds NULLWORKER_RESERVATION_ID, NULLWORKER_RESERVATION_DEADLINE and NULLWORKER_RESERVATION_METADATA (JSON) in
    its environment. When the reservation ends first, CMD and its process group get SIGTERM, then SIGKILL. SIGTERM to
    this command does the same and releases what is held; a second one does not wait.
    """
    if shutil.which(command[0]) is None:
        raise click.UsageError(f"there is no command {command[0]!r}: give a path, or set PATH")
    logs.configure(log_format, log_level)

    async def start() -> None:
        await _work(Work(command, control.url, kill_after=kill_after, extend=extend, patience=patience), health_port)

    asyncio.run(start())
