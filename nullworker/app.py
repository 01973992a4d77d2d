"""The wiring of a worker: build, start, drain, stop. The only file that knows all the others.

What it leaves out: the process around it, from its settings to its exit code (process.py).

The one rule: whatever ends the worker, what is owed is in the log, and nobody waits for more than NULL_DRAIN_SECONDS
and STOP_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, Final

from nullworker import __version__, retention
from nullworker.alarm import Alarm
from nullworker.autoscaler import Identity
from nullworker.clock import SystemClock
from nullworker.condition import Condition
from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Limits
from nullworker.health import HealthPoll
from nullworker.http.grants import Gate
from nullworker.http.server import Port
from nullworker.link import Link
from nullworker.log import EventLog
from nullworker.logs import get_log
from nullworker.metrics.exporter import Exporter, Readings
from nullworker.metrics.narrator import narrate
from nullworker.metrics.reporter import OUTCOMES, STATUS, Reporter
from nullworker.service import Observer, Service
from nullworker.settings import Settings
from nullworker.sites import Sites
from nullworker.webhooks import Callbacks, HttpPost

log = get_log(__name__)

#: Seconds for the last reports, and for open connections to be closed: both at once, within the 3 s that the contract
#: gives to the stop beside NULL_DRAIN_SECONDS.
STOP_SECONDS: Final = 2.0
#: Seconds between two looks whether the log can still be written.
PROBE_SECONDS: Final = 10.0


def identity(settings: Settings) -> Identity | None:
    """Who this worker is to the autoscaler; None when standalone."""
    if settings.container_id is None:
        return None
    return Identity(settings.container_id, settings.master_token, settings.own_url, settings.null_max_perf)


class Worker:
    """One worker process."""

    def __init__(self, settings: Settings, event_log: EventLog) -> None:
        self.settings = settings
        self.log = event_log
        condition = Condition(
            key=None if settings.unsecured else "the autoscaler's key is not loaded yet",
            starting="the consumer has not been healthy yet" if settings.backend_health_url else None,
        )
        limits = Limits(settings.max_reservation_seconds, settings.null_max_queue_seconds, settings.null_max_queued)
        clock = SystemClock(event_log.anchor())
        with contextlib.suppress(LogUnavailable):
            event_log.store_anchor(clock.anchor)
        self.service = Service(event_log, clock, limits, condition)
        self.reporter: Reporter | None = None
        self.exporter = Exporter(
            self.service, Readings(lambda: self.reporter.backlog if self.reporter else 0, event_log.size)
        )
        event_log.on_append.append(self.exporter.count_append)
        self.link = None if settings.standalone else Link(settings.report_addr)
        self.post = HttpPost()
        self.callbacks = Callbacks(
            self.service, event_log, self.post, lambda result: self.exporter.callbacks.labels(result).inc()
        )
        self.alarm = Alarm(self.service)
        self.health: HealthPoll | None = None
        self.sites = Sites(settings)
        self._ports: list[Port] = []
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take the ports, go on with what is open, answer requests, report.

        Raises:
            CannotStart: a port or the certificate cannot be had.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                loop.add_signal_handler(number, self._told_to_stop, number.name)
        self.settings = settings = self.sites.take()
        self._gate = Gate(
            self.service.condition,
            self.link,
            unsecured=settings.unsecured,
            own_url=settings.own_url,
            url_policy=settings.null_grant_url,
            count_fetch=self.exporter.count_report,
        )
        ports = self.sites.ports(
            self.service, self.log, self._gate, self.exporter, self._status, shutdown_seconds=STOP_SECONDS / 2
        )
        me = identity(settings)
        if me is not None and self.link is not None:
            self.reporter = Reporter(me, self.service, self.log, self.link, self.exporter.count_report)
        observers: list[Observer] = [self.exporter.observe, self.callbacks.observe, self.alarm.set, narrate]
        if self.reporter is not None:
            self.reporter.catch_up()
            observers.insert(0, self.reporter.observe)
            self.service.condition.listeners.append(self.reporter.changed)
        else:
            self._owe_nothing()
        self.service.observers += observers
        self.service.condition.listeners.append(self.alarm.set)  # a log that fails is a deadline too: to try it again
        self.service.restore()
        self.alarm.set()
        for port in ports:
            self._ports.append(port)
            await port.start()
        self._start_tasks()
        if settings.unsecured:
            log.warning(
                "unsecured", message="UNSECURED=true: anybody who reaches the external port can reserve this worker"
            )
        log.info(
            "worker_started",
            version=__version__,
            url=settings.own_url,
            external_port=settings.worker_port,
            control_port=settings.null_control_port,
            event_log=str(self.log.path),
            reports_to=None if self.link is None else ",".join(self.link.addresses),
        )

    async def run(self) -> int:
        """Work until told to stop, or until a part of the worker has died. Returns the exit code."""
        stop = asyncio.ensure_future(self._stop.wait())
        done, _ = await asyncio.wait({stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        dead = [task for task in done if task is not stop]
        if not dead:
            await self._drain()
            return 0
        stop.cancel()
        for task in dead:
            error = None if task.cancelled() else task.exception()
            log.error("task_died", task=task.get_name(), error=repr(error))
        self.service.condition.unhealthy = f"a part of the worker has died: {dead[0].get_name()}"
        self.service.drain("a part of the worker has died")
        return 1

    async def stop(self) -> None:
        """End what is left, answer everybody, send the last reports, close the log."""
        self.service.end_drain()
        self.alarm.stop()
        await asyncio.gather(
            *(port.stop() for port in self._ports),
            *([self.reporter.flush(STOP_SECONDS)] if self.reporter and self._ports else []),
        )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.sites.close()
        await self.post.close()
        if self.link is None:
            self._owe_nothing()
        else:
            await self.link.close()
        if self.service.unwritten:
            log.error("events_lost", events=len(self.service.unwritten), why=self.service.condition.log)
        self.log.close()
        if self._tasks:  # it had started
            log.info("worker_stopped")

    # -- inside --------------------------------------------------------------------------------------------------

    def _start_tasks(self) -> None:
        settings = self.settings
        self._start("callbacks", self.callbacks.run())
        self._start("probe", self._probe())
        if settings.null_log_keep is not None:
            self._start("pruning", self._prune(settings.null_log_keep))
        if self.reporter is not None:
            self._start("reporter", self.reporter.run())
        if not settings.unsecured:
            self._start("key", self._keep(self._gate.load_key()))
        if settings.backend_health_url is not None:
            self.health = HealthPoll(
                settings.backend_health_url,
                self.service,
                interval=settings.null_health_interval,
                timeout=settings.null_health_timeout,
                failures=settings.null_health_failures,
                cancel_held=settings.null_unhealthy_action == "cancel",
            )
            self._start("health", self.health.run())

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work, name=name))

    @staticmethod
    async def _keep(work: Coroutine[Any, Any, None]) -> None:
        """A task that has done its work must not look like one that has died."""
        await work
        await asyncio.Event().wait()

    async def _probe(self) -> None:
        while True:
            self.service.probe()
            await asyncio.sleep(PROBE_SECONDS)

    async def _prune(self, keep: float) -> None:
        await asyncio.sleep(retention.FIRST_SECONDS)
        while True:
            if self.link is None:
                self._owe_nothing()
            await retention.prune_gently(self.log, self.service.now() - keep)
            await asyncio.sleep(retention.DAY_SECONDS)

    def _told_to_stop(self, name: str) -> None:
        if self._stop.is_set():  # told twice: no more patience with what is held
            self.service.end_drain()
        log.info("stopping", signal=name, message="new reservations are refused; again: the held one ends now")
        self._stop.set()

    async def _drain(self) -> None:
        """Take nothing more; let a held request finish. A session needs no waiting: it goes on after the restart."""
        self.service.drain("the worker stops")
        held = self.service.book.held
        if held is None or held.terms.kind == "session":
            return
        try:
            await asyncio.wait_for(self.service.ended(held), self.settings.null_drain_seconds)
        except asyncio.TimeoutError:
            log.warning("drain_over", reservation_id=held.id, message="the held reservation is cancelled")

    def _owe_nothing(self) -> None:
        """A standalone worker reports to nobody, also later."""
        with contextlib.suppress(LogUnavailable):
            for name in (STATUS, OUTCOMES):
                self.log.move_cursor(name, self.log.last_seq)

    def _status(self) -> dict[str, Any]:
        condition, settings = self.service.condition, self.settings
        return {
            "consumer": {
                "healthy": not (condition.starting or condition.unhealthy),
                "url": settings.backend_health_url,
                "last": self.health.last if self.health else None,
                "why": condition.unhealthy or condition.starting,
            },
            "autoscaler": {
                "reports_to": None if self.link is None else list(self.link.addresses),
                "trouble": None if self.link is None else self.link.trouble,
                "backlog": 0 if self.reporter is None else self.reporter.backlog,
                "key_loaded": condition.key is None,
            },
            "log": {
                "path": str(self.log.path),
                "bytes": self.log.size(),
                "last_seq": self.log.last_seq,
                "unwritten": len(self.service.unwritten),
                "why": condition.log,
            },
            "url": settings.own_url,
            "version": __version__,
        }
