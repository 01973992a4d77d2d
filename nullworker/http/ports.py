"""The ports that a worker listens on: external, control, and the optional ports for session ends and for metrics.

Routes of the control port are served on the control port only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from aiohttp import web

from nullworker.aio import Backoff, in_daemon_thread
from nullworker.errors import CannotStart, Unauthorized
from nullworker.eventlog.log import EventLog
from nullworker.http.auth import Authenticator
from nullworker.http.control import ControlHandlers, control_app
from nullworker.http.ended import EndedClaims
from nullworker.http.external import ExternalHandlers, external_app, session_end_app
from nullworker.http.responses import is_bearer, make_app
from nullworker.http.server import Server
from nullworker.http.sessions import SessionHandlers
from nullworker.http.sockets import listen, raise_fd_limit, shares, tls
from nullworker.http.status import Status
from nullworker.logs import get_log
from nullworker.metrics.exporter import Exporter
from nullworker.outgoing import OwnPorts
from nullworker.service import Service
from nullworker.settings import Settings

log = get_log(__name__)


class Ports:
    """All listening sockets of one worker, open from the constructor until `close`.

    Attributes:
        settings: the given ones, with 0 replaced by the port that the kernel chose.

    Raises:
        CannotStart: a port is taken, or the certificate cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self._tls = tls() if settings.use_ssl else None
            self._control = self._take(settings.null_control_port, host="127.0.0.1", variable="NULL_CONTROL_PORT")
            self._external = self._take(settings.worker_port, host=None, variable="WORKER_PORT")
            self.settings = dataclasses.replace(
                settings,
                worker_port=self._external.getsockname()[1],
                null_control_port=self._control.getsockname()[1],
            )
            self._session_end = self._take_session_end()
            self._metrics = self._take_metrics() if _is_numeric(settings.null_metrics_host) else None
        except BaseException:
            self.close()
            raise

    def servers(
        self,
        service: Service,
        event_log: EventLog,
        authenticator: Authenticator,
        exporter: Exporter,
        status: Status,
        *,
        shutdown_seconds: float,
    ) -> list[Server]:
        """A server for each socket, not yet started. `shutdown_seconds`: how long a stop waits for open requests."""
        settings = self.settings
        ended = EndedClaims(service, event_log)
        service.observers.append(ended.observe)
        sessions = SessionHandlers(service, authenticator, ended, own_ports=self.own_ports)
        external = ExternalHandlers(
            service, event_log, authenticator, sessions, ended, master_token=settings.master_token
        )
        control = ControlHandlers(service, event_log, exporter, status)
        stub_health = settings.backend_health_url is None
        local = [(control_app(control, exporter, exporter.answer, stub_health=stub_health), self._control)]
        if self._session_end is not None:
            local.append((session_end_app(sessions, exporter), self._session_end))
        if self._metrics is not None:
            local.append((_metrics_app(exporter, settings.null_metrics_token), self._metrics))
        most, most_local = shares(raise_fd_limit(), settings.null_max_queued)
        app = external_app(external, sessions, exporter, instance=settings.container_id)
        return [
            Server(app, self._external, max_connections=most, tls=self._tls, shutdown_seconds=shutdown_seconds),
            *(Server(app, sock, max_connections=most_local, shutdown_seconds=shutdown_seconds) for app, sock in local),
        ]

    def close(self) -> None:
        """Close all sockets."""
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    @property
    def listening(self) -> dict[str, int]:
        """The number of each open port: external_port, control_port, and session_end_port and metrics_port if open."""
        sockets = {
            "external_port": self._external,
            "control_port": self._control,
            "session_end_port": self._session_end,
            "metrics_port": self._metrics,
        }
        return {name: sock.getsockname()[1] for name, sock in sockets.items() if sock is not None}

    @property
    def own_ports(self) -> OwnPorts:
        """The ports of this worker, to which callbacks are refused."""
        settings = self.settings
        ports = {sock.getsockname()[1] for sock in self._sockets}
        ports |= {self._session_end_port(), settings.null_metrics_port or 0} - {0}
        return OwnPorts(ports, public=(settings.public_ipaddr, settings.vast_tcp_port or settings.worker_port))

    def _session_end_port(self) -> int:
        chosen = self.settings.worker_http_port
        return self.settings.worker_port + 1 if chosen is None else chosen

    def _take_session_end(self) -> socket.socket | None:
        port = self._session_end_port()
        try:
            return self._take(port, host="127.0.0.1", variable="WORKER_HTTP_PORT")
        except (CannotStart, OverflowError) as error:
            if self.settings.worker_http_port is not None:
                raise
            log.warning(
                "session_end_port_taken",
                port=port,
                why=str(error),
                message="the worker runs without it; set WORKER_HTTP_PORT to another port",
            )
            return None

    def late_metrics(self, exporter: Exporter) -> Coroutine[Any, Any, None] | None:
        """Serves /metrics once its address exists and its port is free. None: it is open, or not wanted."""
        settings = self.settings
        if self._metrics is not None or settings.null_metrics_host is None:
            return None
        return _serve_metrics_late(settings, _metrics_app(exporter, settings.null_metrics_token))

    def _take_metrics(self) -> socket.socket | None:
        try:
            self._sockets.append(_listen_for_metrics(self.settings))
        except CannotStart:  # said by `late_metrics`, which tries again
            return None
        return self._sockets[-1]

    def _take(self, port: int, *, host: str | None, variable: str) -> socket.socket:
        self._sockets.append(listen(port, host=host, variable=variable))
        return self._sockets[-1]


def _listen_for_metrics(settings: Settings) -> socket.socket:
    return listen(settings.null_metrics_port or 0, host=settings.null_metrics_host, variable="NULL_METRICS_PORT")


def _is_numeric(host: str | None) -> bool:
    """Whether it is an address, for which no name server is asked."""
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


async def _serve_metrics_late(settings: Settings, app: web.Application) -> None:
    """Retry until it can be listened on: WireGuard, for example, may start after the worker."""
    backoff = Backoff()
    while True:
        try:
            sock = await in_daemon_thread(_listen_for_metrics, settings)
            break
        except (CannotStart, ValueError) as error:
            log.warning("metrics_site_not_up", why=str(error), message="the worker runs without it and tries again")
            await asyncio.sleep(backoff.failed())
    _, most = shares(raise_fd_limit(), settings.null_max_queued)
    server = Server(app, sock, max_connections=most, shutdown_seconds=0.1)
    try:
        await server.start()
        log.info("metrics_site_up", host=settings.null_metrics_host, port=sock.getsockname()[1])
        await asyncio.Event().wait()
    finally:
        await server.stop()
        sock.close()


def _metrics_app(exporter: Exporter, token: str | None) -> web.Application:
    def guard(request: web.BaseRequest) -> None:
        if token and not is_bearer(request, token):
            raise Unauthorized("the token is not NULL_METRICS_TOKEN", reason="token")

    app = make_app("metrics", exporter, guard=guard)
    app.router.add_get("/metrics", exporter.answer)
    return app
