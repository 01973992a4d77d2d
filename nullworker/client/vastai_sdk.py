"""Wraps the official `vastai` SDK (1.9.1): adds backoff, deadlines and progress messages.

All use of the SDK's private attributes is in this file: `_session`, `_ssl_context` and `Endpoint._route`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from nullworker.errors import NullworkerError

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
Say = Callable[[str], None]
Answer = dict[str, Any]

CLAIMS = ("/reserve", "/session/create")
PAUSE_SECONDS = 5.0  # the longest between two tries; the SDK's own max_poll_interval
NEWS_SECONDS = 10.0  # between two lines that say no more than that it still waits

ADVICE = {
    401: "the worker takes its grants from another autoscaler: check its REPORT_ADDR",
    404: "this is not the external port of a nullworker: check --url, or the endpoint's template",
    422: "correct what it names",
    429: "every worker is taken: try later, or raise the endpoint's max_workers",
    503: "the worker is stopping or cannot work: try again, or look at its /readyz",
}


class HoldError(NullworkerError):
    """It was refused, broke off, or nobody took it. `answer` is the worker's body, if it gave one."""

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        # aiohttp tells a TLS setting with each address, as a Python object even
        super().__init__(" ".join(re.sub(r" ssl:(default|True|False|<[^>]*>)", "", message).split()))
        self.answer = answer


def _describe(error: Exception) -> str:
    from nullworker.outgoing import describe_failure  # with aiohttp, which `nullworker --help` must not pay for

    return describe_failure(error)


def refusal(who: str, status: int, text: str) -> HoldError:
    """The error for an HTTP answer that says no."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    answer = body if isinstance(body, dict) else None
    what = answer["error"] if answer and "error" in answer else text[:200]
    advice = ADVICE.get(
        status, "see the worker's log" if status >= 500 else "check the command and the worker's version"
    )
    return HoldError(f"{who} answered {status} {what}; {advice}", answer)


async def bounded(awaitable: Awaitable[T], seconds: float) -> T:
    """As asyncio.wait_for, which before Python 3.12 loses a cancellation that comes together with the result.

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains of one that nobody saw


class ClaimTrace:
    """What passes between this client and a worker, as aiohttp sees it, for one claim: what to say and what to raise.

    `timeout`: seconds until the claim must have got through. `again`: whether somebody tries again after a failure.
    """

    def __init__(self, say: Say, timeout: float, *, again: bool) -> None:
        self.say, self.timeout, self.again = say, timeout, again
        self.now = asyncio.get_running_loop().time
        self.since = self.now()
        self.worker: str | None = None  # the one that has the claim now
        self.held = False  # that it is held is known: a plain request does not tell
        self.trouble = ""  # why the last try failed
        self.answer: aiohttp.ClientResponse | None = None  # to the claim; open as long as it is held

    @property
    def left(self) -> float:
        """Seconds of the timeout that are left, at least 0."""
        return max(0.0, self.since + self.timeout - self.now())

    async def in_time(self, claim: Awaitable[T]) -> T:
        """The claim's result; asyncio.TimeoutError when it has not got through."""
        return await bounded(claim, self.left)

    @asynccontextmanager
    async def in_words(self) -> AsyncIterator[None]:
        """Turns what is raised inside into a HoldError, and a cancellation into one whose message says what it did."""
        try:
            yield
        except asyncio.CancelledError:
            if self.worker is None:
                raise asyncio.CancelledError("interrupted: no worker was held") from None
            gone = "closed the connection, which ends the reservation as cancelled (client_disconnect) at"
            raise asyncio.CancelledError(f"interrupted: {gone} {self.worker}") from None
        except NullworkerError:
            raise
        except asyncio.TimeoutError as error:
            trouble = f" (last: {self.trouble})" if self.trouble else ""
            advice = "raise --timeout, or the endpoint's max_workers"
            if self.worker is not None:
                trouble = f": {self.worker} was asked, and did not say that it holds"
                advice = "raise --timeout; for a worker that cannot stream, use --no-stream"
            raise HoldError(f"no worker within {self.timeout:g} s{trouble}; {advice}") from error
        except Exception as error:  # aiohttp's errors, and the SDK's, which are bare Exceptions and RuntimeErrors
            if self.held:
                broke = f"the connection to {self.worker} broke while it was held: {_describe(error)}"
                raise HoldError(f"{broke}; the reservation has ended: ask for a new one") from error
            advice = "; check VAST_API_KEY" if re.search("HTTP 40[13]", str(error)) else ""
            raise HoldError((self.trouble or str(error) or type(error).__name__) + advice) from error
        finally:
            if self.answer is not None:
                self.answer.close()  # the SDK leaves it open when it is cancelled between the head and the first event

    def config(self) -> aiohttp.TraceConfig:
        """Hooks for the aiohttp session. No query string is ever shown: the SDK puts the api_key there."""
        import aiohttp

        async def started(_: object, __: object, call: aiohttp.TraceRequestStartParams) -> None:
            if call.url.path in CLAIMS:
                self.worker = str(call.url.origin())
                self.say(f"asking {self.worker}")

        async def ended(_: object, __: object, call: aiohttp.TraceRequestEndParams) -> None:
            if call.url.path not in CLAIMS:
                return
            self.answer, status = call.response, call.response.status
            if status >= 400:
                error = refusal(str(self.worker), status, await call.response.text())
                self.failed(str(error).rsplit(";", 1)[0], retried=status in (408, 429) or status >= 500)
            elif status == 201 or call.response.content_type == "text/event-stream":
                self.held = True
                known_as = call.response.headers.get("Nullworker-Reservation", "without an id")
                self.say(f"held on {self.worker}, reservation {known_as}")

        async def broke(_: object, __: object, call: aiohttp.TraceRequestExceptionParams) -> None:
            if call.url.path in CLAIMS and isinstance(call.exception, Exception):  # a cancellation is no failure
                self.failed(f"{self.worker} cannot be reached: {_describe(call.exception)}", retried=True)

        config = aiohttp.TraceConfig()
        config.on_request_start.append(started)
        config.on_request_end.append(ended)
        config.on_request_exception.append(broke)
        return config

    def failed(self, trouble: str, *, retried: bool) -> None:
        """A try has failed; says so when another one follows, for else the error will."""
        self.worker, self.trouble = None, trouble
        if retried and self.again:
            self.say(f"{trouble}: trying again")


@asynccontextmanager
async def connected(endpoint: str, api_key: str, autoscaler: str | None, trace: ClaimTrace) -> AsyncIterator[Any]:
    """The SDK's `Endpoint` of that name, with a client (`.client`) that talks through `trace`.

    Raises:
        HoldError: the SDK is not installed, or there is no such endpoint.
    """
    import aiohttp

    urls = {} if autoscaler is None else {"autoscaler_url": autoscaler, "webserver_url": autoscaler}
    sdk = _sdk()
    trace.since = trace.now()  # not before: the import alone blocks for 0.8 s
    client = sdk(api_key, **urls)
    if autoscaler is not None:
        client._ssl_context = ssl.create_default_context()  # else the SDK downloads Vast's root certificate
    connector = aiohttp.TCPConnector(ssl=await client.get_ssl_context())
    client._session = aiohttp.ClientSession(connector=connector, trace_configs=[trace.config()])
    async with client:
        where = autoscaler or client.vast_web_url
        trace.say(f"looking for endpoint {endpoint!r} at {where}")
        known = {candidate.name: candidate for candidate in await trace.in_time(client.get_endpoints())}
        if endpoint not in known:
            names = ", ".join(sorted(known)) or "none"
            raise HoldError(f"no endpoint named {endpoint!r} at {where}; there is: {names}")
        _make_patient(known[endpoint], trace)
        yield known[endpoint]


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


def _make_patient(endpoint: Any, trace: ClaimTrace) -> None:
    """Puts a pause and the deadline into `Endpoint._route`, which every try of the SDK goes through.

    By itself the SDK asks again at once and without end when a worker refuses the connection (6,697 times in 2 s), and
    gives up when one call of /route/ fails.
    """
    route, tries, not_before, news_at = endpoint._route, 0, trace.now(), trace.now()

    async def patient(*args: Any, **kwargs: Any) -> Any:
        nonlocal tries, not_before, news_at
        while True:
            await asyncio.sleep(min(max(0.0, not_before - trace.now()), trace.left))
            if not trace.left:
                raise asyncio.TimeoutError
            try:
                answer = await route(*args, **kwargs)
            except RuntimeError as error:  # "Failed to route endpoint: HTTP 500 - ..." (client/endpoint.py)
                if re.search(r"HTTP 4(?!08|29)", str(error)):  # a wrong key or name stays wrong
                    raise
                trace.failed(str(error), retried=True)
                answer = None
            if answer is None or answer.status == "READY":
                not_before = trace.now() + min(PAUSE_SECONDS, 0.25 * 2**tries)
                tries = min(tries + 1, 10)
            elif trace.now() >= news_at:
                trace.say(f"waiting for a worker ({trace.now() - trace.since:.0f} s)")
                news_at = trace.now() + NEWS_SECONDS
            if answer is not None:
                return answer

    endpoint._route = patient
