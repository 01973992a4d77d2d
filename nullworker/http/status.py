"""The status document: everything a worker reports about itself, for GET /status, the page and `nullworker status`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

from nullworker import __version__
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.reporter import Reporter
from nullworker.clock import elapsed, iso
from nullworker.consumer_health import HealthPoll
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.queries import ReservationJson
from nullworker.http.reservations import reservation_json
from nullworker.service import Service
from nullworker.settings import Settings, without_secrets

if TYPE_CHECKING:
    from nullworker.sink import Sink


class QueueJson(TypedDict):
    """The queue for the slot."""

    length: int
    limit: int
    oldest_seconds: float | None  # for which the first one has waited


class ConsumerJson(TypedDict):
    """The consumer: its health by BACKEND_HEALTH_URL, and its connection to the held reservation."""

    healthy: bool | None  # None: BACKEND_HEALTH_URL is unset
    url: str | None  # None: BACKEND_HEALTH_URL is not set
    last: str | None  # the result of the last poll
    why: str | None  # why no reservation is taken for it
    attached: bool  # whether it is attached to the held reservation
    attached_at: str | None  # time of the first attachment, ISO 8601


class AutoscalerJson(TypedDict):
    """The connection to the autoscaler."""

    reports_to: list[str] | None  # None: standalone
    trouble: str | None  # why the last call failed
    backlog: int  # unacknowledged outcomes
    key_loaded: bool


class SinkJson(TypedDict):
    """The delivery of events to NULL_SINK."""

    url: str  # secrets are hidden
    backlog: int  # events not accepted yet
    trouble: str | None  # why the last POST was not accepted


class LogJson(TypedDict):
    """The event log."""

    path: str
    bytes: int
    last_seq: int
    unwritten: int  # events that wait in memory
    why: str | None  # why it cannot be written


class StatusJson(TypedDict):
    """GET /status."""

    state: str  # starting, ready, errored or draining
    held: ReservationJson | None
    queue: QueueJson
    consumer: ConsumerJson
    autoscaler: AutoscalerJson
    sink: SinkJson | None  # None: NULL_SINK is not set
    log: LogJson
    instance: int | None  # Vast's id of this machine, CONTAINER_ID; None: standalone
    url: str  # of the external port, as the autoscaler knows it
    settings: dict[str, str | float | bool]  # those in force that are not the default, by variable; secrets hidden
    version: str


class CheckJson(TypedDict):
    """One check of GET /readyz."""

    ok: bool
    why: str  # why it fails or succeeds


class ReadyJson(TypedDict):
    """GET /readyz."""

    ready: bool  # whether reservations are taken; the status is 503 if not
    state: str  # starting, ready, errored or draining
    checks: dict[str, CheckJson]  # by name: log, key, consumer, draining


class Status:
    """Builds the status document. `autoscaler` and `reporter` are None for a standalone worker."""

    def __init__(
        self,
        service: Service,
        event_log: EventLog,
        autoscaler: AutoscalerClient | None,
        reporter: Reporter | None,
        health: HealthPoll | None,
        sink: Sink | None,
        settings: Settings,
    ) -> None:
        self._service = service
        self._log = event_log
        self._autoscaler = autoscaler
        self._reporter = reporter
        self._health = health
        self._sink = sink
        self._settings = settings

    def document(self) -> StatusJson:
        """The present state of the worker."""
        service, readiness, now = self._service, self._service.readiness, self._service.now()
        book = service.book
        head = next(iter(book.queue.values()), None)
        attachment = None if book.held is None else book.held.attachment
        addresses = None if self._autoscaler is None else map(without_secrets, self._autoscaler.addresses)
        return {
            "state": readiness.state,
            "held": None if book.held is None else reservation_json(book.held, now),
            "queue": {
                "length": len(book.queue),
                "limit": book.limits.max_queued,
                "oldest_seconds": None if head is None else elapsed(head.queued_at, now),
            },
            "consumer": {
                "healthy": readiness.consumer_healthy,
                "url": without_secrets(self._health.url) if self._health else None,
                "last": self._health.last if self._health else None,
                "why": readiness.consumer,
                "attached": attachment is not None and attachment.state == "attached",
                "attached_at": None if attachment is None or attachment.first_at is None else iso(attachment.first_at),
            },
            "autoscaler": {
                "reports_to": None if addresses is None else list(addresses),
                "trouble": None if self._autoscaler is None else self._autoscaler.trouble,
                "backlog": 0 if self._reporter is None else self._reporter.backlog,
                "key_loaded": readiness.key is None,
            },
            "sink": None
            if self._sink is None
            else {"url": self._sink.shown, "backlog": self._sink.backlog, "trouble": self._sink.trouble},
            "log": {
                # a path may contain bytes that are not text, PEP 383
                "path": os.fsencode(self._log.path).decode(errors="backslashreplace"),
                "bytes": self._log.size(),
                "last_seq": self._log.last_seq,
                "unwritten": len(service.unwritten),
                "why": readiness.log,
            },
            "instance": self._settings.container_id,
            "url": self._settings.own_url,
            "settings": self._settings.in_force(),
            "version": __version__,
        }
