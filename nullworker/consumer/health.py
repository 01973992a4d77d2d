"""The consumer's health endpoint. It has a thread of its own: a body that blocks the event loop is healthy."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import AsyncIterator, Callable

from nullworker.consumer import current, liveness


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    trouble: Callable[[], str | None]


class _Health(http.server.BaseHTTPRequestHandler):
    timeout = 10  # seconds in which a request must arrive
    server: _Server

    def do_GET(self) -> None:  # the name that http.server calls
        """GET /health."""
        if self.path.partition("?")[0] != "/health":
            self.send_error(404)
            return
        why = current.overdue() or self.server.trouble()
        body = json.dumps({"status": "ok"} if why is None else {"status": "error", "why": why}).encode()
        self.send_response(200 if why is None else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the worker polls often."""


@contextlib.asynccontextmanager
async def health_endpoint(
    port: int, trouble: Callable[[], str | None] = lambda: None, *, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """Serve GET /health for the worker's BACKEND_HEALTH_URL: 200 while `trouble` returns None, else 503 and its text.

    Yields the port; port 0 is any free one. `trouble` is called from another thread. The answer is also 503 while a job
    still runs long after the end of its reservation, since this consumer cannot take the next one.

    Raises:
        OSError: the port is taken.
    """
    server = _Server((host, port), _Health)
    server.trouble = trouble
    liveness.keep_from_children(server.socket)
    threading.Thread(target=server.serve_forever, args=(0.1,), name="health endpoint", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        liveness.forget(server.socket)
