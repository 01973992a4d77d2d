"""The ports of the collector: POST /events for the workers, and page, /metrics, /status for people.

On loopback, one port may serve both. A port that can be reached from elsewhere, directly or through a proxy, serves
only POST /events. The token is checked before a body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web

from nullworker import __version__, aio
from nullworker.clock import stopwatch, wall
from nullworker.collector import batch, queries
from nullworker.collector.metrics import CollectMetrics, Readings
from nullworker.collector.store import Store, StoreUnavailable, open_store
from nullworker.errors import (
    BodyTooLarge,
    CannotStart,
    Forbidden,
    Invalid,
    SlowBody,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)
from nullworker.eventlog.cloudevents import BATCH_TYPE, KEY_HEADER
from nullworker.http.control import local_only
from nullworker.http.page import add_page
from nullworker.http.responses import is_bearer, json_response, make_app
from nullworker.http.server import Server
from nullworker.http.sockets import listen, raise_fd_limit, shares
from nullworker.logs import get_log

log = get_log(__name__)

#: The accepted content types, and whether the body is a single event.
CONTENT_TYPES: Final = {BATCH_TYPE: False, "application/json": False, "application/cloudevents+json": True}
#: Seconds in which a body must have arrived.
BODY_SECONDS: Final = 30.0
#: Bytes of all bodies that are being read; further ones get 503.
MAX_READING_BYTES: Final = 64 * 1024 * 1024
#: Seconds for which the page's document is cached: many may ask for it.
FRESH_SECONDS: Final = 1.0
#: Maximum hours of the timeline.
MAX_HOURS: Final = 31 * 24.0
_FOLDER: Final = Path(__file__).parent / "page"
_PAGE: Final = {
    "/": _FOLDER / "index.html",
    "/assets/fleet.css": _FOLDER / "fleet.css",
    "/assets/fleet.js": _FOLDER / "fleet.js",
}
#: Seconds between two checks whether the database can be written.
PROBE_SECONDS: Final = 10.0
DAY_SECONDS: Final = 86_400.0

T = TypeVar("T")


class Collector:
    """The handlers. `why` is why the database could not be written at the last attempt; None: it could."""

    def __init__(self, store: Store, token: str | None) -> None:
        self._store = store
        self._token = token
        self._reading_bytes = 0
        self._documents: dict[float, tuple[float, Any]] = {}
        self.why: str | None = None
        self.metrics = CollectMetrics(Readings(store.size, lambda: self.why is None))

    def ingest_app(self) -> web.Application:
        """The app of a port that others can reach."""
        app = make_app("events", self.metrics)
        app.router.add_post("/events", self.events)
        return app

    def page_app(self) -> web.Application:
        """The app of a port on loopback that serves people."""
        app = make_app("page", self.metrics, guard=local_only)
        self._add_page(app)
        return app

    def whole_app(self) -> web.Application:
        """The app of one port on loopback that serves both."""
        app = make_app("events", self.metrics, guard=local_only)
        app.router.add_post("/events", self.events)
        self._add_page(app)
        return app

    def _add_page(self, app: web.Application) -> None:
        add_page(app, _PAGE)
        app.router.add_get("/status", self.status)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_get("/metrics", self.scrape)

    async def events(self, request: web.Request) -> web.Response:
        """POST /events: a batch of CloudEvents. 200 when it is on disk, whole."""
        if self._token is not None and not is_bearer(request, self._token):
            raise Unauthorized("the bearer token is not the collector's", reason="token")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise UnsupportedMedia("a compressed body is not supported")
        if request.content_type not in CONTENT_TYPES:
            allowed = ", ".join(CONTENT_TYPES)
            raise UnsupportedMedia(f"Content-Type {request.content_type} is not supported; allowed: {allowed}")
        body = await self._read_body(request)
        received = batch.parse(body, single=CONTENT_TYPES[request.content_type])
        now = wall()
        try:
            added = self._store.add(received, request.headers.get(KEY_HEADER, ""), now)
        except Forbidden:
            self.metrics.count_auth_failure("key")
            raise
        except StoreUnavailable as error:
            self._note(str(error))
            raise Unavailable(f"nothing was stored: {error}") from None
        self._note(None)
        self.metrics.count_batch(added, now)
        if added.conflicts:
            log.warning(
                "conflicts", events=added.conflicts, message="different events had come with these seqs; both are kept"
            )
        return json_response({"stored": added.stored, "duplicates": added.duplicates, "conflicts": added.conflicts})

    async def status(self, request: web.Request) -> web.Response:
        """GET /status?hours=n: the document behind the page."""
        hours = _hours(request)
        made_at, document = self._documents.get(hours, (0.0, None))
        if document is None or stopwatch() - made_at > FRESH_SECONDS:
            document = await self._read(lambda conn: queries.fleet(conn, hours=hours))
            self._documents = {hours: (stopwatch(), document)}
        database = {"path": str(self._store.path), "bytes": self._store.size(), "why": self.why}
        return json_response({**document, "version": __version__, "database": database})

    async def readyz(self, request: web.Request) -> web.Response:
        """GET /readyz: whether batches are accepted, and why not."""
        self.probe()
        checks = {"database": {"ok": self.why is None, "why": self.why}}
        return json_response({"ready": self.why is None, "checks": checks}, 200 if self.why is None else 503)

    async def scrape(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics."""
        try:
            self.metrics.totals = await self._read(queries.totals)
        except Unavailable:  # the scrape shows that it is not readable, and lacks the figures of the fleet
            self.metrics.totals = None
        return await self.metrics.answer(request)

    def probe(self) -> None:
        """Check whether the database can be written."""
        try:
            self._store.probe()
        except StoreUnavailable as error:
            self._note(str(error))
        else:
            self._note(None)

    async def keep_probing(self) -> None:
        """Check every PROBE_SECONDS whether the database can be written."""
        while True:
            self.probe()
            await asyncio.sleep(PROBE_SECONDS)

    async def keep_pruning(self, keep: float) -> None:
        """Remove what ended longer ago than `keep`, in seconds, once a day, in small steps."""
        while True:
            pruned = 0
            try:
                for step in self._store.prune(wall() - keep):
                    pruned += step
                    await asyncio.sleep(0)
            except StoreUnavailable as error:
                log.warning("not_pruned", why=str(error), reservations=pruned)
            else:
                log.info("pruned", reservations=pruned)
            await asyncio.sleep(DAY_SECONDS)

    async def _read_body(self, request: web.Request) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: nothing more of it is read.
            SlowBody: it did not arrive in time.
            Unavailable: too many bodies are being read.
        """
        if (request.content_length or 0) > batch.MAX_BODY_BYTES:
            raise BodyTooLarge(f"a batch has at most {batch.MAX_BODY_BYTES} bytes")
        parts, size = list[bytes](), 0
        late = SlowBody(f"the body did not arrive within {BODY_SECONDS:g} s")
        timer = asyncio.get_running_loop().call_later(BODY_SECONDS, request.content.set_exception, late)
        try:
            while part := await request.content.readany():
                parts.append(part)
                size += len(part)
                self._reading_bytes += len(part)
                if size > batch.MAX_BODY_BYTES:
                    raise BodyTooLarge(f"a batch has at most {batch.MAX_BODY_BYTES} bytes")
                if self._reading_bytes > MAX_READING_BYTES:
                    raise Unavailable("too many batches at once")
        finally:
            timer.cancel()
            self._reading_bytes -= size
        return b"".join(parts)

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            conn = self._store.read()
            try:
                return query(conn)
            finally:
                conn.close()

        try:
            return await asyncio.to_thread(run)
        except sqlite3.Error as error:
            raise Unavailable(f"the database cannot be read: {error}") from None

    def _note(self, why: str | None) -> None:
        if why is not None and self.why is None:
            log.error(
                "database_not_writable", why=why, message="batches get 503; the workers keep them and send them again"
            )
        elif why is None and self.why is not None:
            log.info("database_writable")
        self.why = why


def _hours(request: web.Request) -> float:
    text = request.query.get("hours", "6")
    try:
        hours = float(text)
        if 0 < hours <= MAX_HOURS:
            return hours
    except ValueError:
        pass
    raise Invalid("hours is wrong", hours=f"must be a number from 0 to {MAX_HOURS:g}")


@dataclass(frozen=True)
class Options:
    """The options of `nullworker collect`. Prices in dollars per hour, ages in seconds."""

    db: Path
    host: str
    port: int
    token: str | None
    public: bool  # the port serves only POST /events, and the page has its own port
    page_port: int
    price: float | None
    prices: dict[str, float]  # by instance
    silence: float
    keep: float | None


async def serve(options: Options) -> None:
    """Collect until a signal.

    Raises:
        CannotStart: a port or the database cannot be opened.
    """
    stop = asyncio.Event()
    aio.on_signals(lambda _: stop.set())
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(open_store(options.db)))
        try:
            store.set_options(price=options.price, prices=options.prices, silence=options.silence)
        except StoreUnavailable as error:
            raise CannotStart(str(error)) from error
        collector = Collector(store, options.token)
        _, most = shares(raise_fd_limit(), 0)

        def server(app: web.Application, host: str, port: int, option: str) -> tuple[Server, str]:
            sock = stack.enter_context(contextlib.closing(listen(port, host=host or None, variable=option)))
            shown = f"[{host}]" if ":" in host else host or "*"
            return Server(app, sock, max_connections=most), f"http://{shown}:{sock.getsockname()[1]}"

        events, events_url = server(
            collector.ingest_app() if options.public else collector.whole_app(), options.host, options.port, "--port"
        )
        servers, page_url = [events], events_url
        if options.public:
            page, page_url = server(collector.page_app(), "127.0.0.1", options.page_port, "--page-port")
            servers.append(page)
        for site in servers:
            await site.start()
        log.info(
            "collector_started", version=__version__, db=str(store.path), events=f"{events_url}/events", page=page_url
        )
        tasks = [asyncio.ensure_future(collector.keep_probing())]
        if options.keep is not None:
            tasks.append(asyncio.ensure_future(collector.keep_pruning(options.keep)))
        stopping = asyncio.ensure_future(stop.wait())
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(*(site.stop() for site in servers))
        for task in done - {stopping}:
            task.result()  # raises the error of a task that has failed
        log.info("collector_stopped")
