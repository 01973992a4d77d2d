"""The dispatcher's port on 127.0.0.1: /status, /readyz, /metrics. A Host or Origin that is not local gets 403."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from nullworker.dispatch.dispatcher import Dispatcher
from nullworker.dispatch.metrics import Exporter
from nullworker.errors import Forbidden
from nullworker.http.responses import json_response, make_app
from nullworker.http.server import Server
from nullworker.http.sockets import LOCAL_CONNECTIONS

_LOCAL = frozenset(("127.0.0.1", "localhost", "::1"))


def server(dispatcher: Dispatcher, listener: socket.socket) -> Server:
    """The server, not yet started."""

    async def status(_: web.Request) -> web.Response:
        return json_response(dispatcher.status())

    async def readyz(_: web.Request) -> web.Response:
        checks = dispatcher.readiness()
        ready = not any(checks.values())
        shown = {name: {"ok": why is None, "why": why} for name, why in checks.items()}
        return json_response({"ready": ready, "checks": shown}, 200 if ready else 503)

    exporter = Exporter(dispatcher)
    app = make_app("dispatch", exporter, guard=_only_local)
    app.router.add_get("/status", status)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", make_aiohttp_handler(exporter.registry))
    return Server(app, listener, max_connections=LOCAL_CONNECTIONS)


def _only_local(request: web.BaseRequest) -> None:
    """Refuse pages of other sites, and DNS rebinding."""
    origin = request.headers.get("Origin")
    hosts = [urlsplit(f"//{request.host}").hostname, urlsplit(origin).hostname if origin is not None else "localhost"]
    if not all(host in _LOCAL for host in hosts):
        raise Forbidden("this port answers only to this machine, under 127.0.0.1 or localhost")
