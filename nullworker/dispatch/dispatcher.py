"""The dispatcher: polls the queue, decides, and drives claims, until it is stopped.

While the queue cannot be read, the autoscaler is down or the disk is full, it opens nothing and ends nothing, and logs
the trouble once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any, Final, Literal, NamedTuple

import aiohttp

from nullworker import __version__
from nullworker.aio import AutoResetEvent, Backoff
from nullworker.clock import WorkerClock, iso, stopwatch, wall
from nullworker.dispatch.claims import Claim, Event
from nullworker.dispatch.core import Core, Step
from nullworker.dispatch.decision import Policy
from nullworker.dispatch.driver import Driver, Terms
from nullworker.dispatch.ledger import Ledger
from nullworker.dispatch.limits import Limits, Room
from nullworker.dispatch.queues.reading import Queue, QueueUnreadableError, look
from nullworker.dispatch.trouble import Trouble
from nullworker.dispatch.vast import Instance, Unreachable, Vast, address, trust
from nullworker.errors import LogUnavailable
from nullworker.logs import get_log

log = get_log(__name__)

#: Seconds between two polls of the endpoint's workers and of the prices of instances.
WATCH_SECONDS: Final = 60.0
#: Minimum of the seconds between two requests for prices while the instance of a worker is unknown.
PRICE_SECONDS: Final = 2.0
#: Dollars per hour assumed while no price is known: an H200's, so that a limit is reached too early rather than late.
ASSUMED_PRICE: Final = 4.0
#: Seconds after which --end-all gives up.
END_SECONDS: Final = 60.0


class Plan(NamedTuple):
    """The plan of one dispatcher, from the options of the command."""

    policy: Policy
    terms: Terms = Terms()
    limits: Limits = Limits()
    at_limit: Literal["wait", "end"] = "wait"
    stall: float = 600.0  # seconds
    metadata: dict[str, Any] | None = None


class Dispatcher:
    """One dispatcher; use `running` to create it.

    Attributes:
        step: what the last look at the queue has led to; None before the first.
        polled_at: epoch seconds of the last look that worked; 0 before it.
        stalled: whether a claim has waited for a worker for longer than --stall.
        foreign: workers that work for somebody else, as of the last look.
    """

    def __init__(
        self,
        plan: Plan,
        queue: Queue,
        vast: Vast,
        ledger: Ledger,
        clock: WorkerClock,
        http: aiohttp.ClientSession,
        tls: ssl.SSLContext,
    ) -> None:
        self.plan = plan
        self.queue = queue
        self.vast = vast
        self.ledger = ledger
        self.clock = clock
        self.instances: dict[str, Instance] = {}
        self.core = Core(
            ledger,
            clock,
            plan.policy,
            limits=plan.limits,
            lifetime=plan.terms.lifetime,
            metadata=plan.metadata,
            price=self.price,
        )
        self.book = self.core.book
        self.book.observers.append(self._log_event)
        self.driver = Driver(self.book, ledger, clock, vast, http, plan.terms, lambda: self.core.counts)
        self.step: Step | None = None
        self.room: Room = self.core.room()
        self.polled_at = 0.0
        self._polled = 0.0  # the same by the monotonic clock: the wall clock may be set
        self.queue_errors = 0
        self.stalled = False
        self.foreign = 0
        self.queue_trouble = Trouble("queue_unreadable", "nothing is opened or given up; what is held stays")
        self._limit_trouble = Trouble("limit_reached")
        self._price_trouble = Trouble("prices_unreadable")
        self._tls = tls
        self._url_met = AutoResetEvent()  # set by a worker whose instance is unknown

    def price(self) -> float:
        """The expected price of the next machine in dollars per hour: that of the dearest one held or rented."""
        if self.plan.limits.price is not None:
            return self.plan.limits.price
        known = [claim.price for claim in self.book.claims.values() if claim.price is not None]
        known += [instance.price for instance in self.instances.values()]
        return max(known, default=ASSUMED_PRICE)

    async def run(self) -> None:
        """Continue the claims of the ledger, then poll the queue each interval, for ever."""
        self._resume()
        loops = {asyncio.ensure_future(each) for each in (self._look_often(), self._watch())}
        # Sessions from before a restart are renewed whether Vast answers or not.
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for each in loops:
                each.cancel()
            await asyncio.wait(loops)
            await self.driver.stop()

    async def end_all(self) -> int:
        """End every session in the ledger. Returns the number that could not be ended."""
        for claim in list(self.book.claims.values()):
            if claim.state == "pending":
                self.book.ended(claim.id, "end_all")
            else:
                self.driver.start(claim)
                self.driver.end(claim, "end_all")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.driver.idle(), END_SECONDS)
        await self.driver.stop()
        return len(self.book.claims)

    def _resume(self) -> None:
        for claim in list(self.book.claims.values()):
            if claim.state == "pending":  # no worker was asked for it
                self.book.ended(claim.id, "dispatcher_restart")
            else:
                log.info("claim_adopted", claim=claim.id, state=claim.state, url=claim.url)
                self.driver.start(claim)

    # -- the queue -------------------------------------------------------------------------------------------------

    async def _look_often(self) -> None:
        interval = self.plan.policy.interval
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + interval
            await self._look()
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _look(self) -> None:
        now = self.clock.now()
        self._check_stall(now)
        with contextlib.suppress(LogUnavailable):  # the book has logged it
            self.book.write()
        open_ = self.core.snapshot()
        try:
            counts = await look(self.queue)
        except QueueUnreadableError as error:
            self.queue_errors += 1
            self.queue_trouble.met(str(error))
            return
        self.queue_trouble.over()
        self.polled_at, self._polled = wall(), stopwatch()
        if not self.book.claims and (anchor := self.clock.moved()) is not None:
            with contextlib.suppress(LogUnavailable):
                self.ledger.store_anchor(anchor)
                before = self.clock.now()
                self.clock.follow(anchor)
                self.core.clock_was_set(self.clock.now() - before)
        self.step = step = self.core.step(counts, open_)
        self.room = step.room
        log.info("decided", **step.decision.numbers, opened=len(step.opened), given_up=len(step.given_up))
        for claim in step.given_up:
            self.driver.abandon(claim)
        for claim in step.opened:
            self.driver.start(claim)
        self._apply_limit(step)

    def _apply_limit(self, step: Step) -> None:
        room = step.room
        if room.reached is None or not (step.decision.opens or room.over):
            if room.reached is None:
                self._limit_trouble.over()
            return
        again = "when a claim that waits for a worker is over" if room.again_at is None else iso(room.again_at)
        if room.never:
            again = "never: one --lifetime is more than the limit"
        self._limit_trouble.met(
            f"--max-{room.reached}-per-day",
            hours=round(room.spent.hours, 3),
            dollars=round(room.spent.dollars, 2),
            opens_again_at=again,
            message="no worker is reserved" + ("; held sessions are ended" if self.plan.at_limit == "end" else ""),
        )
        if room.over and self.plan.at_limit == "end":
            for claim in self.book.in_state("held"):
                self.driver.end(claim, "limit")

    def _check_stall(self, now: float) -> None:
        waiting = [claim for claim in self.book.claims.values() if claim.state in ("pending", "granted")]
        oldest = min((claim.opened_at for claim in waiting), default=now)
        held = len(self.book.in_state("held"))
        stalled = now - oldest > self.plan.stall and held < self.plan.policy.max
        if stalled and not self.stalled:
            log.error(
                "stalled",
                pending=len(waiting),
                held=held,
                oldest_seconds=round(now - oldest),
                message="Vast starts no worker: raise the endpoint's max_workers or min_load, dispatch with --cost 200,"
                " or look for offers with `nullworker doctor --endpoint`",
            )
        elif self.stalled and not stalled:
            log.info("stalled_over")
        self.stalled = stalled

    # -- Vast ------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        failures = Backoff(1.0, 10.0)
        while True:
            try:
                await self.vast.connect()
                trust(self._tls, await self.vast.ssl_context())
            except Unreachable:  # `vast` has logged it
                await asyncio.sleep(failures.failed())
            else:
                log.info("endpoint_found", endpoint=self.vast.endpoint)
                return

    async def _watch(self) -> None:
        await self.connect()
        workers_at = -WATCH_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() - workers_at >= WATCH_SECONDS:
                workers_at = loop.time()
                with contextlib.suppress(Unreachable):  # `vast` has logged it
                    await self._watch_workers()
            if self.plan.limits.price is None:
                try:
                    await self._watch_prices()
                    self._price_trouble.over()
                except Unreachable as error:
                    self._price_trouble.met(str(error), message=f"{ASSUMED_PRICE:.2f} an hour is assumed meanwhile")
            await asyncio.sleep(PRICE_SECONDS)
            await self._url_met.wait(WATCH_SECONDS / 2)

    async def _watch_workers(self) -> None:
        workers = await self.vast.workers()
        working = sum(each.working > 0 for each in workers if not each.off)
        ours = len(self.book.in_state("held")) + len(self.book.in_state("granted"))
        foreign = max(0, working - ours)
        if foreign > self.foreign:
            log.warning(
                "foreign_holds",
                working=working,
                ours=ours,
                message="more workers of this endpoint work than the ledger knows: another client, or a ledger that was"
                " removed; their time is in no limit",
            )
        self.foreign = foreign

    async def _watch_prices(self) -> None:
        urls = [address(claim.url) for claim in self.book.claims.values() if claim.url is not None]
        if not self.instances or any(url not in self.instances for url in urls):
            self.instances = await self.vast.instances()
        for claim in self.book.in_state("held"):
            self._set_price(claim.id)

    def _set_price(self, claim_id: str) -> None:
        """Record the price of a held claim's instance, as soon as it is known."""
        claim = self.book.claims.get(claim_id)
        if claim is None or claim.state != "held" or claim.price is not None:
            return
        found = self.instances.get(str(claim.instance)) or self.instances.get(address(claim.url or ""))
        if self.plan.limits.price is not None:
            self.book.priced(claim_id, self.plan.limits.price, found.instance if found else None)
        elif found is not None:
            self.book.priced(claim_id, found.price, found.instance)

    # -- logging and status ------------------------------------------------------------------------------------------

    def _log_event(self, claim: Claim, event: Event) -> None:
        if event.kind == "granted" and address(claim.url or "") not in self.instances:
            self._url_met.set()
        elif event.kind == "held":
            asyncio.get_running_loop().call_soon(self._set_price, claim.id)
        fields: dict[str, Any] = {"claim": claim.id}
        if claim.url is not None:
            fields["url"] = claim.url
        if event.kind == "held":
            fields["waited"] = round(event.at - claim.opened_at, 3)
        elif event.kind == "priced":
            fields |= {"price": claim.price, "instance": claim.instance}
        elif event.kind == "ended":
            fields["reason"] = event.reason
            fields["held_seconds"] = claim.held_seconds
            fields["result"] = (claim.end.final or {}).get("result") if claim.end is not None else None
        if event.kind != "refused":
            log.info(f"claim_{event.kind}", **{name: value for name, value in fields.items() if value is not None})

    def readiness(self) -> dict[str, str | None]:
        """Each check with the reason of its failure; None: it passes."""
        late = stopwatch() - self._polled > 3 * self.plan.policy.interval + 10
        unread = "it has not been read yet" if not self.polled_at else "the last look is too long ago"
        return {
            "queue": self.queue_trouble.why or (unread if late else None),
            "ledger": self.book.trouble,
            "autoscaler": self.vast.trouble,
        }

    def status(self) -> dict[str, Any]:
        """The document of GET /status."""
        now = self.clock.now()
        return {
            "version": __version__,
            "endpoint": self.vast.endpoint,
            "queue": self.queue.shown,
            "policy": self.plan.policy._asdict(),
            "ready": self.readiness(),
            "last_poll_at": iso(self.polled_at) if self.polled_at else None,
            "decision": None if self.step is None else self.step.decision.numbers,
            "limit": {
                "reached": self.room.reached,
                "hours_24h": round(self.room.spent.hours, 4),
                "dollars_24h": round(self.room.spent.dollars, 4),
                "opens_again_at": iso(self.room.again_at) if self.room.again_at else None,
            },
            "stalled": self.stalled,
            "foreign": self.foreign,
            "claims": [
                {
                    "id": claim.id,
                    "state": "silent" if claim.id in self.driver.silent else claim.state,
                    "opened_at": iso(claim.opened_at),
                    "held_at": iso(claim.held_at) if claim.held_at else None,
                    "attached": claim.attached_at is not None,
                    "seconds": round(now - (claim.held_at or claim.opened_at), 3),
                    "url": claim.url,
                    "instance": claim.instance,
                    "price": claim.price,
                }
                for claim in self.book.claims.values()
            ],
        }


@contextlib.asynccontextmanager
async def running(
    plan: Plan, queue: Queue, vast: Vast, ledger: Ledger, clock: WorkerClock
) -> AsyncIterator[Dispatcher]:
    """A dispatcher with its connections, which are closed at the end of the block."""
    context = ssl.create_default_context()
    # Without a limit: each followed session keeps a connection open.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=context)) as http:
        try:
            yield Dispatcher(plan, queue, vast, ledger, clock, http, context)
        finally:
            await queue.close()
            await vast.close()
