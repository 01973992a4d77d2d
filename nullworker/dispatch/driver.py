"""Drives one claim from `pending` to `ended`: asks for a worker, claims it, renews and follows the session.

Each step is in the ledger before it is sent, so that a dispatcher can continue after SIGKILL: a granted claim is sent
again with the same body, and a held one is followed and renewed. A session is only ended when that is requested.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import aiohttp

from nullworker.aio import Backoff
from nullworker.clock import Clock
from nullworker.dispatch.book import Book
from nullworker.dispatch.claims import Claim, Ended
from nullworker.dispatch.decision import Counts
from nullworker.dispatch.ledger import Ledger
from nullworker.dispatch.trouble import Trouble
from nullworker.dispatch.vast import Routed, Unreachable
from nullworker.dispatch.worker_session import Asked, WorkerSession
from nullworker.errors import LogUnavailable
from nullworker.logs import get_log

log = get_log(__name__)

#: Seconds between two questions for a worker at most; the SDK's own figure (vastai 1.9.1, client/client.py).
POLL_SECONDS: Final = 5.0
#: Seconds between two questions to a worker that is silent while its consumer works.
SILENT_SECONDS: Final = 60.0
#: Seconds after which such a worker is given up.
SILENT_LIMIT_SECONDS: Final = 86_400.0
#: Seconds that a worker is asked for at least before a claim is lost, however short the lifetime is.
LEAST_PATIENCE_SECONDS: Final = 10.0


class Router(Protocol):
    """Who names workers; `Vast` is one."""

    async def route(self, cost: float, request_idx: int) -> Routed:
        """Ask once."""
        ...


class Terms(NamedTuple):
    """How sessions are held."""

    cost: float = 100.0
    lifetime: float = 300.0  # seconds
    attach: float = 900.0  # seconds within which a consumer must attach; 0: consumers never do


class Driver:
    """All claims of one dispatcher.

    Attributes:
        silent: claims whose worker does not answer while a consumer works there, and since when (epoch seconds).
        listed: the instances that Vast lists, as of the last look; None before the first.
    """

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
        self.silent: dict[str, float] = {}
        self.listed: frozenset[int] | None = None
        self._book = book
        self._ledger = ledger
        self._clock = clock
        self._vast = vast
        self._http = http
        self._terms = terms
        self._counts = counts
        self._started_at = clock.now()
        self._vast_trouble = Trouble("autoscaler_unreachable")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, str] = {}  # claims that are to be ended, and why
        self._told_to_end: dict[str, asyncio.Event] = {}  # of the held ones

    def start(self, claim: Claim) -> None:
        """Drive a claim from the state in which it is."""
        task = asyncio.ensure_future(self._drive(claim.id))
        self._tasks[claim.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(claim.id, None))

    def abandon(self, claim: Claim) -> None:
        """A pending claim was given up."""
        if (task := self._tasks.get(claim.id)) is not None:
            task.cancel()

    def end(self, claim: Claim, reason: str) -> None:
        """End what is held, or will be: for a limit, or --end-all."""
        self._ending.setdefault(claim.id, reason)
        if (event := self._told_to_end.get(claim.id)) is not None:
            event.set()

    async def idle(self) -> None:
        """Wait until nothing is driven."""
        while self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def stop(self) -> None:
        """Leave every session as it is."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _drive(self, claim_id: str) -> None:
        try:
            claim: Claim | None = self._book.claims[claim_id]
            assert claim is not None
            if claim.state == "granted":
                claim = await self._ask_again(claim)
            elif claim.state == "pending":
                claim = await self._acquire(claim)
            if claim is not None and claim.state == "held":
                await self._hold(claim)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("claim_failed", claim=claim_id, message="a bug; the next start goes on with this claim")

    # -- from pending to held --------------------------------------------------------------------------------------

    async def _acquire(self, claim: Claim) -> Claim | None:
        refusals = Backoff(1.0, 30.0)
        request_idx = 0
        while True:
            routed = await self._route(request_idx)
            assert routed.grant is not None
            request_idx = routed.request_idx
            url = routed.grant.url
            payload = {"lifetime": self._terms.lifetime, "metadata": claim.opened.metadata}
            body = json.dumps({"auth_data": routed.grant.auth_data, "payload": payload, "session_id": None})
            try:
                self._book.granted(claim.id, url, body)
            except LogUnavailable as error:
                log.error("ledger_unwritable", claim=claim.id, why=str(error), message="no worker is asked")
                await asyncio.sleep(POLL_SECONDS)
                continue
            asked = await self._ask(WorkerSession(self._http, url, body), self._clock.now(), unsure=False)
            if asked is not None and asked.outcome == "refused":
                self._book.refused(claim.id, asked.why, asked.status)
                log.info("claim_refused", claim=claim.id, url=url, status=asked.status, why=asked.why)
                await asyncio.sleep(refusals.failed() * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
                continue
            return self._answered(claim.id, asked)

    async def _ask_again(self, claim: Claim) -> Claim | None:
        """After a restart: the worker may have been asked before, and may hold it."""
        credential = self._ledger.credential(claim.id)
        if credential is None:  # the ledger lost it to somebody's hand: it cannot be asked for any more
            self._book.ended(claim.id, "lost", Ended(why="its credentials are missing"))
            return None
        session = WorkerSession(self._http, credential.url, credential.body)
        asked = await self._ask(session, claim.granted_at or self._started_at, unsure=True)
        if asked is not None and asked.outcome == "refused":
            self._book.ended(claim.id, "refused", Ended(why=asked.why))
            return None
        return self._answered(claim.id, asked)

    async def _route(self, request_idx: int) -> Routed:
        failures = Backoff(1.0, 10.0)
        while True:
            try:
                routed = await self._vast.route(self._terms.cost, request_idx)
            except Unreachable as error:
                self._vast_trouble.met(str(error), self._clock.now(), message="no worker can be asked for")
                await asyncio.sleep(failures.failed())
                continue
            failures.worked()
            self._vast_trouble.over()
            if routed.grant is not None:
                return routed
            request_idx = routed.request_idx
            # At random as the SDK, but as often for an old claim as for a new one, which else would overtake it.
            longest = min(1.0 + len(self._book.in_state("pending")) / 10, POLL_SECONDS)
            await asyncio.sleep(random.uniform(0.5, 1.0) * longest)  # noqa: S311  # no secret

    async def _ask(self, session: WorkerSession, since: float, *, unsure: bool) -> Asked | None:
        """What came of it; None: a lifetime has passed, and nobody knows.

        `unsure`: the worker may hold it already, so that a worker that cannot be reached has not refused.
        """
        failures = Backoff(0.5, 5.0)
        patience = max(since, self._started_at) + max(self._terms.lifetime, LEAST_PATIENCE_SECONDS)
        while True:
            asked = await session.create()
            if asked.outcome in ("held", "ended") or (asked.outcome == "refused" and asked.status is not None):
                return asked
            if asked.outcome == "refused" and not unsure:
                return asked
            unsure = True
            if self._clock.now() > patience:
                log.warning("claim_lost", why=asked.why)
                return None
            await asyncio.sleep(failures.failed())

    def _answered(self, claim_id: str, asked: Asked | None) -> Claim | None:
        if asked is None:
            self._book.ended(claim_id, "lost", Ended(why="the worker that was asked did not answer for a lifetime"))
            return None
        lifetime = asked.lifetime or self._terms.lifetime
        claim = self._book.held(claim_id, asked.session_id or "unknown", lifetime, self._counts())
        if asked.outcome == "ended":
            self._over(claim_id, asked.final, asked.why)
            return None
        if lifetime < self._terms.lifetime:
            log.warning(
                "lifetime_capped",
                claim=claim_id,
                asked=self._terms.lifetime,
                allowed=lifetime,
                message="set MAX_RESERVATION_SECONDS on the worker, or a shorter --lifetime",
            )
        return claim

    # -- from held to ended ----------------------------------------------------------------------------------------

    async def _hold(self, claim: Claim) -> None:
        credential = self._ledger.credential(claim.id)
        if credential is None:
            self._book.ended(claim.id, "lost", Ended(why="its credentials are missing"))
            return
        session = WorkerSession(self._http, credential.url, credential.body)
        watchers = {
            asyncio.ensure_future(each(claim, session)) for each in (self._follow, self._renew, self._end_when_told)
        }
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            reason, end = next(iter(done)).result()
        finally:
            for each in watchers:
                each.cancel()
            await asyncio.wait(watchers)
        self.silent.pop(claim.id, None)
        if reason is None:
            self._over(claim.id, end.final, end.why)
        else:
            self._book.ended(claim.id, reason, end)
        self._ending.pop(claim.id, None)
        self._told_to_end.pop(claim.id, None)

    async def _follow(self, claim: Claim, session: WorkerSession) -> tuple[str | None, Ended]:
        assert claim.held is not None
        failures = Backoff(1.0, 10.0)

        def attached() -> None:
            now = self._book.claims.get(claim.id)
            if now is not None and now.attached_at is None:
                self._book.attached(claim.id)

        while True:
            began = self._clock.now()
            asked = await session.follow(claim.held.session_id, attached)
            if asked.outcome == "ended":
                return None, Ended(asked.final, why=asked.why or None)
            if self._clock.now() - began > LEAST_PATIENCE_SECONDS:
                failures.worked()
            await asyncio.sleep(SILENT_SECONDS if claim.id in self.silent else failures.failed())

    async def _renew(self, claim: Claim, session: WorkerSession) -> tuple[str | None, Ended]:
        assert claim.held is not None
        assert claim.held_at is not None
        lifetime, told = claim.held.lifetime, False
        renewed_at = self._ledger.renewed_at(claim.id) or claim.held_at
        due = renewed_at + lifetime / 3
        while True:
            await asyncio.sleep(max(0.0, due - self._clock.now()))
            now = self._clock.now()
            attached = self._book.claims[claim.id].attached_at is not None
            if not attached and self._terms.attach and now - claim.held_at > self._terms.attach:
                if not told:
                    log.warning("claim_not_renewed", claim=claim.id, url=claim.url, why="no consumer has attached")
                    told = True
                due = now + min(lifetime / 3, 5.0)
                if now - max(renewed_at, self._started_at) > lifetime + LEAST_PATIENCE_SECONDS:
                    return "lost", self._lost(claim, renewed_at, lifetime, "no consumer had attached")
                continue
            asked = await session.renew(claim.held.session_id)
            if asked.outcome == "ended":
                return None, Ended(asked.final)
            if asked.outcome == "held":
                renewed_at, due = now, now + lifetime / 3
                self._renewed(claim, now)
                continue
            log.warning("renewal_failed", claim=claim.id, why=asked.why)
            now = self._clock.now()
            due = now + min(lifetime / 8, 5.0)
            if now - max(renewed_at, self._started_at) <= lifetime:
                continue
            if not attached:
                return "lost", self._lost(claim, renewed_at, lifetime, asked.why)
            since = self.silent.setdefault(claim.id, renewed_at)
            instance = self._book.claims[claim.id].instance
            if self.listed is not None and instance is not None and instance not in self.listed:
                return "gone", self._lost(claim, renewed_at, lifetime, f"instance {instance} is not listed any more")
            if now - since > SILENT_LIMIT_SECONDS:
                return "silent", self._lost(claim, renewed_at, SILENT_LIMIT_SECONDS, asked.why)
            due = now + SILENT_SECONDS

    async def _end_when_told(self, claim: Claim, session: WorkerSession) -> tuple[str | None, Ended]:
        assert claim.held is not None
        event = self._told_to_end.setdefault(claim.id, asyncio.Event())
        if claim.id not in self._ending:
            await event.wait()
        reason = self._ending[claim.id]
        failures = Backoff(0.5, 10.0)
        while True:
            asked = await session.end(claim.held.session_id)
            if asked.outcome in ("held", "ended"):  # 200, or it is not there any more
                await asyncio.sleep(1.0)  # the stream tells how it ended
                return reason, Ended(asked.final or {"state": "released", "reason": "session_end"})
            log.warning("session_not_ended", claim=claim.id, why=asked.why)
            await asyncio.sleep(failures.failed())

    def _renewed(self, claim: Claim, at: float) -> None:
        if self.silent.pop(claim.id, None) is not None:
            log.info("claim_answers_again", claim=claim.id, url=claim.url)
        try:
            self._ledger.renewed(claim.id, at)
        except LogUnavailable as error:
            log.warning("renewal_not_written", claim=claim.id, why=str(error))

    def _over(self, claim_id: str, final: dict[str, Any] | None, why: str | None) -> None:
        """The worker has told of its end. An end that this dispatcher has asked for keeps its own reason."""
        ours = self._ending.get(claim_id)
        seconds = final.get("held_seconds") if final else None
        reason = ours or (final or {}).get("reason") or "unknown"
        held_seconds = float(seconds) if isinstance(seconds, (int, float)) else None
        self._book.ended(claim_id, str(reason), Ended(final, held_seconds, why))

    def _lost(self, claim: Claim, renewed_at: float, lifetime: float, why: str) -> Ended:
        assert claim.held_at is not None
        held = max(0.0, min(self._clock.now(), renewed_at + lifetime) - claim.held_at)
        return Ended(held_seconds=held, why=why)
