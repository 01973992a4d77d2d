"""Drives one claim from `pending` to `ended`: asks for a worker, claims it, renews and follows the session.

Each step is in the ledger before it is sent, so that a dispatcher can continue after SIGKILL: a granted claim is sent
again with the same body, and a held one is followed and renewed. A session is only ended when that is requested.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import aiohttp

from nullworker.aio import Backoff
from nullworker.client.session import SessionEnded, SessionLost, WorkerSession
from nullworker.client.worker_http import NoAnswer, Refused
from nullworker.clock import Clock
from nullworker.dispatch.book import Book
from nullworker.dispatch.claims import Claim, Ended
from nullworker.dispatch.decision import Counts
from nullworker.dispatch.ledger import Credential, Ledger
from nullworker.dispatch.vast import Routed, Unreachable
from nullworker.errors import LogUnavailable
from nullworker.logs import get_log

log = get_log(__name__)

#: Maximum of the seconds between two requests for a worker; the SDK's value (vastai 1.9.1, client/client.py).
POLL_SECONDS: Final = 5.0
#: Minimum of the seconds for which a worker is asked before a claim is lost, however short the lifetime is.
LEAST_PATIENCE_SECONDS: Final = 10.0
#: Seconds until a session is followed again after its worker has refused for good, as with a changed key.
AGAIN_SECONDS: Final = 10.0
#: The id of a session that may be held already: its worker is asked as after a lost answer.
UNKNOWN: Final = "unknown"


class Router(Protocol):
    """Chooses workers; implemented by `Vast`."""

    async def route(self, cost: float, request_idx: int) -> Routed:
        """Ask for a worker once."""
        ...

    async def running(self) -> frozenset[int]:
        """The instances whose machines are running."""
        ...


class Terms(NamedTuple):
    """The terms of the sessions."""

    cost: float = 100.0
    lifetime: float = 300.0  # seconds
    attach: float = 900.0  # seconds within which a consumer must attach; 0: consumers never do


class Driver:
    """Drives all claims of one dispatcher."""

    def __init__(
        self,
        book: Book,
        ledger: Ledger,
        clock: Clock,
        vast: Router,
        http: aiohttp.ClientSession,
        terms: Terms,
        counts: Callable[[], Counts],
    ) -> None:
        self._sessions: dict[str, _Session] = {}  # held sessions, by claim
        self._book = book
        self._ledger = ledger
        self._clock = clock
        self._vast = vast
        self._http = http
        self._terms = terms
        self._counts = counts
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, str] = {}  # the reason for each claim that is to be ended
        self._told_to_end: dict[str, asyncio.Event] = {}  # for held claims: set to end them

    @property
    def silent(self) -> list[str]:
        """The claims whose worker does not answer while a consumer works there."""
        return [claim_id for claim_id, session in self._sessions.items() if session.silent]

    def start(self, claim: Claim) -> None:
        """Drive a claim from its present state."""
        task = asyncio.ensure_future(self._drive(claim.id))
        self._tasks[claim.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(claim.id, None))

    def abandon(self, claim: Claim) -> None:
        """A pending claim was given up."""
        if (task := self._tasks.get(claim.id)) is not None:
            task.cancel()

    def end(self, claim: Claim, reason: str) -> None:
        """End a claim that is held, or will be: for a limit, or --end-all."""
        self._ending.setdefault(claim.id, reason)
        if (event := self._told_to_end.get(claim.id)) is not None:
            event.set()

    async def idle(self) -> None:
        """Wait until no claim is driven any more."""
        while self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def stop(self) -> None:
        """Stop driving, and leave all sessions held."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _drive(self, claim_id: str) -> None:
        while (claim := self._book.claims.get(claim_id)) is not None:
            try:
                if claim.state == "granted":
                    await self._ask_again(claim)
                elif claim.state == "pending":
                    await self._acquire(claim)
                else:
                    await self._hold(claim)
            except Exception:
                log.exception("claim_failed", claim=claim_id, message="a bug; the claim is driven again")
                await asyncio.sleep(AGAIN_SECONDS)
        self._ending.pop(claim_id, None)

    # -- from pending to held --------------------------------------------------------------------------------------

    async def _acquire(self, claim: Claim) -> None:
        refusals = Backoff(1.0, 30.0)
        request_idx = 0
        while True:
            routed = await self._route(request_idx)
            assert routed.grant is not None
            request_idx = routed.request_idx
            payload = {"lifetime": self._terms.lifetime, "metadata": claim.opened.metadata}
            body = json.dumps({"auth_data": routed.grant.auth_data, "payload": payload})
            credential = Credential(routed.grant.url, body)
            try:
                self._book.granted(claim.id, *credential)
            except LogUnavailable:  # the book has logged it; no worker is asked
                await asyncio.sleep(POLL_SECONDS)
                continue
            session = self._session(claim.id, credential)
            why, status = await self._ask(claim.id, session)
            if why is None:
                return
            self._book.refused(claim.id, why, status)
            log.info("claim_refused", claim=claim.id, url=session.url, status=status, why=why)
            await asyncio.sleep(refusals.failed() * random.uniform(0.5, 1.0))  # noqa: S311  # no secret

    async def _ask_again(self, claim: Claim) -> None:
        """After a restart: the worker may have been asked before, and may hold the session."""
        credential = self._ledger.credential(claim.id)
        if credential is None:  # it was removed from the ledger by hand: the worker cannot be asked any more
            self._book.ended(claim.id, "lost", Ended(why="its credentials are missing"))
            return
        session = self._session(claim.id, credential)
        session.session_id = UNKNOWN
        why, _ = await self._ask(claim.id, session)
        if why is not None:
            self._book.ended(claim.id, "refused", Ended(why=why))

    async def _route(self, request_idx: int) -> Routed:
        failures = Backoff(1.0, 10.0)
        while True:
            try:
                routed = await self._vast.route(self._terms.cost, request_idx)
            except Unreachable:  # `vast` has said so
                await asyncio.sleep(failures.failed())
                continue
            failures.worked()
            if routed.grant is not None:
                return routed
            request_idx = routed.request_idx
            # Random as with the SDK, but as often for an old claim as for a new one, or new ones would overtake it.
            longest = min(1.0 + len(self._book.in_state("pending")) / 10, POLL_SECONDS)
            await asyncio.sleep(random.uniform(0.5, 1.0) * longest)  # noqa: S311  # no secret

    async def _ask(self, claim_id: str, session: _Session) -> tuple[str | None, int | None]:
        """Ask for the session, and record the result. Returns the reason and the status of a certain refusal."""
        counts = self._counts()
        lifetime = float(session.body["lifetime"])  # after a restart, not always that of the present terms
        try:
            await session.create(self._http, patience=max(lifetime, LEAST_PATIENCE_SECONDS))
        except SessionEnded as error:
            answer = error.answer or {}
            known_as = str(answer.get("session_id") or answer.get("reservation_id") or UNKNOWN)
            self._book.held(claim_id, known_as, lifetime, counts)
            self._over(claim_id, error.final, str(error))
            return None, None
        except Refused as error:
            return str(error), error.http_status
        except NoAnswer as error:
            if not error.sent:
                return str(error), None
            log.warning("claim_lost", claim=claim_id, why=str(error))
            why = f"{error}, for a lifetime"  # for which it may have been held
            self._book.ended(claim_id, "lost", Ended(held_seconds=lifetime, why=why))
            return None, None
        allowed = session.lifetime
        assert allowed is not None
        self._book.held(claim_id, str(session.session_id), allowed, counts, number(session.instance))
        if allowed < lifetime:
            log.warning(
                "lifetime_capped",
                claim=claim_id,
                asked=lifetime,
                allowed=allowed,
                message="set MAX_RESERVATION_SECONDS on the worker, or a shorter --lifetime",
            )
        return None, None

    def _session(self, claim_id: str, credential: Credential) -> _Session:
        body = json.loads(credential.body)
        return _Session(credential.url, body["auth_data"], body["payload"], lambda: self._renewed(claim_id))

    # -- from held to ended ----------------------------------------------------------------------------------------

    async def _hold(self, claim: Claim) -> None:
        assert claim.held is not None
        credential = self._ledger.credential(claim.id)
        if credential is None:
            self._book.ended(claim.id, "lost", Ended(why="its credentials are missing"))
            return
        session = self._session(claim.id, credential)
        session.session_id, session.lifetime = claim.held.session_id, claim.held.lifetime
        session.attached = claim.attached_at is not None
        self._sessions[claim.id] = session
        end_requested = self._told_to_end.setdefault(claim.id, asyncio.Event())
        if claim.id in self._ending:
            end_requested.set()
        keeping = asyncio.ensure_future(self._keep(claim, session))
        ending = asyncio.ensure_future(end_requested.wait())
        try:
            await asyncio.wait({keeping, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not keeping.done():
                keeping.cancel()
                await asyncio.wait({keeping})
                await self._end(claim, session)
            elif not keeping.cancelled():
                keeping.result()
        finally:
            for task in (keeping, ending):
                task.cancel()
            self._sessions.pop(claim.id, None)
            self._told_to_end.pop(claim.id, None)

    async def _keep(self, claim: Claim, session: _Session) -> None:
        """Renew and follow a session until it has ended."""
        held, held_at = claim.held, claim.held_at
        assert held is not None
        assert held_at is not None
        began, gone = self._clock.now(), False

        def renews() -> bool:
            if session.attached or not self._terms.attach:
                return True
            return self._clock.now() - held_at <= self._terms.attach

        def changed() -> None:
            now = self._book.claims.get(claim.id)
            if session.attached and now is not None and now.attached_at is None:
                self._book.attached(claim.id)

        async def is_gone() -> bool:
            nonlocal gone
            instance = self._book.claims[claim.id].instance
            with contextlib.suppress(Unreachable):
                gone = instance is not None and instance not in await self._vast.running()
            return gone

        def say(line: str) -> None:
            log.info("claim_news", claim=claim.id, message=line)

        while True:
            try:
                final = await session.keep(self._http, renews=renews, on_change=changed, gone=is_gone, say=say)
            except SessionLost as error:
                reason = "gone" if gone else "silent" if session.silent else "lost"
                unknown = "does not know" in str(error)
                self._book.ended(claim.id, "unknown" if unknown else reason, self._lost(claim, str(error)))
                return
            except Refused as error:
                log.warning("worker_refuses", claim=claim.id, why=str(error))
                last = max(self._ledger.renewed_at(claim.id) or held_at, began)
                if self._clock.now() - last > held.lifetime:
                    self._book.ended(claim.id, "lost", self._lost(claim, str(error)))
                    return
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                self._over(claim.id, final, None)
                return

    async def _end(self, claim: Claim, session: _Session) -> None:
        while True:
            try:
                self._over(claim.id, await session.end(self._http), None)
                return
            except SessionEnded as error:
                self._over(claim.id, error.final, str(error))
                return
            except (NoAnswer, Refused) as error:
                log.warning("session_not_ended", claim=claim.id, why=str(error))
                await asyncio.sleep(AGAIN_SECONDS)

    def _renewed(self, claim_id: str) -> None:
        with contextlib.suppress(LogUnavailable):  # the book logs it at the next poll
            self._ledger.renewed(claim_id, self._clock.now())

    def _over(self, claim_id: str, final: Mapping[str, Any] | None, why: str | None) -> None:
        """The worker has reported the end. An end that this dispatcher has requested keeps its own reason."""
        seconds = final.get("held_seconds") if final else None
        reason = self._ending.get(claim_id) or (final or {}).get("reason") or UNKNOWN
        held_seconds = float(seconds) if isinstance(seconds, (int, float)) else None
        self._book.ended(claim_id, str(reason), Ended(dict(final) if final else None, held_seconds, why))

    def _lost(self, claim: Claim, why: str) -> Ended:
        """It was held for at most a lifetime after the last renewal, or until now if a consumer has kept it."""
        assert claim.held is not None
        assert claim.held_at is not None
        now, renewed_at = self._clock.now(), self._ledger.renewed_at(claim.id) or claim.held_at
        attached = self._book.claims[claim.id].attached_at is not None
        until = now if attached else min(now, renewed_at + claim.held.lifetime)
        return Ended(held_seconds=max(0.0, until - claim.held_at), why=why)


class _Session(WorkerSession):
    """A session that reports each answered renewal."""

    def __init__(
        self, url: str, auth_data: Mapping[str, Any], body: Mapping[str, Any], on_renewed: Callable[[], None]
    ) -> None:
        super().__init__(url, auth_data, body)
        self._on_renewed = on_renewed

    async def renew(self, http: aiohttp.ClientSession) -> None:
        """Renew the session."""
        await super().renew(http)
        self._on_renewed()


def number(instance: str | None) -> int | None:
    """Vast's number of the instance, from the worker's answer; None: unknown."""
    return int(instance) if instance is not None and instance.isdecimal() else None
