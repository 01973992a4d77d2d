"""Holds one worker from your own code: `hold`, `hold_session`, and `hold_at` for a worker without an autoscaler.

A worker that may still hold a first request is never asked again. That is why requests are streamed: the SDK repeats a
plain request whose answer takes longer than its timeout, and each repetition would hold one more worker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from nullworker.client.vastai_sdk import Answer, ClaimTrace, HoldError, Say, bounded, connected, refusal

if TYPE_CHECKING:
    import aiohttp

LIFETIME_SECONDS = 60.0  # of a session after its last renewal; the SDK's own default (client/endpoint.py)
WAIT_SECONDS = 600.0  # for a worker: a cold one has to be started and loaded first
UNKNOWN_HOLD_SECONDS = 3600.0  # without a duration the worker's cap decides: MAX_RESERVATION_SECONDS, 3600 by default
QUEUE_SECONDS = 60.0  # NULL_MAX_QUEUE_SECONDS, 30 by default, and as much again for the way there and back
CREATE_SECONDS = 10.0  # the SDK's own timeout for /session/create (client/client.py)
STAND_IN_KEY = "stand-in"


async def hold(
    endpoint: str,
    *,
    duration: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    cost: int = 100,
    api_key: str = STAND_IN_KEY,
    autoscaler: str | None = None,
    timeout: float = WAIT_SECONDS,
    stream: bool = True,
    say: Say = lambda line: None,
) -> Answer:
    """Holds a worker of `endpoint` until its consumer releases it or `duration` seconds are over; gives its answer.

    Cancelling it closes the connection, which ends the reservation as cancelled (client_disconnect).

    Args:
        autoscaler: the url of a stand-in; None is Vast itself.
        timeout: seconds until a worker must hold it; without `stream`, until one has been asked.
        stream: False waits with a plain request, for workers that cannot stream. The SDK repeats it when they fail.
        say: gets a line of prose at each stage.

    Raises:
        HoldError: with one sentence that says what to do.
    """
    trace = ClaimTrace(say, timeout, again=True)
    async with trace.in_words(), connected(endpoint, api_key, autoscaler, trace) as found:
        payload = _payload(duration, metadata, stream)
        if stream:
            result = await trace.in_time(found.request("/reserve", payload, cost=cost, stream=True))
        else:
            longest = (UNKNOWN_HOLD_SECONDS if duration is None else duration) + QUEUE_SECONDS
            result = await found.client.queue_endpoint_request(
                endpoint=found, worker_route="/reserve", worker_payload=payload, cost=cost, worker_timeout=longest
            )
        if not result["ok"]:
            raise refusal(result["url"], result["status"], result["text"])
        return await _final(result["response"] if stream else _only(result["response"]), trace)


async def hold_at(
    url: str,
    *,
    duration: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout: float = WAIT_SECONDS,
    stream: bool = True,
    say: Say = lambda line: None,
) -> Answer:
    """As `hold`, straight to the UNSECURED worker at `url`: one plain request; no autoscaler, no SDK, no second try."""
    import aiohttp

    trace = ClaimTrace(say, timeout, again=False)
    # read_bufsize bounds a line: a result of 64 KiB may be several times as long once it is escaped.
    session = aiohttp.ClientSession(
        trace_configs=[trace.config()], timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20
    )
    async with trace.in_words(), session:
        asked = session.post(f"{url.rstrip('/')}/reserve", json=_payload(duration, metadata, stream))
        async with await (trace.in_time(asked) if stream else asked) as response:
            if not response.ok:
                raise refusal(url, response.status, await response.text())
            return await _final(_data(response), trace)


async def hold_session(
    endpoint: str,
    *,
    duration: float | None = None,
    lifetime: float = LIFETIME_SECONDS,
    cost: int = 100,
    api_key: str = STAND_IN_KEY,
    autoscaler: str | None = None,
    timeout: float = WAIT_SECONDS,
    say: Say = lambda line: None,
) -> Answer:
    """Holds a session, renewed with POST /ping, until it ends at the worker or `duration` is over (None: for ever).

    It survives a restart of the worker, and `lifetime` seconds without this client. Cancelling it ends the session.
    Gives {"session_id", "url", "ended": "duration_elapsed" | "by_worker", "held_seconds"}; raises HoldError.
    """
    trace = ClaimTrace(say, timeout, again=True)
    async with trace.in_words(), connected(endpoint, api_key, autoscaler, trace) as found:
        creating = asyncio.ensure_future(found.session(cost=cost, lifetime=lifetime))
        try:
            session = await trace.in_time(asyncio.shield(creating))
            since = trace.now()
            ended = await _renew(session, lifetime, None if duration is None else since + duration, trace)
        except asyncio.CancelledError:
            if trace.worker is None:
                raise  # in_words says that nothing was held
            # One that has been asked for is waited for: without its id it could not be ended.
            farewell = await _end(await bounded(creating, CREATE_SECONDS), lifetime)
        else:
            if ended == "duration_elapsed":
                say(await _end(session, lifetime))
            held = round(trace.now() - since, 3)
            return {"session_id": session.session_id, "url": session.url, "ended": ended, "held_seconds": held}
        finally:
            creating.cancel()
    raise asyncio.CancelledError(f"interrupted: {farewell}")


async def _renew(session: Any, lifetime: float, until: float | None, trace: ClaimTrace) -> str:
    """Pings, twice a lifetime, until the session has ended at the worker or `until` (loop time) has come."""
    renewed, pause = trace.now(), lifetime / 2
    while True:
        await asyncio.sleep(pause if until is None else max(0.0, min(pause, until - trace.now())))
        if until is not None and trace.now() >= until:
            return "duration_elapsed"
        try:
            pong = await bounded(session.request("/ping", {}), lifetime / 2)
        except ValueError:  # the SDK's word for a 410 (client/session.py)
            trace.say("the session has ended at the worker")
            return "by_worker"
        except (ConnectionError, asyncio.TimeoutError) as error:
            if trace.now() - renewed > lifetime:
                raise HoldError(f"{session.url} is silent for more than {lifetime:g} s: the session is lost") from error
            session.open = True  # the SDK has given it up, but a session survives the restart of its worker
            trace.say(f"{session.url} does not answer: trying again")
            pause = min(1.0, lifetime / 8)
            continue
        if not pong["ok"]:
            raise refusal(session.url, pong["status"], pong["text"])
        renewed, pause = trace.now(), lifetime / 2


async def _end(session: Any, lifetime: float) -> str:
    """Ends the session, and says how that went."""
    try:
        await session.endpoint.client.end_endpoint_session(session)
    except Exception as error:  # the SDK raises no other kind
        return f"{error}; the session ends by itself {lifetime:g} s after its last renewal"
    return f"ended session {session.session_id}: {session.url} is free again"


def _payload(duration: float | None, metadata: Mapping[str, Any] | None, stream: bool) -> dict[str, Any]:
    fields = {"duration": duration, "metadata": metadata, "stream": stream or None}
    return {name: value for name, value in fields.items() if value is not None}


async def _final(items: AsyncIterator[Any], trace: ClaimTrace) -> Answer:
    """The last item: the answer. Those before it are events of the reservation's log, which have a `kind`."""
    last: Any = None
    async for last in items:
        if isinstance(last, dict) and last.get("kind") == "extended":
            trace.say("extended by the consumer")
    if not isinstance(last, dict) or "kind" in last:
        raise HoldError(f"{trace.worker} went away before the reservation had ended: see its log, or ask for another")
    if "released" not in last:
        raise HoldError(f"{trace.worker} ended it: {last.get('error', last)}", last)
    seconds = last.get("held_seconds", last.get("duration"))
    trace.say(f"ended: {last['released']}" + ("" if seconds is None else f" after {seconds:g} s"))
    return last


async def _only(item: Any) -> AsyncIterator[Any]:
    yield item


async def _data(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The items of a worker's answer: the `data:` lines of a stream, or the one JSON body."""
    if response.content_type != "text/event-stream":
        yield await response.json()
        return
    async for line in response.content:
        if line.startswith(b"data:"):
            yield json.loads(line[5:])
