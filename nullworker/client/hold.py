"""Reserves one worker from a script: `hold`, `hold_session`, and `hold_at` for a worker without an autoscaler.

A worker is never asked for a second reservation while it may still hold the first one. Therefore the default is a
stream, which shows whether the worker lives, and a lost answer is asked for again at the same worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, TypedDict

from nullworker.client.session import (
    ENDS,
    LIFETIME_SECONDS,
    FinalStatus,
    SavedSession,
    SessionEnded,
    WorkerSession,
)
from nullworker.client.vastai_sdk import Grant, Patience, Say, VastEndpoint, connect
from nullworker.client.worker_http import Answer, HoldError, NoAnswer, Refused, open_http, post, stream
from nullworker.clock import SystemClock, elapsed, from_shown, iso, tidy

#: Seconds to wait for a worker: a cold one has to be started and loaded first.
WAIT_SECONDS: Final = 600.0
#: Seconds of a hold without a duration: the worker's cap decides, MAX_RESERVATION_SECONDS, 3600 by default.
UNKNOWN_HOLD_SECONDS: Final = 3600.0
#: Seconds in a worker's queue: NULL_MAX_QUEUE_SECONDS, 30 by default, and as much again for the way there and back.
QUEUE_SECONDS: Final = 60.0
#: Seconds for which a request's last word is asked for again.
LAST_WORD_SECONDS: Final = 5.0
#: Reasons of a 503 that say that it was held; the others are refusals.
ENDED_WHILE_HELD: Final = ("consumer_unhealthy", "consumer_lost", "consumer_absent", "worker_restart")
#: The API key for a fake autoscaler, and for a worker that checks none.
STAND_IN_KEY: Final = "stand-in"


class HoldCancelled(HoldError):
    """It was held, and its worker has cancelled it. `answer` is its ledger line."""


class SavedHold(TypedDict):
    """A session that is to go on in another process; JSON. `session` holds a credential."""

    session: SavedSession
    asked_at: float  # epoch seconds of the claim
    held_at: float | None  # epoch seconds, by this side's clock


class Ledger:
    """What is known of one hold, as one line: the worker's last word, and who, where and when beside it."""

    def __init__(self, metadata: Mapping[str, Any] | None, asked_at: float | None = None) -> None:
        self.asked_at = SystemClock().now() if asked_at is None else asked_at
        self.worker: str | None = None
        self.instance: str | None = None
        self.reservation_id: str | None = None
        self.duration_cap: float | None = None
        self.held_at: str | None = None
        self.end: dict[str, Any] = {}
        self._metadata = metadata

    def hear(self, event: Mapping[str, Any]) -> None:
        """An event of the reservation's log."""
        self.reservation_id = event["reservation_id"]
        if event["kind"] == "queued":
            self.duration_cap = event["data"]["duration_cap"]
        elif event["kind"] == "held":
            self.held_at = event["at"]
        elif event["kind"] in ENDS:
            self.end = {
                "state": event["kind"],
                "reason": event["reason"],
                "ended_at": event["at"],
                "result": event["data"].get("result"),
            }

    def line(self, answer: Mapping[str, Any], final: FinalStatus | None = None) -> Answer:
        """The whole: what the worker answered, and `worker, instance, reservation_id, metadata, asked_at, held_at,
        ended_at, held_seconds, duration_cap, state, reason, result`. Times are ISO 8601 UTC; None is not known.
        """
        end: dict[str, Any] = {**self.end, **(dict(final) if final else {})}
        held_at, ended_at = end.get("held_at") or self.held_at, end.get("ended_at")
        seconds = answer.get("held_seconds", answer.get("duration", end.get("held_seconds")))
        if seconds is None and held_at and ended_at:
            seconds = elapsed(from_shown(held_at), from_shown(ended_at))
        state = end.get("state") or {"duration_elapsed": "expired"}.get(answer.get("released", ""), "released")
        return {
            **answer,
            "worker": self.worker,
            "instance": self.instance,
            "reservation_id": answer.get("reservation_id") or self.reservation_id,
            "metadata": self._metadata,
            "asked_at": iso(self.asked_at),
            "held_at": held_at,
            "ended_at": ended_at,
            "held_seconds": seconds,
            "duration_cap": answer.get("duration_cap", None if self.duration_cap is None else tidy(self.duration_cap)),
            "state": answer.get("state", state if "released" in answer or end else None),
            "reason": answer.get("reason") or end.get("reason") or answer.get("released"),
            "result": answer.get("result", end.get("result")),
        }


class Interruption:
    """What a cancellation does, for the message of the CancelledError."""

    def __init__(self) -> None:
        self.worker: str | None = None  # the one that has the claim now

    @asynccontextmanager
    async def in_words(self) -> AsyncIterator[None]:
        """Give a cancellation a message that says what it did."""
        try:
            yield
        except asyncio.CancelledError:
            if self.worker is None:
                raise asyncio.CancelledError("interrupted: no worker was held") from None
            closed = "closed the connection, which ends the reservation as cancelled (client_disconnect) at"
            raise asyncio.CancelledError(f"interrupted: {closed} {self.worker}") from None


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
    patience, ledger, interruption = Patience(say, timeout), Ledger(metadata), Interruption()
    payload = _payload(duration, metadata, stream)
    async with interruption.in_words(), connect(endpoint, api_key, autoscaler, patience) as vast:
        request_idx = 0
        while True:
            grant = await vast.grant(patience, cost=cost, request_idx=request_idx)
            request_idx = grant.auth_data.get("request_idx", 0)
            body = {"auth_data": grant.auth_data, "payload": payload, "session_id": None}
            request = _Request(vast.http, grant.url, body, ledger, say, duration)
            interruption.worker = grant.url
            try:
                return await request.run(patience, streams=stream)
            except (Refused, NoAnswer) as error:
                interruption.worker = None
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
    patience, ledger, interruption = Patience(say, timeout), Ledger(metadata), Interruption()
    async with interruption.in_words(), await open_http(url) as http:
        request = _Request(http, url.rstrip("/"), _payload(duration, metadata, stream), ledger, say, duration)
        interruption.worker = request.url
        return await request.run(patience, streams=stream)


class _Request:
    """One POST /reserve, and what comes of it."""

    def __init__(
        self, http: Any, url: str, body: dict[str, Any], ledger: Ledger, say: Say, duration: float | None
    ) -> None:
        self.url, self.held = url, False
        self._http, self._body, self._ledger, self._say, self._duration = http, body, ledger, say, duration
        ledger.worker = url

    async def run(self, patience: Patience, *, streams: bool) -> Answer:
        self._say(f"asking {self.url}")
        last = await (self._streamed(patience) if streams else self._plain())
        return _verdict(self.url, last, self._ledger, self._say)

    async def _plain(self) -> Answer:
        longest = (UNKNOWN_HOLD_SECONDS if self._duration is None else self._duration) + QUEUE_SECONDS
        try:
            return (await post(self._http, self.url, "/reserve", self._body, seconds=longest)).answer
        except Refused as error:
            if error.answer is not None and error.answer.get("reason") in ENDED_WHILE_HELD:
                return error.answer
            raise

    async def _streamed(self, patience: Patience) -> Answer:
        last: Answer = {}
        try:
            async with aclosing(
                stream(self._http, self.url, "/reserve", self._body, head_seconds=patience.left, on_head=self._begun)
            ) as items:
                async for last in items:
                    if "kind" in last:
                        self._hear(last)
        except NoAnswer as error:
            if not self.held:
                if isinstance(error.__cause__, asyncio.TimeoutError) and not patience.left:
                    raise patience.over(self.url) from error
                raise
            return await self._last_word(error)
        if not last or "kind" in last:
            return await self._last_word(None)
        return last

    def _begun(self, headers: Mapping[str, str]) -> None:
        self.held = True
        self._ledger.instance = headers.get("Nullworker-Instance")
        self._say(f"held on {self.url}, reservation {headers.get('Nullworker-Reservation', 'without an id')}")

    def _hear(self, event: Answer) -> None:
        self._ledger.hear(event)
        cap = self._ledger.duration_cap
        if event["kind"] == "queued" and cap is not None:
            say_cap(self._say, self._duration, cap)
        if event["kind"] == "extended":
            self._say("extended by the consumer")

    async def _last_word(self, error: NoAnswer | None) -> Answer:
        """The end of a hold whose connection has broken: asked for with the same grant, for no further time.

        Raises:
            HoldError: the worker does not tell.
        """
        went = "went away before the reservation had ended" if error is None else "broke off while it was held"
        lost = HoldError(f"{self.url} {went}; the reservation is lost: see its log, or ask for another")
        if "auth_data" not in self._body:
            raise lost from error
        body = {**self._body, "payload": {"duration": 0}}  # a worker that knows nothing of it holds it for no time
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + LAST_WORD_SECONDS
        while loop.time() < give_up_at:
            try:
                reply = await post(self._http, self.url, "/reserve", body, seconds=LAST_WORD_SECONDS / 2)
            except NoAnswer:
                await asyncio.sleep(1.0)
            except Refused as refused:
                if not refused.again or refused.answer is None:
                    raise lost from error
                await asyncio.sleep(1.0)
            else:
                if reply.status == 410 and reply.answer.get("state") in ENDS:
                    return _as_answer(reply.answer)
                raise lost from error
        raise lost from error


async def hold_session(
    endpoint: str,
    *,
    duration: float | None = None,
    lifetime: float = LIFETIME_SECONDS,
    metadata: Mapping[str, Any] | None = None,
    cost: int = 100,
    api_key: str = STAND_IN_KEY,
    autoscaler: str | None = None,
    timeout: float = WAIT_SECONDS,
    say: Say = lambda line: None,
    saved: SavedHold | None = None,
    save: Callable[[SavedHold], None] | None = None,
    leave: Callable[[], bool] = lambda: False,
) -> Answer:
    """Hold a session, renewed with POST /ping, until it ends at the worker or `duration` has passed (None: for ever).

    It survives a restart of the worker, and `lifetime` seconds without this client; once a consumer has attached, any
    time without this client. Cancel it to end the session.

    Args:
        lifetime: seconds; the worker may cap it.
        saved: what `save` was given in another process: it goes on with that session. Give the same other arguments.
        save: called before the worker is asked, and whenever something has changed, with what to keep. It holds a
            credential.
        leave: asked when it is cancelled; True leaves the session as it is, for another process.

    Returns:
        As `hold`.

    Raises:
        HoldError: as `hold`; SessionLost when nobody can know how it ended.
    """
    payload = {"lifetime": lifetime, **({} if metadata is None else {"metadata": dict(metadata)})}
    holding = _Holding(duration, payload, Ledger(metadata, saved["asked_at"] if saved else None), say, save)
    patience = Patience(say, timeout)
    session = None if saved is None else WorkerSession.load(saved["session"])
    if session is not None and session.session_id is not None:
        holding.held_at = saved["held_at"] if saved else None
        async with await open_http(session.url) as http:
            return await holding.keep(session, http, leave, _asks_vast(endpoint, api_key, autoscaler, session))
    async with connect(endpoint, api_key, autoscaler, patience) as vast:
        session = await holding.claim(vast, patience, cost, session, leave)
        return await holding.keep(session, vast.http, leave, lambda: vast.gone(session.instance))


def _asks_vast(
    endpoint: str, api_key: str, autoscaler: str | None, session: WorkerSession
) -> Callable[[], Awaitable[bool]]:
    """Whether the session's worker is gone, for a process that has nothing else to ask of Vast."""

    async def gone() -> bool:
        try:
            async with connect(endpoint, api_key, autoscaler, Patience(lambda line: None, QUEUE_SECONDS)) as vast:
                return await vast.gone(session.instance)
        except HoldError:
            return False

    return gone


class _Holding:
    """One session that is held by `hold_session`."""

    def __init__(
        self,
        duration: float | None,
        payload: dict[str, Any],
        ledger: Ledger,
        say: Say,
        save: Callable[[SavedHold], None] | None,
    ) -> None:
        self.held_at: float | None = None  # epoch seconds
        self._duration, self._payload, self._ledger, self._say, self._save = duration, payload, ledger, say, save
        self._ended: FinalStatus | None = None

    async def claim(
        self,
        vast: VastEndpoint,
        patience: Patience,
        cost: float,
        session: WorkerSession | None,
        leave: Callable[[], bool],
    ) -> WorkerSession:
        """A session that is held: first of the grant that was saved, then of new ones."""
        request_idx = 0
        while True:
            if session is None:
                try:
                    grant: Grant = await vast.grant(patience, cost=cost, request_idx=request_idx)
                except asyncio.CancelledError:
                    raise asyncio.CancelledError("interrupted: no worker was held") from None
                request_idx = grant.auth_data.get("request_idx", 0)
                session = WorkerSession(grant.url, grant.auth_data, self._payload)
            self._keep(session)
            self._say(f"asking {session.url}")
            creating = asyncio.ensure_future(session.create(vast.http))
            try:
                await asyncio.shield(creating)
            except asyncio.CancelledError:
                await asyncio.wait({creating})  # without its id it could not be ended
                if creating.exception() is None and not leave():
                    raise asyncio.CancelledError(f"interrupted: {await _end(session, vast.http)}") from None
                raise asyncio.CancelledError("interrupted: no worker was held") from None
            except SessionEnded as error:
                self._ended = error.final
                return session
            except Refused as error:
                if not error.again:
                    raise
                await patience.pause(str(error).rsplit(";", 1)[0])
                session = None
                continue
            except NoAnswer as error:
                await patience.pause(str(error))
                session = None
                continue
            self.held_at = SystemClock().now()
            self._keep(session)
            self._say(f"held on {session.url}, reservation {session.session_id}")
            asked = float(self._payload["lifetime"])
            if session.lifetime is not None and session.lifetime < asked:
                self._say(
                    f"its lifetime is {session.lifetime:g} s, not {asked:g}: the worker's MAX_RESERVATION_SECONDS"
                )
            return session

    async def keep(
        self,
        session: WorkerSession,
        http: Any,
        leave: Callable[[], bool],
        gone: Callable[[], Awaitable[bool]],
    ) -> Answer:
        """The answer, once it has ended, here or at the worker."""
        self._ledger.worker, self._ledger.reservation_id = session.url, session.session_id
        if self._ended is not None:
            return self._told(session, self._ended)
        keeping = session.keep(
            http,
            on_event=self._hear,
            on_change=lambda: self._keep(session),
            gone=gone,
            say=self._say,
        )
        task = asyncio.ensure_future(keeping)
        try:
            done, _ = await asyncio.wait({task}, timeout=self._left())
            if done:
                return self._told(session, task.result())
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            if leave():
                left = f"left session {session.session_id} at {session.url} as it is"
                raise asyncio.CancelledError(f"interrupted: {left}") from None
            raise asyncio.CancelledError(f"interrupted: {await _end(session, http)}") from None
        task.cancel()
        await asyncio.wait({task})
        self._say(f"{self._duration:g} s are over: ending session {session.session_id}")
        final = await session.end(http)
        if (final["state"], final["reason"]) != ("released", "session_end"):
            return self._told(session, final)
        self._say(f"ended session {session.session_id}: {session.url} is free again")
        self._ledger.instance = session.instance
        answer = {"released": "duration_elapsed", "duration": self._duration, "reason": "duration_elapsed"}
        return self._ledger.line(answer, final)

    def _left(self) -> float | None:
        if self._duration is None:
            return None
        now = SystemClock().now()
        return max(0.0, (now if self.held_at is None else self.held_at) + self._duration - now)

    def _hear(self, event: dict[str, Any]) -> None:
        self._ledger.hear(event)
        if (event["kind"], event["reason"]) == ("extended", "extend"):
            self._say("extended by the consumer")

    def _keep(self, session: WorkerSession) -> None:
        if self._save is not None:
            self._save({"session": session.saved(), "asked_at": self._ledger.asked_at, "held_at": self.held_at})

    def _told(self, session: WorkerSession, final: FinalStatus) -> Answer:
        self._ledger.instance, self._ledger.reservation_id = session.instance, session.session_id
        if self._ledger.duration_cap is None:  # it ended before its events came
            self._ledger.duration_cap = session.lifetime
        return _verdict(session.url, _as_answer(final), self._ledger, self._say, final)


async def _end(session: WorkerSession, http: Any) -> str:
    """End the session; return a sentence that says how that went."""
    try:
        final = await session.end(http)
    except HoldError as error:
        return f"{error}; the session ends by itself, {session.lifetime or LIFETIME_SECONDS:g} s after its last renewal"
    if (final["state"], final["reason"]) == ("released", "session_end"):
        return f"ended session {session.session_id}: {session.url} is free again"
    return f"session {session.session_id} at {session.url} had ended: {final['reason']}"


def say_cap(say: Say, duration: float | None, cap: float) -> None:
    """Say at once that the worker holds for less long than was asked. Seconds."""
    if duration is not None and cap < duration:
        say(f"asked for {duration:g} s, and this worker allows {cap:g} s: set MAX_RESERVATION_SECONDS in its template")


def _payload(duration: float | None, metadata: Mapping[str, Any] | None, stream: bool) -> dict[str, Any]:
    fields = {"duration": duration, "metadata": metadata, "stream": stream or None}
    return {name: value for name, value in fields.items() if value is not None}


def _as_answer(final: Mapping[str, Any]) -> Answer:
    """A final status as the body that the caller of /reserve would have got."""
    if final["state"] == "cancelled":
        return {"error": f"it was cancelled ({final['reason']})", "state": "cancelled", "reason": final["reason"]}
    if final["state"] == "expired":
        return {"released": final["reason"], "duration": final["held_seconds"], **_known(final)}
    result = {} if final.get("result") is None else {"result": final["result"]}
    return {"released": final["reason"], "held_seconds": final["held_seconds"], **result, **_known(final)}


def _known(final: Mapping[str, Any]) -> Answer:
    return {name: final[name] for name in ("held_at", "ended_at") if final.get(name)}


def _verdict(url: str, last: Answer, ledger: Ledger, say: Say, final: FinalStatus | None = None) -> Answer:
    """The ledger line of an ended hold.

    Raises:
        HoldCancelled: it was cancelled.
    """
    line = ledger.line(last, final)
    if "released" not in last:
        raise HoldCancelled(f"{url} ended it: {last.get('error', last)}", line)
    seconds = line["held_seconds"]
    say(f"ended: {last['released']}" + ("" if seconds is None else f" after {seconds:g} s"))
    return line


def is_result_failed(result: Any) -> bool:
    """Whether a consumer's result says that the job failed: an exit_code that is not 0, or an `error`."""
    return isinstance(result, dict) and (result.get("exit_code", 0) not in (0, None) or bool(result.get("error")))
