"""One worker process, from settings to exit code: build, start, serve, drain, stop.

However the worker ends, everything that is still to be delivered is in the log, and the exit takes at most
NULL_DRAIN_SECONDS + 3 s. A worker that cannot start reports that to the autoscaler.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from nullworker import __version__, aio, logs
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.keys import KeyRing
from nullworker.autoscaler.messages import STATUS_PATH, Identity, failed_start
from nullworker.autoscaler.reporter import OUTCOMES, STATUS, Reporter
from nullworker.clock import SystemClock, machine_life
from nullworker.consumer_health import HealthPoll
from nullworker.deadline_timer import DeadlineTimer
from nullworker.errors import CannotStart, LogUnavailable
from nullworker.eventlog import retention
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Limits
from nullworker.http.auth import Authenticator
from nullworker.http.ports import Ports
from nullworker.http.status import Status
from nullworker.logs import get_log
from nullworker.metrics.exporter import Exporter, Readings
from nullworker.metrics.log_lines import write_log_line
from nullworker.outgoing import HttpPost
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.session_callbacks import Callbacks
from nullworker.settings import Settings, unknown_setting, without_secrets

if TYPE_CHECKING:
    from nullworker.eventlog.cloudevents import Format
    from nullworker.sink import Sink

log = get_log(__name__)

#: Seconds for the last reports and, at the same time, for closing open connections: within the 3 s that a stop may
#: take beyond NULL_DRAIN_SECONDS.
STOP_SECONDS: Final = 2.0
#: Seconds that the exit may take beyond NULL_DRAIN_SECONDS, and the part of them for closing connections and files.
EXIT_SECONDS: Final = 3.0
CLOSE_SECONDS: Final = 0.5
#: Seconds between two checks whether the log can still be written.
PROBE_SECONDS: Final = 10.0
#: Threshold of the youngest generation of Python's garbage collector. Each waiting connection has about forty objects
#: that stay; at the default of 700, a sixth of the CPU time of a long queue went into collections.
YOUNG_OBJECTS: Final = 20_000


def serve(settings: Settings, unknown: Mapping[str, str | None]) -> int:
    """Run a worker until a signal stops it. Returns the exit code.

    `unknown`: variables that look like settings and are not, each with the nearest known name.

    Raises:
        CannotStart: a port is taken, or the certificate or the log cannot be opened.
    """
    logs.configure(settings.null_log_format, settings.null_log_level, instance=settings.container_id)
    for name, nearest in unknown.items():
        log.warning("unknown_setting", name=name, nearest=nearest, message=unknown_setting(name, nearest))
    gc.freeze()  # imported objects are never garbage
    gc.set_threshold(YOUNG_OBJECTS)
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    try:
        async with contextlib.AsyncExitStack() as stack:
            worker = _build(settings, stack)
            await worker.start()
            dead = await worker.serve()
            await worker.drain(dead)
            return 1 if dead else 0
    except CannotStart as error:
        if error.tell:
            await _tell_failed_start(settings, str(error))
        raise


def _build(settings: Settings, stack: contextlib.AsyncExitStack) -> Worker:
    event_log = stack.enter_context(contextlib.closing(open_log(settings.event_log, sync=settings.null_log_sync)))
    aio.on_signals(lambda number: None)  # one that comes from here on is processed by the handler of `start`
    worker = Worker(event_log, stack.enter_context(Ports(settings)))
    stack.push_async_callback(worker.stop)
    return worker


def identity_of(settings: Settings) -> Identity | None:
    """The identity of this worker at the autoscaler; None when standalone."""
    if settings.container_id is None:
        return None
    return Identity(settings.container_id, settings.master_token, settings.own_url, settings.null_max_perf)


async def _tell_failed_start(settings: Settings, why: str) -> None:
    """Report to the autoscaler that this worker cannot start."""
    worker_identity = identity_of(settings)
    if worker_identity is None:
        return
    autoscaler = AutoscalerClient(settings.report_addr)
    with contextlib.suppress(asyncio.TimeoutError):
        await aio.wait_for(autoscaler.post(STATUS_PATH, failed_start(worker_identity, why)), STOP_SECONDS)
    await autoscaler.close()


class Worker:
    """All parts of one worker, connected. Needs an open log and open ports; live reservations are replayed."""

    def __init__(self, event_log: EventLog, ports: Ports) -> None:
        self.settings = settings = ports.settings
        self.log = event_log
        readiness = Readiness(
            key=None if settings.unsecured else "the autoscaler's key is not loaded yet",
            consumer_starting="the consumer has not been healthy yet" if settings.backend_health_url else None,
        )
        limits = Limits(
            max_reservation_seconds=settings.max_reservation_seconds,
            max_queue_seconds=settings.null_max_queue_seconds,
            max_queued=settings.null_max_queued,
            max_hold_seconds=settings.max_hold_seconds,
            consumer_grace_seconds=settings.null_consumer_grace_seconds,
            attach_timeout=settings.null_attach_timeout,
        )
        clock = SystemClock(event_log.anchor(), not_before=event_log.latest())
        with contextlib.suppress(LogUnavailable):
            event_log.store_anchor(clock.anchor)
            event_log.set_instance(str(settings.container_id or socket.gethostname()))
        self.service = service = Service(event_log, clock, limits, readiness)
        self.reporter: Reporter | None = None
        self.sink: Sink | None = None
        self.exporter = exporter = Exporter(
            service,
            Readings(
                backlog=lambda: self.reporter.backlog if self.reporter else 0,
                log_bytes=event_log.size,
                sink_backlog=lambda: self.sink.backlog if self.sink else 0,
            ),
        )
        event_log.on_append.append(exporter.count_append)
        self._make_sink()

        worker_identity = identity_of(settings)
        self.autoscaler = None if worker_identity is None else AutoscalerClient(settings.report_addr)
        self.keys: KeyRing | None = None
        if worker_identity is not None and self.autoscaler is not None:
            self.reporter = Reporter(
                worker_identity,
                service,
                event_log,
                self.autoscaler,
                exporter.count_report,
                report_held=settings.null_report_perf == "held",
            )
            if not settings.unsecured:
                self.keys = KeyRing(self.autoscaler, readiness, exporter.count_report)
        self.post = HttpPost(ports.own_ports)
        self.callbacks = Callbacks(
            service, event_log, self.post, lambda result: exporter.callbacks.labels(result).inc()
        )
        self.health: HealthPoll | None = None
        if settings.backend_health_url is not None:
            self.health = HealthPoll(
                settings.backend_health_url,
                service,
                interval=settings.null_health_interval,
                timeout=settings.null_health_timeout,
                failures=settings.null_health_failures,
                cancel_held=settings.null_unhealthy_action == "cancel",
                was_healthy=event_log.consumer_was_healthy == machine_life(),
                on_healthy=self._remember_healthy_consumer,
            )
        self.timer = DeadlineTimer(service)
        if self.reporter is not None:
            service.observers.append(self.reporter.observe)
            readiness.listeners.append(self.reporter.changed)
        service.observers += [exporter.observe, self.callbacks.observe, write_log_line]

        self.servers = ports.servers(
            service,
            event_log,
            Authenticator(
                self.keys,
                own_url=settings.own_url,
                url_policy="off" if settings.standalone else settings.null_grant_url,
            ),
            exporter,
            Status(service, event_log, self.autoscaler, self.reporter, self.health, self.sink, settings),
            shutdown_seconds=STOP_SECONDS / 2,
        )
        self._late_metrics = ports.late_metrics(exporter)
        self._listening = ports.listening
        self._stop = asyncio.Event()
        self._stop_at: float | None = None  # loop time by which all must be over
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Resume live reservations, accept connections, start all tasks."""
        aio.on_signals(self._on_signal)
        if self.reporter is None:
            self._skip_reports()
        self.service.resume()
        self.timer.set()
        for server in self.servers:
            await server.start()
        self.service.listening()
        self._start_tasks()
        if self.settings.unsecured:
            log.warning(
                "unsecured", message="UNSECURED=true: anybody who reaches the external port can reserve this worker"
            )
        log.info(
            "worker_started",
            version=__version__,
            url=self.settings.own_url,
            **self._listening,
            event_log=str(self.log.path),
            reports_to=None if self.autoscaler is None else ",".join(map(without_secrets, self.autoscaler.addresses)),
            settings=self.settings.in_force(),
        )

    async def serve(self) -> str | None:
        """Run until a signal; returns None. If a task dies first, returns a sentence that names it."""
        stop = asyncio.ensure_future(self._stop.wait())
        done, _ = await asyncio.wait({stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        dead = [task for task in done if task is not stop]
        for task in dead:
            error = None if task.cancelled() else task.exception()
            log.error("task_died", task=task.get_name(), error=repr(error))
        return f"a task of the worker has died: {dead[0].get_name()}" if dead else None

    async def drain(self, dead: str | None) -> None:
        """Refuse new claims; let a held request finish, unless a task has died. Sessions survive the restart."""
        if dead is not None:
            self.service.readiness.part_has_died(dead)
            self.service.drain("a task of the worker has died")
            return
        self.service.drain("the worker is stopping")
        held = self.service.book.held
        if held is None or held.terms.kind == "session":
            return
        try:
            await aio.wait_for(self.service.ended(held), self.settings.null_drain_seconds)
        except asyncio.TimeoutError:
            log.warning(
                "drain_over",
                reservation_id=held.id,
                message="NULL_DRAIN_SECONDS have passed; cancelling the held reservation",
            )

    async def stop(self) -> None:
        """End the held request, answer all callers, send the last reports, stop all tasks."""
        self.service.end_drain()
        self.timer.stop()
        await asyncio.gather(
            *(server.stop() for server in self.servers),
            *([self.reporter.flush(STOP_SECONDS)] if self.reporter and self._tasks else []),
            *([self.sink.finish(self._seconds_left())] if self.sink and self._tasks else []),
        )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.post.close()
        if self.sink is not None:
            await self.sink.close()
        if self.autoscaler is None:
            self._skip_reports()
        else:
            await self.autoscaler.close()
        if self.service.unwritten:
            log.error("events_lost", events=len(self.service.unwritten), why=self.service.readiness.log)
        if self._tasks:  # it had started
            log.info("worker_stopped")

    # -- private -------------------------------------------------------------------------------------------------

    def _remember_healthy_consumer(self) -> None:
        with contextlib.suppress(LogUnavailable):
            self.log.set_consumer_was_healthy(machine_life())

    def _start_tasks(self) -> None:
        self._start("callbacks", self.callbacks.run())
        self._start("probe", self._probe())
        if self.settings.null_log_keep is not None:
            self._start("pruning", self._prune(self.settings.null_log_keep))
        if self._late_metrics is not None:
            self._start("metrics_site", self._late_metrics)
        if self.reporter is not None:
            self._start("reporter", self.reporter.run())
        if self.keys is not None:
            self._start("key", self._keep(self.keys.load()))
        if self.sink is not None:
            self._start("sink", self.sink.run())
        if self.health is not None:
            self._start("health", self.health.run())

    def _make_sink(self) -> None:
        settings = self.settings
        if settings.null_sink is None:
            with contextlib.suppress(LogUnavailable):
                self.log.set_sink(None)
            return
        from nullworker.sink import Sink, Target  # imported only if needed: it would slow down the start

        target = Target(
            settings.null_sink,
            settings.null_sink_token,
            cast("Format", settings.null_sink_format),
            with_results=settings.null_sink_results,
            with_metadata=settings.null_sink_metadata,
        )
        self.sink = Sink(
            target,
            self.log,
            self.service.now,
            self.exporter.count_sink,
            instance=self.log.instance or socket.gethostname(),
            own_url=settings.own_url,
        )
        self.log.on_append.append(self.sink.appended)

    def _seconds_left(self) -> float:
        """Seconds until the end of NULL_DRAIN_SECONDS + 3 s, less the time for closing."""
        now = asyncio.get_running_loop().time()
        stop_at = now + STOP_SECONDS if self._stop_at is None else self._stop_at
        return max(stop_at - CLOSE_SECONDS - now, STOP_SECONDS / 2)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work, name=name))

    @staticmethod
    async def _keep(work: Coroutine[Any, Any, None]) -> None:
        """Keep a finished task alive, so that it does not count as dead."""
        await work
        await asyncio.Event().wait()

    async def _probe(self) -> None:
        while True:
            self.service.probe()
            if self.autoscaler is None and self.log.cursor(OUTCOMES) < self.log.last_seq:
                self._skip_reports()  # so that a start after a kill finds nothing to report
            await asyncio.sleep(PROBE_SECONDS)

    async def _prune(self, keep: float) -> None:
        await asyncio.sleep(retention.FIRST_SECONDS)
        while True:
            if self.autoscaler is None:
                self._skip_reports()
            await retention.prune_gently(self.log, self.service.now() - keep)
            await asyncio.sleep(retention.DAY_SECONDS)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():  # a second signal cancels the held reservation at once
            self.service.end_drain()
        else:
            self._stop_at = asyncio.get_running_loop().time() + self.settings.null_drain_seconds + EXIT_SECONDS
            if self.sink is not None:
                self.sink.hurry()
        log.info(
            "stopping", signal=number.name, message="new reservations are refused; a second signal cancels the held one"
        )
        self._stop.set()

    def _skip_reports(self) -> None:
        """A standalone worker reports nothing: move its cursors to the end of the log."""
        with contextlib.suppress(LogUnavailable):
            for name in (STATUS, OUTCOMES):
                self.log.move_cursor(name, self.log.last_seq)
