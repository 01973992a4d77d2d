"""What a worker listens on: the external port, the control port, and the two that a user may want beside them.

The one rule: nothing of the control port is served on another.
"""

from __future__ import annotations

import dataclasses
import socket
import ssl

from aiohttp import web

from nullworker.errors import CannotStart, Unauthorized
from nullworker.http.control import Control, Status, control_app
from nullworker.http.external import External, external_app, session_end_app
from nullworker.http.grants import Gate
from nullworker.http.server import Port
from nullworker.http.sessions import Sessions
from nullworker.http.wire import make_app, same_secret
from nullworker.log import EventLog
from nullworker.logs import get_log
from nullworker.metrics.exporter import Exporter
from nullworker.ports import listen, raise_fd_limit, shares, tls
from nullworker.service import Service
from nullworker.settings import Settings

log = get_log(__name__)


class Sites:
    """The sockets of one worker, and the apps on them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tls: ssl.SSLContext | None = None
        self._sockets: list[socket.socket] = []

    def take(self) -> Settings:
        """Listen on the control port and the external one.

        Returns the settings with the ports that were taken, where any free one was asked for.

        Raises:
            CannotStart: a port or the certificate cannot be had.
        """
        settings = self._settings
        self._tls = tls() if settings.use_ssl else None
        self._control = self._take(settings.null_control_port, host="127.0.0.1", variable="NULL_CONTROL_PORT")
        self._external = self._take(settings.worker_port, host=None, variable="WORKER_PORT")
        self._settings = dataclasses.replace(
            settings,
            worker_port=self._external.getsockname()[1],
            null_control_port=self._control.getsockname()[1],
        )
        return self._settings

    def ports(
        self,
        service: Service,
        event_log: EventLog,
        gate: Gate,
        exporter: Exporter,
        status: Status,
        *,
        shutdown_seconds: float,
    ) -> list[Port]:
        """Each port with its app, to be started.

        Raises:
            CannotStart: a port that was asked for cannot be had.
        """
        settings = self._settings
        http_port = settings.worker_port + 1 if settings.worker_http_port is None else settings.worker_http_port
        own = [
            *(("127.0.0.1", port) for port in (settings.worker_port, settings.null_control_port, http_port)),
            (settings.public_ipaddr, settings.vast_tcp_port or settings.worker_port),
        ]
        sessions = Sessions(service, gate, own_addresses=own)
        external = External(service, event_log, gate, master_token=settings.master_token)
        control = Control(service, event_log, exporter, status)
        stub_health = settings.backend_health_url is None
        local = [(control_app(control, exporter, exporter.answer, stub_health=stub_health), self._control)]
        try:
            sock = self._take(http_port, host="127.0.0.1", variable="WORKER_HTTP_PORT")
            local.append((session_end_app(sessions, exporter), sock))
        except (CannotStart, OverflowError) as error:
            if settings.worker_http_port is not None:
                raise
            log.warning("session_end_port_taken", port=http_port, why=str(error), message="set WORKER_HTTP_PORT for it")
        if settings.null_metrics_host is not None and settings.null_metrics_port is not None:
            sock = self._take(settings.null_metrics_port, host=settings.null_metrics_host, variable="NULL_METRICS_PORT")
            local.append((_metrics_app(exporter, settings.null_metrics_token), sock))
        most, most_local = shares(raise_fd_limit(), settings.null_max_queued)
        app = external_app(external, sessions, exporter)
        return [
            Port(app, self._external, most=most, tls=self._tls, shutdown_seconds=shutdown_seconds),
            *(Port(app, sock, most=most_local, shutdown_seconds=shutdown_seconds) for app, sock in local),
        ]

    def close(self) -> None:
        """Listen no more."""
        for sock in self._sockets:
            sock.close()

    def _take(self, port: int, *, host: str | None, variable: str) -> socket.socket:
        self._sockets.append(listen(port, host=host, variable=variable))
        return self._sockets[-1]


def _metrics_app(exporter: Exporter, token: str | None) -> web.Application:
    def guard(request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if token and not same_secret(given, f"Bearer {token}"):
            raise Unauthorized("the token is not NULL_METRICS_TOKEN", reason="token")

    app = make_app("metrics", exporter, guard=guard)
    app.router.add_get("/metrics", exporter.answer)
    return app
