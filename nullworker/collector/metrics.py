"""The metrics of the fleet, with the prefix `nullworker_collect_`.

Counters count since the start of this process; figures of the fleet are read from the database at each scrape. Workers
and reservations are never labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import prometheus_client
from aiohttp import web
from prometheus_client import Counter, Gauge
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from nullworker import __version__
from nullworker.collector.queries import WORKER_STATES, Totals
from nullworker.collector.store import Added

EVENT_RESULTS: Final = ("stored", "duplicate")
AUTH_FAILURES: Final = ("token", "key")
_PREFIX: Final = "nullworker_collect_"


@dataclass(frozen=True)
class Readings:
    """Figures of other objects, read at each scrape."""

    db_bytes: Callable[[], int]
    writable: Callable[[], bool]


class CollectMetrics:
    """All metrics of one collector, in a registry of their own.

    Attributes:
        totals: the figures of the fleet; set them before a scrape is answered.
    """

    def __init__(self, readings: Readings) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self.totals: Totals | None = None

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{_PREFIX}{name}", text, labels, registry=self.registry)

        self.events = counter("events_total", "Events in accepted batches.", ("result",))
        self.conflicts = counter(
            "conflicts_total", "Events stored although a different event with the same seq had come."
        )
        self.passed_over = counter("passed_over_total", "Events stored that the views ignore.")
        self.consumers_lost = counter(
            "consumers_lost_total", "Holds that ended because their consumer died or never came."
        )
        self.requests = counter("http_requests_total", "HTTP answers.", ("port", "route", "status"))
        self.auth_failures = counter("auth_failures_total", "Batches with a wrong token or log key.", ("reason",))
        self.last_batch = Gauge(
            f"{_PREFIX}last_batch_timestamp_seconds", "When a batch was last stored; 0: never.", registry=self.registry
        )
        for result in EVENT_RESULTS:
            self.events.labels(result)
        for reason in AUTH_FAILURES:
            self.auth_failures.labels(reason)
        self.registry.register(_FleetCollector(self, readings))
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        self._answer = make_aiohttp_handler(self.registry)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics."""
        return await self._answer(request)

    def count_batch(self, added: Added, now: float) -> None:
        """A batch was stored at `now`, in epoch seconds."""
        self.events.labels("stored").inc(added.stored)
        self.events.labels("duplicate").inc(added.duplicates)
        self.conflicts.inc(added.conflicts)
        self.passed_over.inc(added.passed_over)
        self.consumers_lost.inc(added.consumers_lost)
        self.last_batch.set(now)

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        """An HTTP request was answered."""
        self.requests.labels(port, route, status).inc()

    def count_auth_failure(self, reason: str) -> None:
        """A request was not authenticated."""
        self.auth_failures.labels(reason).inc()


class _FleetCollector(Collector):
    def __init__(self, metrics: CollectMetrics, readings: Readings) -> None:
        self._metrics = metrics
        self._readings = readings
        self._held_seconds = self._dollars = 0.0

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(f"{_PREFIX}db_bytes", "Bytes of the database on disk.", value=self._readings.db_bytes())
        writable = "Whether the database could be written at the last attempt."
        yield GaugeMetricFamily(f"{_PREFIX}writable", writable, value=int(self._readings.writable()))
        build = GaugeMetricFamily(f"{_PREFIX}build_info", "The version of this collector.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        totals = self._metrics.totals
        if totals is None:
            return
        workers = GaugeMetricFamily(f"{_PREFIX}workers", "Workers that have ever sent an event.", labels=("state",))
        for state in WORKER_STATES:
            workers.add_metric((state.replace(" ", "_"),), totals["workers"][state])
        yield workers
        holding = "Reservations that are held, as far as the collector knows."
        yield GaugeMetricFamily(f"{_PREFIX}holding", holding, value=totals["holding"])
        silent = "Workers that hold a reservation and have sent nothing for --silence."
        yield GaugeMetricFamily(
            f"{_PREFIX}silent_while_holding", silent, value=totals["workers"]["silent while holding"]
        )
        # An open hold counts up to the last event of its worker, and its end may turn out to be earlier. A counter that
        # goes back would look like a restart.
        self._held_seconds = max(self._held_seconds, totals["held_seconds"])
        self._dollars = max(self._dollars, totals["dollars"])
        held = "Time that reservations were held, over the whole fleet."
        yield CounterMetricFamily(f"{_PREFIX}held_seconds", held, value=self._held_seconds)
        dollars = "The price of that time; 0 while no price is known."
        yield CounterMetricFamily(f"{_PREFIX}dollars", dollars, value=self._dollars)
