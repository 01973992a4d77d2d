"""A fake of Vast Serverless on 127.0.0.1: signs grants, routes the official client, and accepts workers' reports.

It starts no workers and has no accounts, TLS or scaling. Every call passes through `_take`, which applies its fault, if
one is set, and records it. Shapes are those that vastai 1.9.1 sends and parses (client/client.py, client/endpoint.py,
server/lib/metrics.py).
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TextIO

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa

from nullworker.clock import SystemClock
from nullworker.testing import console, faults, keys, payloads
from nullworker.testing.recorder import Json, Recorder, Seen
from nullworker.testing.routing import Parameters, Router

POLL_SECONDS = 15.0  # the SDK polls /route/ at least every 5 s: a client that is silent for longer is gone


class FakeAutoscaler(Recorder):
    """`async with FakeAutoscaler() as vast:` listens until the block ends. One endpoint, any number of workers.

    Args:
        port: on 127.0.0.1; 0 takes any free one. Entering the block raises OSError when it is taken.
        endpoint: the name of the endpoint.
        parameters: the endpoint's parameters.
        key: an RSA key, or a PEM file that keeps it over restarts; None makes a new one.
        mtoken: reports with another MASTER_TOKEN get 403; None accepts any.
        api_key: the account's calls with another key get 401; None accepts any.
        record: gets each accepted message as a JSON line.
        tell: called with a line of text for each event.
        clock: the time in epoch seconds.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        endpoint: str = "null",
        parameters: Parameters | None = None,
        key: rsa.RSAPrivateKey | Path | None = None,
        mtoken: str | None = None,
        api_key: str | None = None,
        record: TextIO | None = None,
        tell: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(record)
        self.port = port
        self.endpoint = endpoint
        self.parameters = parameters or Parameters()
        self.key = key if isinstance(key, rsa.RSAPrivateKey) else keys.load_or_make(key)
        self.mtoken = mtoken
        self.api_key = api_key
        self.faults = faults.Faults()
        self.fleet = Router(self.parameters)
        self._tell, self._clock = tell, clock or SystemClock().now
        self._started_at = self._clock()
        self._idxs, self._reqnums = count(1), count(1)
        self._signatures: dict[str, str] = {}  # by url; a signature costs 0.6 ms
        self._waiting: dict[int, tuple[float, float]] = {}  # request_idx: (cost, last poll)
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None

    # ---- for tests ----

    @property
    def url(self) -> str:
        """Its URL: the REPORT_ADDR of a worker, the autoscaler_url and webserver_url of the client."""
        return f"http://127.0.0.1:{self.port}"

    def grant(
        self,
        url: str,
        *,
        cost: float | str = 100,
        endpoint: str | None = None,
        reqnum: int | None = None,
        request_idx: int | None = None,
    ) -> Json:
        """A signed `auth_data` for the worker at `url`. By default reqnum and request_idx are new ones."""
        if url not in self._signatures:
            self._signatures[url] = keys.sign(self.key, url)
        return {
            "cost": cost,
            "endpoint": self.endpoint if endpoint is None else endpoint,
            "reqnum": next(self._reqnums) if reqnum is None else reqnum,
            "request_idx": next(self._idxs) if request_idx is None else request_idx,
            "signature": self._signatures[url],
            "url": url,
        }

    def fail(self, call: faults.Call, how: faults.How, *, times: int | None = None, seconds: float = 0.0) -> None:
        """Make the next `times` calls (None: until `clear`) fail as `how` says, see `Fault`. Raises ValueError."""
        self.faults.put(call, faults.Fault(how, times, seconds))

    def clear(self, call: faults.Call | None = None) -> None:
        """Remove the fault of one call, or all faults."""
        self.faults.clear(call)

    @property
    def waiting(self) -> list[int]:
        """The request_idx of each client that polls for a worker and has none yet."""
        return list(self._asking())

    @property
    def waiting_load(self) -> float:
        """The sum of the costs of all requests in `waiting`."""
        return sum(self._asking().values())

    def _asking(self) -> dict[int, float]:
        now = self._clock()
        return {idx: cost for idx, (cost, polled_at) in self._waiting.items() if now < polled_at + POLL_SECONDS}

    # ---- life ----

    async def __aenter__(self) -> "FakeAutoscaler":
        app = web.Application(client_max_size=64 * 2**20)  # a backlog of hours may arrive as one batch
        app.add_routes(
            [
                web.get("/pubkey/", self._pubkey),
                web.post("/worker_status/", self._worker_status),
                web.post("/delete_requests/", self._delete_requests),
                web.post("/route/", self._route),
                web.get("/api/v0/endptjobs/", self._endpoints),
                web.get("/api/v0/endptjobs/{id}/", self._endpoint_by_id),
                web.post("/get_endpoint_workers/", self._workers),
                web.get("/api/v1/instances/", self._instances),
                web.route("*", "/faults", self._faults),
            ]
        )
        # handler_cancellation: a hang-up ends the handler of a late answer.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- what workers and clients call ----

    async def _pubkey(self, request: web.Request) -> web.StreamResponse:
        return await self._take("pubkey", request, lambda payload: web.Response(text=keys.public_pem(self.key)))

    async def _worker_status(self, request: web.Request) -> web.StreamResponse:
        def accept(status: Json) -> web.Response:
            self._check_sender(status, payloads.STATUS)
            full = {**payloads.SILENT, **status}
            check(full, payloads.REPORT)
            self.take_status(status, self._clock())
            self.fleet.report(full, self._clock())
            return web.json_response({})

        return await self._take("worker_status", request, accept)

    async def _delete_requests(self, request: web.Request) -> web.StreamResponse:
        def accept(batch: Json) -> web.Response:
            self._check_sender(batch, payloads.BATCH)
            if not all(
                isinstance(entry, dict) and type(entry.get("request_idx")) is int for entry in batch["requests"]
            ):
                raise refused(400, "each of requests needs a request_idx")
            self.take_batch(batch, self._clock())
            for outcome in batch["requests"]:
                self.fleet.end(batch["worker_id"], outcome["request_idx"])
            return web.json_response({})

        return await self._take("delete_requests", request, accept)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        def accept(call: Json) -> web.Response:
            check(call, payloads.ROUTE)
            if call["endpoint"] != self.endpoint:
                raise refused(404, f"no endpoint named {call['endpoint']!r}: the only one is {self.endpoint!r}")
            if call["api_key"] != payloads.endpoint_key(self.endpoint):
                self._check_account(call["api_key"])
            idx, cost = call["request_idx"] or next(self._idxs), call["cost"]
            url = self.fleet.grant(idx, cost, self._clock())
            if url is None:
                if idx not in self._waiting:
                    self._tell(f"route            request {idx} waits for a worker")
                self._waiting[idx] = (cost, self._clock())
                return web.json_response({"request_idx": idx})
            self._waiting.pop(idx, None)
            self._tell(f"route            request {idx} goes to {url}")
            return web.json_response(self.grant(url, cost=cost, request_idx=idx))

        return await self._take("route", request, accept)

    async def _endpoints(self, request: web.Request) -> web.Response:
        self._check_account(request.query.get("api_key"))
        return web.json_response({"success": True, "results": [self._described()]})

    async def _endpoint_by_id(self, request: web.Request) -> web.Response:
        self._check_account(request.query.get("api_key"))
        if request.match_info["id"] != str(payloads.ENDPOINT_ID):
            raise refused(404, "no such endpoint")
        return web.json_response({"success": True, "result": self._described()})

    async def _workers(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        self._check_account(body.get("api_key"))
        now, fleet = self._clock(), self.fleet
        workers = [payloads.worker(worker, now, stopped=id in fleet.stopped) for id, worker in fleet.workers.items()]
        return web.json_response(workers)

    async def _instances(self, request: web.Request) -> web.Response:
        self._check_account(request.headers.get("Authorization", "").removeprefix("Bearer "))
        instances = [payloads.instance(worker) for worker in self.fleet.workers.values() if worker.status["url"]]
        return web.json_response({"success": True, "instances": instances, "next_token": None})

    async def _faults(self, request: web.Request) -> web.Response:
        """GET lists the faults, POST sets one, DELETE removes all or that of ?call=."""
        try:
            if request.method == "POST":
                self.faults.put(*faults.parse(await json_object(request)))
            elif request.method == "DELETE":
                self.faults.clear(faults.call_named(request.query["call"]) if "call" in request.query else None)
        except ValueError as error:
            raise refused(422, str(error)) from error
        return web.json_response({call: asdict(fault) for call, fault in self.faults.active.items()})

    # ---- the common path of all calls ----

    async def _take(
        self, call: faults.Call, request: web.Request, accept: Callable[[Json], web.Response]
    ) -> web.StreamResponse:
        """Read a call, apply its fault, record it. `accept` changes the state or raises a refusal."""
        payload = await json_object(request) if request.method == "POST" else {}
        fault = self.faults.take(call)
        accepted = fault is None or fault.accepts
        answer: web.StreamResponse = web.json_response({"error": "as the fault says"}, status=500)
        try:
            if accepted:
                answer = accept(payload)
        except web.HTTPException as refusal:
            accepted, answer = False, web.json_response(text=refusal.text, status=refusal.status)
        for line in console.lines(call, payload, accepted, None if fault is None else fault.how):
            self._tell(line)
        self.note(Seen(self._clock(), call, payload, accepted))
        if fault is None:
            return answer
        if isinstance(fault.how, int):
            return web.json_response({"error": "as the fault says"}, status=fault.how)
        if fault.how == "slow":
            await self._pause(fault.seconds)
            return answer
        if fault.how == "late":
            await self._pause(None)
        if request.transport is not None:
            request.transport.abort()  # "down", and "late" at the end of the block: no answer is sent
        return answer

    async def _pause(self, seconds: float | None) -> None:
        """Wait for so many seconds (None: forever), or until the block ends."""
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except asyncio.TimeoutError:
            return

    def _check_sender(self, message: Json, kinds: payloads.Kinds) -> None:
        check(message, kinds)
        if self.mtoken is not None and message["mtoken"] != self.mtoken:
            raise refused(403, "mtoken is not the one that is expected")

    def _check_account(self, api_key: object) -> None:
        if self.api_key is not None and api_key != self.api_key:
            raise refused(401, "api_key is not the one that is expected")

    def _described(self) -> Json:
        return payloads.endpoint(self.endpoint, self.parameters, self._started_at)


async def json_object(request: web.Request) -> Json:
    """The body as a JSON object. Raises a 400 if it is none."""
    try:
        body = await request.json()
    except ValueError as error:
        raise refused(400, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise refused(400, "the body is not a JSON object")
    return body


def check(message: Json, kinds: payloads.Kinds) -> None:
    """Raise a 400 that names the first field that is missing or of the wrong type."""
    if name := payloads.wrong(message, kinds):
        raise refused(400, f"{name} is missing or of the wrong type")


def refused(status: int, error: str) -> web.HTTPException:
    """An error answer, to be raised."""
    kinds = {401: web.HTTPUnauthorized, 403: web.HTTPForbidden, 404: web.HTTPNotFound, 422: web.HTTPUnprocessableEntity}
    kind = kinds.get(status, web.HTTPBadRequest)
    return kind(text=json.dumps({"error": error}), content_type="application/json")
