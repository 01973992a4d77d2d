"""WorkerSession: one session at one worker, from the claim to its final status, without the SDK.

A session survives its client: with its url, auth_data and id, another process can renew, follow and end it. Therefore
`saved()` is stored before the first request, and after a lost answer the same body is sent to the same worker again.
The states are: granted -> held (-> silent -> held) -> ended or lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

from nullworker.aio import Backoff
from nullworker.client.worker_http import (
    CALL_SECONDS,
    INSTANCE_HEADER,
    HoldError,
    NoAnswer,
    Refused,
    post,
    stream,
)

if TYPE_CHECKING:
    import aiohttp

Say = Callable[[str], None]

#: Seconds for which /session/create and /session/end are repeated while no answer comes.
PATIENCE_SECONDS: Final = 30.0
#: Seconds between two requests to a worker that is silent while a consumer is attached.
SILENT_SECONDS: Final = 60.0
#: Seconds after which such a session is lost.
SILENT_LIMIT: Final = 86_400.0
#: Seconds of lifetime if the payload has none (the SDK's default, client/endpoint.py).
LIFETIME_SECONDS: Final = 60.0
#: Events that end a reservation.
ENDS: Final = ("released", "expired", "cancelled")


class FinalStatus(TypedDict):
    """How a reservation ended. Times are ISO 8601 UTC; None: it was never held."""

    state: str  # released, expired or cancelled
    reason: str | None
    held_at: str | None
    ended_at: str | None
    held_seconds: float | None
    result: Any


class SavedSession(TypedDict):
    """What another process needs to continue a session; JSON. `auth_data` is a credential."""

    url: str
    auth_data: dict[str, Any]
    session_id: str | None  # None: not known to be held
    body: dict[str, Any]  # the payload of /session/create
    lifetime: float | None  # seconds, as the worker has capped it
    attached: bool  # a consumer has attached, so a silent worker does not mean that it is lost
    instance: str | None  # the worker's CONTAINER_ID


class SessionEnded(HoldError):
    """The session has ended. `final` is its final status; None: its worker does not know it, or does not return it."""

    def __init__(self, url: str, answer: Mapping[str, Any]) -> None:
        self.final: FinalStatus | None = None
        if answer.get("state") in ENDS:
            fields = {name: answer.get(name) for name in FinalStatus.__annotations__}
            self.final = cast(FinalStatus, fields)
        how = (
            f"as {self.final['state']} ({self.final['reason']})"
            if self.final
            else "in a way that the worker does not know"
        )
        super().__init__(f"the session at {url} has ended {how}", dict(answer))


class SessionLost(HoldError):
    """It cannot be known whether and how the session has ended."""


class WorkerSession:
    """One session at one worker.

    Attributes:
        url: the worker's.
        auth_data: of the grant; with `session_id`, the session's key.
        body: the payload of /session/create: lifetime, metadata.
        session_id: None until the session is known to be held.
        lifetime: seconds, as the worker has capped it; None until then.
        attached: whether a consumer has attached (event `extended`, reason `attached`).
        silent: whether its worker has been silent for more than a lifetime, while a consumer is attached.
        instance: the worker's CONTAINER_ID, if an answer had it.
    """

    def __init__(self, url: str, auth_data: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self.auth_data, self.body = dict(auth_data), dict(body)
        self.session_id: str | None = None
        self.lifetime: float | None = None
        self.attached = self.silent = False
        self.instance: str | None = None
        self._renewed_at: float | None = None  # loop time at which the last answered renewal was sent
        self._seq = 0

    def saved(self) -> SavedSession:
        """The session as JSON; `load` restores it."""
        return {
            "url": self.url,
            "auth_data": self.auth_data,
            "session_id": self.session_id,
            "body": self.body,
            "lifetime": self.lifetime,
            "attached": self.attached,
            "instance": self.instance,
        }

    @classmethod
    def load(cls, saved: SavedSession) -> WorkerSession:
        """Restore a session from `saved()`, also in another process."""
        session = cls(saved["url"], saved["auth_data"], saved["body"])
        session.session_id = saved["session_id"]
        session.lifetime, session.attached = saved["lifetime"], saved["attached"]
        session.instance = saved["instance"]
        return session

    # -- single calls --------------------------------------------------------------------------------------------

    async def create(self, http: aiohttp.ClientSession, *, patience: float = PATIENCE_SECONDS) -> None:
        """Create the session, or find the one that this grant has created. The request is repeated if no answer comes.

        Raises:
            SessionEnded: it was held, and has ended.
            Refused: the worker refused; it holds nothing for this grant.
            NoAnswer: none came within `patience` seconds. If it was `sent`, the worker may hold it, for a lifetime.
        """
        body = {"auth_data": self.auth_data, "payload": self.body, "session_id": None}
        loop = asyncio.get_running_loop()
        give_up_at, backoff, sent = loop.time() + patience, Backoff(0.5, 5.0), self.session_id is not None
        while True:
            asked_at = loop.time()
            try:
                reply = await post(http, self.url, "/session/create", body)
                break
            except NoAnswer as error:
                error.sent = sent = sent or error.sent
                pause = backoff.failed()
                if not sent or loop.time() + pause > give_up_at:
                    raise
            except Refused as error:
                pause = backoff.failed()
                # after a restart, the worker has no key yet and cannot know which session this is
                if not sent or not error.again or "reservation_id" in (error.answer or {}):
                    raise
                if loop.time() + pause > give_up_at:
                    raise
            await asyncio.sleep(pause)
        if reply.status != 201:
            raise SessionEnded(self.url, reply.answer)
        self.session_id, self._renewed_at = str(reply.answer["session_id"]), asked_at
        self.lifetime = float(reply.answer.get("lifetime", self._lifetime))  # the SDK's own worker does not return it
        self.instance = reply.headers.get(INSTANCE_HEADER)

    async def renew(self, http: aiohttp.ClientSession) -> None:
        """Renew the session: its deadline becomes one lifetime from now.

        Raises:
            SessionEnded, Refused, NoAnswer.
        """
        asked_at = asyncio.get_running_loop().time()
        seconds = min(CALL_SECONDS, max(self._lifetime / 2, 0.1))
        reply = await post(http, self.url, "/ping", self._in_session({}), seconds=seconds)
        if reply.status != 200:
            raise SessionEnded(self.url, reply.answer)
        self._renewed_at, self.instance = asked_at, reply.headers.get(INSTANCE_HEADER, self.instance)

    async def ask(self, http: aiohttp.ClientSession) -> FinalStatus | None:
        """Return its final status; None while it is held.

        Raises:
            SessionEnded: its worker does not know it.
            Refused, NoAnswer.
        """
        reply = await post(http, self.url, "/session/get", self._named())
        if reply.status == 200:
            return None
        ended = SessionEnded(self.url, reply.answer)
        if ended.final is None:
            raise ended
        return ended.final

    async def end(self, http: aiohttp.ClientSession, *, patience: float = PATIENCE_SECONDS) -> FinalStatus:
        """End the session if it is held, and return its final status.

        Raises:
            SessionEnded: its worker does not know it.
            Refused, NoAnswer: it ends a lifetime after its last renewal, or after the end of its consumer.
        """
        loop = asyncio.get_running_loop()
        give_up_at, backoff = loop.time() + patience, Backoff(0.5, 5.0)
        while True:
            try:
                await post(http, self.url, "/session/end", self._named())
                final = await self.ask(http)
                if final is not None:
                    return final
            except (NoAnswer, Refused) as error:
                if isinstance(error, Refused) and not error.again:
                    raise
                if loop.time() >= give_up_at:
                    raise
            await asyncio.sleep(backoff.failed())

    async def events(self, http: aiohttp.ClientSession) -> AsyncGenerator[dict[str, Any], None]:
        """The events of its reservation as in the log, from the first one to its end.

        Raises:
            SessionEnded: it ended before the stream began; `final` is its final status.
            Refused, NoAnswer: nothing came for 45 s, or the stream broke off.
        """
        try:
            async with aclosing(stream(http, self.url, "/reserve", self._in_session({"stream": True}))) as items:
                async for item in items:
                    if "kind" in item:
                        yield item
        except Refused as error:
            if error.http_status == 410:
                raise SessionEnded(self.url, error.answer or {}) from error
            raise

    # -- renewing and following ----------------------------------------------------------------------------------

    async def keep(
        self,
        http: aiohttp.ClientSession,
        *,
        renews: Callable[[], bool] = lambda: True,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        on_change: Callable[[], None] = lambda: None,
        gone: Callable[[], Awaitable[bool]] | None = None,
        say: Say = lambda line: None,
    ) -> FinalStatus:
        """Renew it at a third of its lifetime, and follow its events, until it has ended.

        Cancelling this leaves the session held: another process, or another call, can continue it.

        Args:
            renews: called before each renewal; False lets the session expire.
            on_event: gets each event of the reservation once.
            on_change: called when `saved()` has changed.
            gone: says whether its worker is known to be gone; called while it is silent.
            say: gets a line of prose when something has changed.

        Raises:
            SessionLost: it cannot be known how it ended. Its worker has not answered for a lifetime since the last
                renewal; or, once a consumer has attached, is gone, or silent for 24 h; or does not know it any more.
            Refused: the worker will never accept our requests (401, 422).
        """
        tasks = {
            asyncio.ensure_future(self._renewing(http, renews, gone, say)),
            asyncio.ensure_future(self._following(http, on_event, on_change, say)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except SessionEnded as error:
            if error.final is None:
                raise SessionLost(f"{self.url} does not know the session {self.session_id} any more") from error
            return error.final
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # marks it as retrieved, or asyncio logs it

    async def _renewing(
        self,
        http: aiohttp.ClientSession,
        renews: Callable[[], bool],
        gone: Callable[[], Awaitable[bool]] | None,
        say: Say,
    ) -> FinalStatus:
        loop, lifetime = asyncio.get_running_loop(), self._lifetime
        longest = max(min(CALL_SECONDS, lifetime / 8), 0.02)
        backoff, trouble, silent_since = Backoff(min(1.0, longest), longest), False, 0.0
        pause = lifetime / 3 if self._renewed_at is not None else 0.0
        answered_at = loop.time() if self._renewed_at is None else self._renewed_at
        while True:
            await asyncio.sleep(pause)
            asked_at = loop.time()
            try:
                if renews():
                    await self.renew(http)
                elif (final := await self.ask(http)) is not None:
                    return final
            except (NoAnswer, Refused) as error:
                if isinstance(error, Refused) and not error.again:
                    raise
                pause = backoff.failed()
                if not trouble:
                    say(f"{self.url} does not answer: trying again")
                    trouble = True
            else:
                if trouble:
                    say(f"{self.url} answers again: the session is still held")
                backoff.worked()
                pause, trouble, self.silent, answered_at = lifetime / 3, False, False, asked_at
                continue
            unanswered = loop.time() - answered_at
            if unanswered <= lifetime:
                continue
            if not self.attached:
                raise SessionLost(
                    f"{self.url} has not answered for {unanswered:.0f} s, longer than the session's lifetime of "
                    f"{lifetime:g} s: the session {self.session_id} is lost; no consumer had attached to it"
                )
            if not self.silent:
                self.silent, silent_since = True, loop.time()
                say(
                    f"{self.url} is silent: its consumer may still work and keep the session; asking again each "
                    f"{SILENT_SECONDS:.0f} s"
                )
            if gone is not None and await gone():
                raise SessionLost(f"{self.url} is silent, and the worker is gone: session {self.session_id} is lost")
            if loop.time() - silent_since > SILENT_LIMIT:
                raise SessionLost(f"{self.url} has been silent for 24 h: the session {self.session_id} is lost")
            pause = SILENT_SECONDS

    async def _following(
        self,
        http: aiohttp.ClientSession,
        on_event: Callable[[dict[str, Any]], None],
        on_change: Callable[[], None],
        say: Say,
    ) -> FinalStatus:
        backoff = Backoff(min(1.0, self._lifetime / 8), 15.0)
        while True:
            try:
                async with aclosing(self.events(http)) as events:
                    async for event in events:
                        backoff.worked()
                        if event["seq"] <= self._seq:
                            continue
                        self._seq = event["seq"]
                        if (event["kind"], event["reason"]) == ("extended", "attached") and not self.attached:
                            self.attached = True
                            say("a consumer has attached")
                            on_change()
                        on_event(event)
            except (NoAnswer, Refused) as error:
                if isinstance(error, Refused) and not error.again:
                    raise
            else:
                # the reservation has ended, or the worker is stopping
                try:
                    if (final := await self.ask(http)) is not None:
                        return final
                except (NoAnswer, Refused):
                    pass
            await asyncio.sleep(backoff.failed())

    @property
    def _lifetime(self) -> float:
        return self.lifetime or float(self.body.get("lifetime") or LIFETIME_SECONDS)

    def _in_session(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"auth_data": self.auth_data, "payload": payload, "session_id": self.session_id}

    def _named(self) -> dict[str, Any]:
        return {"session_id": self.session_id, "session_auth": self.auth_data}
