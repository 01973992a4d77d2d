"""Prometheus metrics. Counters count committed events; gauges are read from the book at each scrape.

Names and units follow Prometheus' rules: base units, `_total` for counters. No id is a label, and each value of a
closed set of labels is exported from the start, at 0, so that an alert never has to wait for a first event.

`nullworker_reservations_total` and `nullworker_reservations` are two metrics in Prometheus' text format, but one family
in OpenMetrics, which rejects duplicates. In OpenMetrics the counter is therefore exported with type unknown, which
changes no query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import prometheus_client
from aiohttp import hdrs, web
from prometheus_client import Counter, Histogram
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from nullworker import __version__
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import EDGES, ENDED
from nullworker.readiness import WORKER_STATES
from nullworker.service import Commit, Service

#: Up to a day, for holds of minutes or hours.
_LONG_BUCKETS: Final = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400)
_WAIT_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600)
_HTTP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_APPEND_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

RELEASE_RESULTS: Final = ("released", "none", "stale", "unknown")
EXTENSION_RESULTS: Final = ("extended", "none", "stale", "unknown")
AUTH_FAILURES: Final = ("signature", "url", "session", "token")
REPORT_CALLS: Final = ("worker_status", "delete_requests", "pubkey")
REPORT_RESULTS: Final = ("ok", "refused", "failed")
#: Of POSTs: accepted, refused, failed; of events that the sink will not have: dead_lettered, pruned.
SINK_RESULTS: Final = ("accepted", "refused", "failed", "dead_lettered", "pruned")
CALLBACK_RESULTS: Final = ("delivered", "failed", "given_up")


@dataclass(frozen=True)
class Readings:
    """Figures of other parts of the worker, read at each scrape."""

    backlog: Callable[[], int]
    log_bytes: Callable[[], int]
    sink_backlog: Callable[[], int]


class Exporter:
    """All metrics of one worker, in their own registry. Add `observe` to the service's observers."""

    def __init__(self, service: Service, readings: Readings) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self.busy_seconds = 0.0
        self.ended: dict[tuple[str, str, str], int] = {
            (kind, edge.target, edge.reason or ""): 0
            for edge in EDGES
            if edge.target in ENDED
            for kind in ("request", "session")
        }
        self._since = service.now()
        self._held_here: str | None = None  # the last reservation that was first held by this process

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"nullworker_{name}", text, tuple(labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(f"nullworker_{name}", text, tuple(labels), buckets=buckets, registry=self.registry)

        self.queue_wait = histogram("queue_wait_seconds", "Time from the claim to the slot.", _WAIT_BUCKETS)
        self.hold = histogram("hold_seconds", "Time for which a reservation was held.", _LONG_BUCKETS)
        self.attach = histogram(
            "attach_seconds", "Time from the hold to the consumer's first attachment.", _WAIT_BUCKETS
        )
        self.releases = counter("releases_total", "Calls of /release, by result.", ("result",))
        self.extensions = counter("extensions_total", "Calls of /extend, by result.", ("result",))
        self.requests = counter(
            "http_requests_total", "HTTP answers; 499: the client hung up.", ("port", "route", "status")
        )
        self.durations = histogram(
            "http_request_duration_seconds",
            "Time to an answer; held requests excluded.",
            _HTTP_BUCKETS,
            ("port", "route"),
        )
        self._requests, self._durations = functools.cache(self.requests.labels), functools.cache(self.durations.labels)
        self.auth_failures = counter("auth_failures_total", "Requests that were not authenticated.", ("reason",))
        self.reports = counter("autoscaler_reports_total", "Calls to the autoscaler.", ("call", "result"))
        self.callbacks = counter("session_callbacks_total", "Calls of a session's on_close_route.", ("result",))
        self.sink = counter(
            "sink_deliveries_total", "POSTs to NULL_SINK, and events that it will not have.", ("result",)
        )
        self.events = counter("event_log_events_total", "Events that this process has written to the log.")
        self.append = histogram("event_log_append_seconds", "Time that one commit to the log took.", _APPEND_BUCKETS)
        for metric, values in (
            (self.releases, RELEASE_RESULTS),
            (self.extensions, EXTENSION_RESULTS),
            (self.auth_failures, AUTH_FAILURES),
            (self.callbacks, CALLBACK_RESULTS),
            (self.sink, SINK_RESULTS),
        ):
            for value in values:
                metric.labels(value)
        for call in REPORT_CALLS:
            for result in REPORT_RESULTS:
                self.reports.labels(call, result)
        self.registry.register(_BookCollector(service, readings, self))
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        self._text = make_aiohttp_handler(self.registry)
        self._openmetrics = make_aiohttp_handler(_OneFamilyEach(self.registry))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics: OpenMetrics with exemplars if Accept asks for it, else Prometheus' text format."""
        openmetrics = "application/openmetrics-text" in ",".join(request.headers.getall(hdrs.ACCEPT, ()))
        return await (self._openmetrics if openmetrics else self._text)(request)

    def observe(self, commit: Commit) -> None:
        """An event was committed."""
        event, reservation = commit.event, commit.reservation
        if event.kind == "held":
            self._held_here = reservation.id
            self.queue_wait.observe(max(event.at - reservation.queued_at, 0.0))
        elif event.kind in ENDED:
            self.ended[(reservation.terms.kind, event.kind, event.reason or "")] += 1
            if reservation.held_at is not None:
                held = max(event.at - reservation.held_at, 0.0)
                self.hold.observe(held, {"reservation_id": reservation.id})
                self.busy_seconds += self.busy_with(reservation, event.at)

    def busy_with(self, reservation: Reservation, until: float) -> float:
        """The seconds of a hold that fall to this process: after a restart, only those since its start."""
        assert reservation.held_at is not None
        own = reservation.id == self._held_here
        return max(until - (reservation.held_at if own else max(reservation.held_at, self._since)), 0.0)

    def count_append(self, events: int, seconds: float) -> None:
        """Count a commit of so many events, which took so many seconds."""
        self.events.inc(events)
        self.append.observe(seconds)

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        """Count an HTTP answer; `seconds` is None for a request that waited for a reservation."""
        self._requests(port, route, status).inc()
        if seconds is not None:
            self._durations(port, route).observe(seconds)

    def count_auth_failure(self, reason: str) -> None:
        """Count a request that was not authenticated."""
        self.auth_failures.labels(reason).inc()

    def count_sink(self, result: str, number: int) -> None:
        """So many POSTs to the sink, or events that it will not have."""
        self.sink.labels(result).inc(number)

    def count_report(self, call: str, result: str) -> None:
        """Count a call to the autoscaler."""
        self.reports.labels(call, result).inc()


class _OneFamilyEach(Collector):
    """The metrics of a registry, with `nullworker_reservations_total` as a family of its own."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def restricted_registry(self, names: Iterable[str]) -> _OneFamilyEach:
        """Only the metrics named by `?name[]=`."""
        return _OneFamilyEach(self._registry.restricted_registry(names))

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        for metric in self._registry.collect():
            if metric.name == "nullworker_reservations" and metric.type == "counter":
                total = Metric("nullworker_reservations_total", metric.documentation, "unknown")
                total.samples = metric.samples
                yield total
            else:
                yield metric


class _BookCollector(Collector):
    """Gauges that are read at each scrape."""

    def __init__(self, service: Service, readings: Readings, exporter: Exporter) -> None:
        self._service = service
        self._readings = readings
        self._exporter = exporter

    def collect(self) -> Iterable[Metric]:
        """All gauges, and the counters that the exporter keeps."""
        service, now = self._service, self._service.now()
        book, readiness, held = service.book, service.readiness, service.book.held

        ended = CounterMetricFamily(
            "nullworker_reservations", "Reservations that have ended, by how.", labels=("kind", "state", "reason")
        )
        for labels, count in self._exporter.ended.items():
            ended.add_metric(labels, count)
        yield ended
        live = GaugeMetricFamily("nullworker_reservations", "Reservations that have not ended.", labels=("state",))
        live.add_metric(("queued",), len(book.queue))
        live.add_metric(("held",), 0 if held is None else 1)
        yield live
        busy = self._exporter.busy_seconds
        if held is not None and held.held_at is not None:
            busy += self._exporter.busy_with(held, now)
        yield CounterMetricFamily("nullworker_busy_seconds", "Time during which a reservation was held.", busy)
        yield GaugeMetricFamily(
            "nullworker_reservation_started_timestamp_seconds",
            "When the held reservation got the slot; 0 when idle.",
            (held.held_at or 0) if held else 0,
        )
        yield GaugeMetricFamily(
            "nullworker_reservation_deadline_timestamp_seconds",
            "When the held reservation ends at the latest; 0 when idle.",
            (held.ends_at or 0) if held else 0,
        )
        yield GaugeMetricFamily(
            "nullworker_autoscaler_backlog",
            "Outcomes that the autoscaler has not acknowledged.",
            self._readings.backlog(),
        )
        yield GaugeMetricFamily(
            "nullworker_sink_backlog", "Events that the sink has not accepted.", self._readings.sink_backlog()
        )
        yield GaugeMetricFamily(
            "nullworker_consumer_healthy",
            "1 if the consumer is healthy, 0 if not, NaN if it is not polled.",
            math.nan if readiness.consumer_healthy is None else int(readiness.consumer_healthy),
        )
        yield GaugeMetricFamily(
            "nullworker_consumer_attached",
            "1 while a consumer is attached to the held reservation.",
            1 if held is not None and held.attachment.state == "attached" else 0,
        )
        states = GaugeMetricFamily("nullworker_worker_state", "1 for the state of the worker.", labels=("state",))
        for state in WORKER_STATES:
            states.add_metric((state,), 1 if state == readiness.state else 0)
        yield states
        yield GaugeMetricFamily("nullworker_event_log_bytes", "Size of the event log.", self._readings.log_bytes())
        yield GaugeMetricFamily(
            "nullworker_event_log_unwritten", "Events that wait in memory for the log.", len(service.unwritten)
        )
        build = GaugeMetricFamily("nullworker_build_info", "Always 1; the version is its label.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
