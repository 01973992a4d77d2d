"""Holds one worker with one request: `hold` at an endpoint, and `hold_at` at a worker without an autoscaler.

A worker is never asked for a second reservation while it may still hold the first one. Therefore the default is a
stream, which shows whether the worker lives, and a lost answer is asked for again at the same worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

from nullworker.client.outcome import Outcome, as_answer
from nullworker.client.session import ENDS
from nullworker.client.vastai_sdk import STAND_IN_KEY, WAIT_SECONDS, Patience, Say, connect
from nullworker.client.worker_http import Answer, HoldError, NoAnswer, Refused, open_http, post, stream

#: Seconds of a hold without a duration: the worker's cap decides, MAX_RESERVATION_SECONDS, 3600 by default.
UNKNOWN_HOLD_SECONDS: Final = 3600.0
#: Seconds in a worker's queue: NULL_MAX_QUEUE_SECONDS, 30 by default, and as much again for the way there and back.
QUEUE_SECONDS: Final = 60.0
#: Seconds for which the final status of a request whose connection broke is asked for.
FINAL_STATUS_SECONDS: Final = 5.0
#: Reasons of a 503 that mean that the request was held; all other reasons are refusals.
ENDED_WHILE_HELD: Final = ("consumer_unhealthy", "consumer_lost", "consumer_absent", "worker_restart")


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
    """Hold a worker of `endpoint` until its consumer releases it or `duration` seconds have passed; return its answer.

    Cancel it to close the connection, which ends the reservation as cancelled (client_disconnect).

    Args:
        autoscaler: the url of a fake autoscaler; None is Vast itself.
        timeout: seconds until a worker must hold it; without `stream`, until one has been asked.
        stream: False waits with a plain request, for workers that cannot stream, and for no longer than the duration.
        say: gets a line of prose at each stage.

    Returns:
        The worker's answer (`released`, and `result` if there is one) with `worker, instance, reservation_id,
        metadata, asked_at, held_at, ended_at, held_seconds, duration_cap, state, reason, result`.

    Raises:
        HoldError: with one sentence that says what to do. Its `answer` is the same line when the worker ended it.
    """
    patience, outcome, cancellation = Patience(say, timeout), Outcome(metadata), _Cancellation()
    payload = _payload(duration, metadata, stream)
    async with cancellation.explained(), connect(endpoint, api_key, autoscaler, patience) as vast:
        request_idx = 0
        while True:
            grant = await vast.grant(patience, cost=cost, request_idx=request_idx)
            request_idx = grant.auth_data.get("request_idx", 0)
            body = {"auth_data": grant.auth_data, "payload": payload, "session_id": None}
            request = _Request(vast.http, grant.url, body, outcome, say, duration)
            cancellation.worker = grant.url
            try:
                return await request.run(patience, streams=stream)
            except (Refused, NoAnswer) as error:
                cancellation.worker = None
                if request.held or (isinstance(error, Refused) and not error.again):
                    raise
                await patience.pause(str(error).rsplit(";", 1)[0])


async def hold_at(
    url: str,
    *,
    duration: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout: float = WAIT_SECONDS,
    stream: bool = True,
    say: Say = lambda line: None,
) -> Answer:
    """Like `hold`, but with one plain request to the UNSECURED worker at `url`: no autoscaler, no SDK, no retry."""
    patience, outcome, cancellation = Patience(say, timeout), Outcome(metadata), _Cancellation()
    async with cancellation.explained(), await open_http(url) as http:
        request = _Request(http, url.rstrip("/"), _payload(duration, metadata, stream), outcome, say, duration)
        cancellation.worker = request.url
        return await request.run(patience, streams=stream)


class _Request:
    """One POST /reserve to the worker at `url`. `held`: the worker has begun to hold it."""

    def __init__(
        self, http: Any, url: str, body: dict[str, Any], outcome: Outcome, say: Say, duration: float | None
    ) -> None:
        self.url, self.held = url, False
        self._http, self._body, self._outcome, self._say, self._duration = http, body, outcome, say, duration
        outcome.worker = url

    async def run(self, patience: Patience, *, streams: bool) -> Answer:
        self._say(f"asking {self.url}")
        answer = await (self._streamed(patience) if streams else self._plain())
        return self._outcome.settle(answer, self._say)

    async def _plain(self) -> Answer:
        longest = (UNKNOWN_HOLD_SECONDS if self._duration is None else self._duration) + QUEUE_SECONDS
        try:
            return (await post(self._http, self.url, "/reserve", self._body, seconds=longest)).answer
        except Refused as error:
            if error.answer is not None and error.answer.get("reason") in ENDED_WHILE_HELD:
                return error.answer
            raise

    async def _streamed(self, patience: Patience) -> Answer:
        item: Answer = {}  # an event of the log; the last one is the answer
        try:
            async with aclosing(
                stream(self._http, self.url, "/reserve", self._body, head_seconds=patience.left, on_head=self._on_head)
            ) as items:
                async for item in items:
                    if "kind" in item:
                        self._on_event(item)
        except NoAnswer as error:
            if not self.held:
                if isinstance(error.__cause__, asyncio.TimeoutError) and not patience.left:
                    raise patience.over(self.url) from error
                raise
            return await self._final_status(error)
        if not item or "kind" in item:
            return await self._final_status(None)
        return item

    def _on_head(self, headers: Mapping[str, str]) -> None:
        self.held = True
        self._outcome.instance = headers.get("Nullworker-Instance")
        self._say(f"held on {self.url}, reservation {headers.get('Nullworker-Reservation', 'without an id')}")

    def _on_event(self, event: Answer) -> None:
        self._outcome.add(event)
        wanted, cap = self._duration, self._outcome.duration_cap
        if event["kind"] == "queued" and wanted is not None and cap is not None and cap < wanted:
            self._say(
                f"asked for {wanted:g} s, and this worker allows {cap:g} s: set MAX_RESERVATION_SECONDS in its template"
            )
        if event["kind"] == "extended":
            self._say("extended by the consumer")

    async def _final_status(self, error: NoAnswer | None) -> Answer:
        """How a hold whose connection broke has ended. The worker knows it by the grant, which is sent once more.

        Raises:
            HoldError: the worker does not say.
        """
        went = "went away before the reservation had ended" if error is None else "broke off while it was held"
        lost = HoldError(f"{self.url} {went}; the reservation is lost: see its log, or ask for another")
        if "auth_data" not in self._body:
            raise lost from error
        body = {**self._body, "payload": {"duration": 0}}  # so that a worker which does not know it holds nothing
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + FINAL_STATUS_SECONDS
        while loop.time() < give_up_at:
            try:
                reply = await post(self._http, self.url, "/reserve", body, seconds=FINAL_STATUS_SECONDS / 2)
            except NoAnswer:
                await asyncio.sleep(1.0)
            except Refused as refused:
                if not refused.again or refused.answer is None:
                    raise lost from error
                await asyncio.sleep(1.0)
            else:
                if reply.status == 410 and reply.answer.get("state") in ENDS:
                    return as_answer(reply.answer)
                raise lost from error
        raise lost from error


class _Cancellation:
    """Gives a CancelledError a message that says what the cancellation did. `worker`: the one that has the claim."""

    def __init__(self) -> None:
        self.worker: str | None = None

    @asynccontextmanager
    async def explained(self) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            if self.worker is None:
                raise asyncio.CancelledError("interrupted: no worker was held") from None
            closed = "closed the connection, which ends the reservation as cancelled (client_disconnect) at"
            raise asyncio.CancelledError(f"interrupted: {closed} {self.worker}") from None


def _payload(duration: float | None, metadata: Mapping[str, Any] | None, stream: bool) -> dict[str, Any]:
    fields = {"duration": duration, "metadata": metadata, "stream": stream or None}
    return {name: value for name, value in fields.items() if value is not None}
