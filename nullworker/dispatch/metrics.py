"""The metrics of the dispatcher: counters and a histogram of its events, and gauges that are read at each scrape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from nullworker import __version__
from nullworker.dispatch.claims import OWN_REASONS, Claim, Event
from nullworker.dispatch.dispatcher import Dispatcher
from nullworker.dispatch.limits import spent
from nullworker.fsm.table import EDGES

PREFIX: Final = "nullworker_dispatch_"
#: Seconds until a worker is held: from a warm one to a machine that has to be rented and loaded.
BUCKETS: Final = (0.5, 1, 2, 5, 10, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600)
#: All known reasons; those of newer workers are counted as `other`.
REASONS: Final = tuple(
    sorted({edge.reason for edge in EDGES if edge.reason and edge.status} | set(OWN_REASONS) | {"other", "unknown"})
)


class Exporter(Collector):
    """All metrics of one dispatcher, in a registry of its own. It also counts the requests to its port."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        past = spent(dispatcher.clock.now(), dispatcher.ledger.held_time(0.0, open_too=False), 0.0, window=math.inf)
        self._seconds, self._dollars = past.hours * 3600, past.dollars  # of holds that have ended
        self._shown = (0.0, 0.0)
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._ended = Counter(f"{PREFIX}ended", "Claims that have ended.", ["reason"], registry=self.registry)
        for reason in REASONS:
            self._ended.labels(reason)
        self._waits = Histogram(
            f"{PREFIX}claim_wait_seconds", "From a claim to its worker.", buckets=BUCKETS, registry=self.registry
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        dispatcher.book.observers.append(self._observe)

    def _observe(self, claim: Claim, event: Event) -> None:
        if event.kind == "held":
            self._waits.observe(max(0.0, event.at - claim.opened_at))
        elif event.kind == "ended":
            self._ended.labels(event.reason if event.reason in REASONS else "other").inc()
            seconds = claim.held_seconds or 0.0
            self._seconds += seconds
            self._dollars += seconds / 3600 * (claim.price or 0.0)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily]:
        """Read the gauges."""
        dispatcher = self._dispatcher
        decision = None if dispatcher.step is None else dispatcher.step.decision
        in_flight = None if decision is None else decision.in_flight
        yield _gauge("queue_waiting", "Jobs that wait, at the last look.", decision.waiting if decision else math.nan)
        yield _gauge(
            "queue_in_flight",
            "Jobs that are worked on, at the last look; NaN where the queue cannot tell.",
            math.nan if in_flight is None else in_flight,
        )
        yield _gauge("desired", "Workers that the queue needs.", decision.desired if decision else math.nan)
        yield _gauge("paused", "Holds that brought nothing and count as open.", decision.paused if decision else 0)
        claims = GaugeMetricFamily(f"{PREFIX}claims", "Open claims.", labels=["state"])
        for state in ("pending", "granted", "held"):
            claims.add_metric([state], len(dispatcher.book.in_state(state)))
        yield claims
        yield _gauge("silent", "Held claims whose worker does not answer.", len(dispatcher.driver.silent))
        yield _gauge("foreign", "Workers that work for somebody else.", dispatcher.foreign)
        yield _gauge("stalled", "1: a claim waits for longer than --stall.", int(dispatcher.stalled))
        yield _gauge(
            "limit_reached", "1: a spending limit lets nothing be opened.", int(dispatcher.room.reached is not None)
        )
        yield _gauge("ledger_unwritten", "Events that the ledger could not take.", len(dispatcher.book.unwritten))
        yield _gauge("last_poll_timestamp_seconds", "When the queue was read last.", dispatcher.polled_at)
        yield CounterMetricFamily(
            f"{PREFIX}queue_errors", "Looks at the queue that failed.", value=dispatcher.queue_errors
        )
        now = dispatcher.clock.now()
        held = [
            (max(0.0, now - (claim.held_at or now)), claim.price or 0.0) for claim in dispatcher.book.in_state("held")
        ]
        seconds = self._seconds + sum(seconds for seconds, _ in held)
        dollars = self._dollars + sum(seconds / 3600 * price for seconds, price in held)
        # The end of a hold may turn out to be earlier, but a counter must not go back.
        self._shown = max(self._shown[0], seconds), max(self._shown[1], dollars)
        yield CounterMetricFamily(
            f"{PREFIX}hold_seconds", "Seconds for which workers were held, by this ledger.", value=self._shown[0]
        )
        yield CounterMetricFamily(f"{PREFIX}dollars", "What that cost, where the price is known.", value=self._shown[1])
        info = InfoMetricFamily(f"{PREFIX}build", "The version.")
        info.add_metric([], {"version": __version__})
        yield info

    def count_request(self, port: str, route: str, status: int, seconds: float | None) -> None:
        """Not counted: the port is on 127.0.0.1."""

    def count_auth_failure(self, reason: str) -> None:
        """Never called: there is no authentication."""


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}{name}", help_text, value=value)
