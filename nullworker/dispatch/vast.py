"""Vast's side of a dispatcher, through the official SDK: grants, the endpoint's workers, and prices of instances.

All use of the SDK's private attributes is in this file: `Endpoint._route`, which returns a worker without calling it,
and the client's `_session`. The account's key is sent only to Vast, never to a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from nullworker.aio import wait_for
from nullworker.client.vastai_sdk import Patience, VastUnreachable, connect, is_off
from nullworker.client.worker_http import HoldError
from nullworker.clock import stopwatch
from nullworker.dispatch.trouble import Trouble
from nullworker.errors import CannotStart
from nullworker.logs import get_log
from nullworker.outgoing import describe_failure

log = get_log(__name__)

#: Seconds for which the engine keeps a request that is not repeated; the SDK's value (vastai 1.9.1, client.py).
REPLAY_SECONDS: Final = 60.0
#: Seconds for a call of the account's API.
API_SECONDS: Final = 20.0
#: Seconds for which a list of the workers is cached for all claims.
FRESH_SECONDS: Final = 5.0
#: Seconds without an answer until it is logged; the SDK tries five times in them.
CONNECT_SECONDS: Final = 8.0


class Unreachable(Exception):
    """Vast did not answer, or refuses for now; the message contains no key."""


class Grant(NamedTuple):
    """A worker that may be asked, and the grant for it."""

    url: str
    auth_data: dict[str, Any]


class Routed(NamedTuple):
    """The engine's answer: a grant, or None for now. `request_idx` is sent with the next request."""

    grant: Grant | None
    request_idx: int


class WorkerSeen(NamedTuple):
    """A worker, as the engine sees it."""

    instance: int
    working: int  # number of its requests and sessions
    off: bool  # its machine is stopped


class Instance(NamedTuple):
    """A rented machine."""

    instance: int
    price: float  # dollars an hour


class Vast:
    """One endpoint. Until `connect` has succeeded, `route` waits, and the other calls raise Unreachable."""

    def __init__(self, endpoint: str, api_key: str, autoscaler: str | None) -> None:
        self.endpoint = endpoint
        self._answered = False
        self._asking = asyncio.Lock()
        self._running: tuple[float, frozenset[int]] | None = None
        self._trouble = Trouble("autoscaler_unreachable", "no worker can be asked for; what is held stays")
        self._ready = asyncio.Event()
        self._key = api_key
        self._autoscaler = autoscaler
        self._stack = contextlib.AsyncExitStack()
        self._found: Any = None

    @property
    def trouble(self) -> str | None:
        """Why the last call failed; None: it succeeded."""
        return self._trouble.why or (None if self._answered else "no call has been answered yet")

    async def connect(self) -> None:
        """Find the endpoint.

        Raises:
            CannotStart: there is none of this name, the key is refused, or the SDK is not installed.
            Unreachable: Vast does not answer.
        """
        try:
            patience = Patience(lambda line: None, CONNECT_SECONDS)
            context = connect(self.endpoint, self._key, self._autoscaler, patience)
            self._found = (await self._stack.enter_async_context(context)).sdk
        except VastUnreachable as error:
            raise self._unreachable(error) from None
        except HoldError as error:
            raise CannotStart(self._without_key(str(error))) from None
        self._worked()
        self._ready.set()

    async def route(self, cost: float, request_idx: int) -> Routed:
        """Ask the engine for a worker once, when connected. `request_idx`: that of the last answer, 0 at first."""
        await self._ready.wait()
        found = self._connected()
        answer = await self._call(found._route(cost=cost, req_idx=request_idx, timeout=REPLAY_SECONDS))
        idx = int(answer.request_idx or request_idx or 0)
        if answer.status != "READY":
            return Routed(None, idx)
        return Routed(Grant(str(answer.get_url()).rstrip("/"), dict(answer.body)), idx)

    async def workers(self) -> list[WorkerSeen]:
        """The endpoint's workers."""
        found = self._connected()
        listed = await self._call(found.get_workers())
        return [WorkerSeen(each.id, each.reqs_working, is_off(each)) for each in listed]

    async def running(self) -> frozenset[int]:
        """The instances of the endpoint whose machines are running, cached for some seconds."""
        async with self._asking:
            if self._running is None or stopwatch() - self._running[0] > FRESH_SECONDS:
                asked_at = stopwatch()
                workers = await self.workers()
                self._running = asked_at, frozenset(each.instance for each in workers if not each.off)
            return self._running[1]

    async def instances(self) -> dict[str, Instance]:
        """The account's instances by their number, and by `host:port` of their external ports, with their prices.

        Shape: vastai 1.9.1, api/instances.py (`/api/v1/instances/`, pages by `after_token`) and the `ports` of docker.
        """
        found, instances, after = self._connected(), {}, None
        while True:
            try:
                page = await wait_for(self._page(found.client, after), API_SECONDS)
            except Exception as error:
                raise Unreachable(self._words(error)) from None
            for each in page.get("instances") or ():
                with contextlib.suppress(
                    KeyError, TypeError, ValueError, AttributeError
                ):  # an instance that is not running yet
                    seen = instances[str(each["id"])] = Instance(int(each["id"]), float(each["dph_total"]))
                    for bindings in each["ports"].values():
                        for binding in bindings:
                            instances[f"{str(each['public_ipaddr']).strip()}:{int(binding['HostPort'])}"] = seen
            after = page.get("next_token")
            if not after:
                return instances

    async def ssl_context(self) -> ssl.SSLContext:
        """The TLS context for workers' certificates."""
        context: ssl.SSLContext = await self._call(self._connected().client.get_ssl_context())
        return context

    async def close(self) -> None:
        """Close its connections."""
        await self._stack.aclose()

    async def _page(self, client: Any, after: str | None) -> dict[str, Any]:
        params = {"limit": "100", **({"after_token": after} if after else {})}
        headers = {"Authorization": f"Bearer {self._key}"}
        url = f"{client.vast_web_url}/api/v1/instances/"
        async with client._session.get(url, params=params, headers=headers) as answer:
            if answer.status != 200:
                raise Unreachable(f"{urlsplit(url).netloc} answered {answer.status} for the instances' prices")
            page: dict[str, Any] = await answer.json(content_type=None)
            return page

    def _connected(self) -> Any:
        if self._found is None:
            raise Unreachable(self.trouble)
        return self._found

    async def _call(self, call: Any) -> Any:
        try:
            answer = await wait_for(call, API_SECONDS)
        except Exception as error:  # the SDK raises bare ones
            raise self._unreachable(error) from None
        self._worked()
        return answer

    def _unreachable(self, error: BaseException) -> Unreachable:
        self._trouble.met(self._words(error))
        return Unreachable(self._trouble.why)

    def _worked(self) -> None:
        self._answered = True
        self._trouble.over()

    def _words(self, error: BaseException) -> str:
        text = " ".join(re.sub(r" ssl:(default|True|False|<[^>]*>)", "", str(error)).split())  # aiohttp's
        if isinstance(error, asyncio.TimeoutError):
            text = f"{self._autoscaler or 'Vast'} does not answer"
        return self._without_key(text[:300] or describe_failure(error))

    def _without_key(self, text: str) -> str:
        text = re.sub(r"([?&]api_key=)[^&\s'\"]*", r"\1***", text)
        return text.replace(self._key, "***") if self._key else text


def address(url: str) -> str:
    """The `host:port` of a worker's url."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def trust(ours: ssl.SSLContext, theirs: ssl.SSLContext) -> None:
    """A context with the trust of another one, Vast's root certificate included, and the same checks."""
    for certificate in theirs.get_ca_certs(binary_form=True):
        ours.load_verify_locations(cadata=certificate)
    ours.verify_flags = theirs.verify_flags
