"""Holds one worker with a session: `hold_session`, which another process can continue from what `save` was given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypedDict

from nullworker.client.outcome import Outcome, as_answer
from nullworker.client.session import LIFETIME_SECONDS, FinalStatus, SavedSession, SessionEnded, WorkerSession
from nullworker.client.vastai_sdk import STAND_IN_KEY, WAIT_SECONDS, Grant, Patience, Say, VastEndpoint, connect
from nullworker.client.worker_http import Answer, HoldError, NoAnswer, Refused, open_http
from nullworker.clock import SystemClock, tidy

#: Seconds in which Vast must say whether a silent worker is gone.
GONE_SECONDS: Final = 60.0


class SavedHold(TypedDict):
    """What another process needs to continue a session; JSON. `session` contains a credential."""

    session: SavedSession
    asked_at: float  # epoch seconds of the claim
    held_at: float | None  # epoch seconds, by the client's clock


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

    The session survives a restart of the worker. Without this client it lasts `lifetime` seconds; once a consumer has
    attached, it lasts as long as the consumer. Cancel the call to end the session.

    Args:
        lifetime: seconds; the worker may cap it.
        saved: what `save` was given in another process, to continue that session; the other arguments must be the same.
        save: called before the worker is asked, and on each change, with what `saved` needs. It contains a credential.
        leave: called on cancellation; True leaves the session held, for another process to continue.

    Returns:
        As `hold`.

    Raises:
        HoldError: as `hold`; SessionLost when it cannot be known how it ended.
    """
    payload = {"lifetime": lifetime, **({} if metadata is None else {"metadata": dict(metadata)})}
    held_session = _HeldSession(duration, payload, Outcome(metadata, saved["asked_at"] if saved else None), say, save)
    patience = Patience(say, timeout)
    session = None if saved is None else WorkerSession.load(saved["session"])
    if session is not None and session.session_id is not None:
        held_session.held_at = saved["held_at"] if saved else None
        async with await open_http(session.url) as http:
            return await held_session.keep(session, http, leave, _gone_at_vast(endpoint, api_key, autoscaler, session))
    async with connect(endpoint, api_key, autoscaler, patience) as vast:
        session = await held_session.claim(vast, patience, cost, session, leave)
        return await held_session.keep(session, vast.http, leave, lambda: vast.gone(session.instance))


def _gone_at_vast(
    endpoint: str, api_key: str, autoscaler: str | None, session: WorkerSession
) -> Callable[[], Awaitable[bool]]:
    """A function that asks Vast whether the session's worker is gone, over a connection of its own."""

    async def gone() -> bool:
        try:
            async with connect(endpoint, api_key, autoscaler, Patience(lambda line: None, GONE_SECONDS)) as vast:
                return await vast.gone(session.instance)
        except HoldError:
            return False

    return gone


class _HeldSession:
    """One call of `hold_session`. `held_at`: epoch seconds, once it is held."""

    def __init__(
        self,
        duration: float | None,
        payload: dict[str, Any],
        outcome: Outcome,
        say: Say,
        save: Callable[[SavedHold], None] | None,
    ) -> None:
        self.held_at: float | None = None
        self._duration, self._payload, self._outcome, self._say, self._save = duration, payload, outcome, say, save
        self._ended: FinalStatus | None = None

    async def claim(
        self,
        vast: VastEndpoint,
        patience: Patience,
        cost: float,
        session: WorkerSession | None,
        leave: Callable[[], bool],
    ) -> WorkerSession:
        """Return a held session: of the saved grant first, then of new grants."""
        request_idx = 0
        while True:
            if session is None:
                try:
                    grant: Grant = await vast.grant(patience, cost=cost, request_idx=request_idx)
                except asyncio.CancelledError:
                    raise asyncio.CancelledError("interrupted: no worker was held") from None
                request_idx = grant.auth_data.get("request_idx", 0)
                session = WorkerSession(grant.url, grant.auth_data, self._payload)
            self._store(session)
            self._say(f"asking {session.url}")
            creating = asyncio.ensure_future(session.create(vast.http))
            try:
                await asyncio.shield(creating)
            except asyncio.CancelledError:
                await asyncio.wait({creating})  # without the id, the session could not be ended
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
            self._store(session)
            self._say(f"held on {session.url}, reservation {session.session_id}")
            wanted = float(self._payload["lifetime"])
            if session.lifetime is not None and session.lifetime < wanted:
                self._say(
                    f"its lifetime is {session.lifetime:g} s, not {wanted:g}: the worker's MAX_RESERVATION_SECONDS"
                )
            return session

    async def keep(
        self,
        session: WorkerSession,
        http: Any,
        leave: Callable[[], bool],
        gone: Callable[[], Awaitable[bool]],
    ) -> Answer:
        """Renew the session until it has ended, here or at the worker; return the outcome."""
        self._outcome.worker, self._outcome.reservation_id = session.url, session.session_id
        if self._ended is not None:
            return self._settled(session, self._ended)
        task = asyncio.ensure_future(
            session.keep(
                http,
                on_event=self._on_event,
                on_change=lambda: self._store(session),
                gone=gone,
                say=self._say,
            )
        )
        try:
            done, _ = await asyncio.wait({task}, timeout=self._left())
            if done:
                return self._settled(session, task.result())
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
            return self._settled(session, final)
        self._say(f"ended session {session.session_id}: {session.url} is free again")
        self._outcome.instance = session.instance
        answer = {"released": "duration_elapsed", "duration": tidy(self._duration or 0.0)}
        answer |= {
            "state": "expired",
            "reason": "duration_elapsed",
        }  # as for a request; the worker calls it session_end
        return self._outcome.beside(answer, final)

    def _left(self) -> float | None:
        if self._duration is None:
            return None
        now = SystemClock().now()
        return max(0.0, (now if self.held_at is None else self.held_at) + self._duration - now)

    def _on_event(self, event: dict[str, Any]) -> None:
        self._outcome.add(event)
        if (event["kind"], event["reason"]) == ("extended", "extend"):
            self._say("extended by the consumer")

    def _store(self, session: WorkerSession) -> None:
        if self._save is not None:
            self._save({"session": session.saved(), "asked_at": self._outcome.asked_at, "held_at": self.held_at})

    def _settled(self, session: WorkerSession, final: FinalStatus) -> Answer:
        self._outcome.instance, self._outcome.reservation_id = session.instance, session.session_id
        if self._outcome.duration_cap is None:  # it ended before its events came
            self._outcome.duration_cap = session.lifetime
        return self._outcome.settle(as_answer(final), self._say, final)


async def _end(session: WorkerSession, http: Any) -> str:
    """End the session; return a sentence that says how that went."""
    try:
        final = await session.end(http)
    except HoldError as error:
        return f"{error}; the session ends by itself, {session.lifetime or LIFETIME_SECONDS:g} s after its last renewal"
    if (final["state"], final["reason"]) == ("released", "session_end"):
        return f"ended session {session.session_id}: {session.url} is free again"
    return f"session {session.session_id} at {session.url} had ended: {final['reason']}"
