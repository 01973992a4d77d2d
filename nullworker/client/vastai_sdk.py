"""Wraps the official `vastai` SDK (1.9.1): finds an endpoint, and asks the autoscaler for workers, with backoff.

Only this file uses private attributes of the SDK: `_session`, `_ssl_context` and `Endpoint._route`. Workers are not
called through the SDK, which would send them the endpoint's API key.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import re
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from nullworker.aio import Backoff, wait_for
from nullworker.client.worker_http import HoldError

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
Say = Callable[[str], None]

#: The API key for a fake autoscaler, which does not check it.
STAND_IN_KEY: Final = "stand-in"
#: Seconds to wait for a worker: a cold one has to be started and loaded first.
WAIT_SECONDS: Final = 600.0
#: Seconds between two calls of /route/ at most: the SDK's own max_poll_interval.
PAUSE_SECONDS: Final = 5.0
#: Seconds between two lines that say that it still waits.
NEWS_SECONDS: Final = 10.0
#: Seconds in which a given autoscaler must accept a connection.
CONNECT_SECONDS: Final = 3.0
#: Seconds for which the autoscaler replays a waiting claim (the SDK's value).
REPLAY_SECONDS: Final = 60.0


#: What Vast lists a worker as whose machine does not run: no process of it is left, though it may be started again
#: (docs.vast.ai/documentation/serverless/worker-states).
OFF: Final = frozenset(("STOPPED", "DESTROYING"))


class VastUnreachable(HoldError):
    """Vast does not answer, or refuses for now."""


class Patience:
    """The time limit of a claim, its backoff, and its progress messages. `trouble`: why the last try failed."""

    def __init__(self, say: Say, timeout: float) -> None:
        self.say, self.timeout = say, timeout
        self.now = asyncio.get_running_loop().time
        self.since = self.now()
        self.trouble = ""
        self.backoff = Backoff(0.25, PAUSE_SECONDS)

    @property
    def left(self) -> float:
        """Seconds left of the timeout, at least 0."""
        return max(0.0, self.since + self.timeout - self.now())

    async def within(self, awaitable: Awaitable[T]) -> T:
        """Await it within the rest of the timeout.

        Raises:
            HoldError: it took longer.
        """
        try:
            return await wait_for(awaitable, self.left)
        except asyncio.TimeoutError:
            raise self.over() from None

    async def pause(self, trouble: str) -> None:
        """Wait after a failed try.

        Raises:
            HoldError: the timeout is over.
        """
        self.trouble = trouble
        self.say(f"{trouble}: trying again")
        await asyncio.sleep(min(self.backoff.failed(), self.left))
        if not self.left:
            raise self.over()

    def over(self, worker: str = "") -> HoldError:
        """The error for the end of the timeout. `worker`: the last one that was asked and did not answer."""
        trouble = f" (last: {self.trouble})" if self.trouble else ""
        advice = "raise --timeout, or the endpoint's max_workers"
        if worker:
            trouble = f": {worker} was asked, and did not begin to hold"
            advice = "raise --timeout; for a worker that cannot stream, use --no-stream"
        return HoldError(f"no worker within {self.timeout:g} s{trouble}; {advice}")


class Grant(NamedTuple):
    """A worker's url, and the autoscaler's signed permission to reserve it."""

    url: str
    auth_data: dict[str, Any]


class VastEndpoint:
    """One endpoint of Vast Serverless.

    Attributes:
        sdk: the SDK's own Endpoint.
        http: an HTTP client that trusts Vast's workers.
    """

    def __init__(self, sdk: Any, http: aiohttp.ClientSession) -> None:
        self.sdk, self.http = sdk, http

    async def grant(self, patience: Patience, *, cost: float, request_idx: int = 0) -> Grant:
        """The next worker that is ready, which may need to be started first.

        Args:
            request_idx: that of the grant before, when its worker refused: it stays the same request.

        Raises:
            HoldError: there is none within the time, or the autoscaler refuses for good.
        """
        news_at, poll = patience.now(), 1.0
        while True:
            if not patience.left:
                raise patience.over()
            try:
                answer = await patience.within(self.sdk._route(cost=cost, req_idx=request_idx, timeout=REPLAY_SECONDS))
            except RuntimeError as error:  # "Failed to route endpoint: HTTP 500 - ..." (client/endpoint.py)
                if re.search(r"HTTP 4(?!08|29)", str(error)):  # a wrong key or name stays wrong
                    raise HoldError(_with_advice(str(error))) from error
                await patience.pause(str(error))
                continue
            if answer.status == "READY":
                return Grant(str(answer.get_url()).rstrip("/"), dict(answer.body))
            request_idx = answer.request_idx or request_idx
            if patience.now() >= news_at:
                patience.say(f"waiting for a worker ({patience.now() - patience.since:.0f} s)")
                news_at = patience.now() + NEWS_SECONDS
            await asyncio.sleep(min(poll, patience.left))
            poll = random.uniform(0.5, PAUSE_SECONDS)  # noqa: S311  # spreads the polls of many clients

    async def workers(self) -> list[Any]:
        """The endpoint's workers: the SDK's `Worker`s, with `id`, `status`, `perf`, `cur_perf`, `reqs_working`.

        Raises:
            HoldError: they cannot be listed.
        """
        try:
            return list(await self.sdk.get_workers())
        except Exception as error:  # the SDK raises bare Exceptions, and aiohttp's
            raise HoldError(_with_advice(str(error) or type(error).__name__)) from error

    async def gone(self, instance: str | None) -> bool:
        """Whether the worker of that CONTAINER_ID is known to run no more: it is not listed, or as stopped."""
        if instance is None:
            return False
        with suppress(HoldError):
            return all(str(worker.id) != instance or is_off(worker) for worker in await self.workers())
        return False


def is_off(worker: Any) -> bool:
    """Whether the machine of one of the SDK's `Worker`s does not run."""
    return str(worker.status).upper() in OFF


def _with_advice(error: str) -> str:
    return error + ("; check VAST_API_KEY" if re.search("HTTP 40[13]", error) else "")


@asynccontextmanager
async def connect(
    endpoint: str, api_key: str, autoscaler: str | None, patience: Patience
) -> AsyncIterator[VastEndpoint]:
    """Connect to the endpoint of that name. `autoscaler`: the url of a fake one; None is Vast itself.

    Raises:
        VastUnreachable: `autoscaler`, or Vast, does not answer.
        HoldError: the SDK is not installed, the key is refused, or there is no such endpoint.
    """
    import aiohttp

    sdk = _sdk()
    patience.since = patience.now()  # not before: the import alone blocks for 0.8 s
    if autoscaler is not None:
        await _check_listening(autoscaler)
    urls = {} if autoscaler is None else {"autoscaler_url": autoscaler, "webserver_url": autoscaler}
    client = sdk(api_key, **urls)
    if autoscaler is not None:
        client._ssl_context = ssl.create_default_context()  # else the SDK downloads Vast's root certificate
    try:
        connector = aiohttp.TCPConnector(ssl=await client.get_ssl_context())
    except Exception as error:  # the SDK raises bare Exceptions, and aiohttp's
        raise VastUnreachable(f"Vast's root certificate cannot be fetched: {error or type(error).__name__}") from error
    client._session = aiohttp.ClientSession(connector=connector)
    async with client:
        where = autoscaler or client.vast_web_url
        patience.say(f"looking for endpoint {endpoint!r} at {where}")
        try:
            endpoints = {found.name: found for found in await wait_for(client.get_endpoints(), patience.left)}
        except asyncio.TimeoutError:
            raise VastUnreachable(f"{where} does not answer") from None
        except Exception as error:  # as above
            words = _with_advice(str(error) or type(error).__name__)
            raise (HoldError if "VAST_API_KEY" in words else VastUnreachable)(words) from error
        if endpoint not in endpoints:
            names = ", ".join(sorted(endpoints)) or "none"
            raise HoldError(f"no endpoint named {endpoint!r} at {where}; there is: {names}")
        yield VastEndpoint(endpoints[endpoint], client._session)


async def _check_listening(url: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        _, writer = await wait_for(asyncio.open_connection(parts.hostname, port), CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        raise VastUnreachable(f"--autoscaler: nothing answers at {url}; is `nullworker dev` running there?") from error
    writer.close()


def _sdk() -> Callable[..., Any]:
    # CoroutineServerless, and not Serverless: cancelling it reaches the connection without a task in between.
    logging.getLogger("vastai").addHandler(logging.NullHandler())  # else its import adds one that writes to stderr
    client: Callable[..., Any] | None = None
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")  # of the 39 distributions that it imports
        client = importlib.import_module("vastai").CoroutineServerless  # None when its own dependencies are missing
    if client is None:
        raise HoldError("the official client is not installed: pip install 'nullworker[client]'")
    return client
