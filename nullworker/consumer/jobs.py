"""Processes the jobs of a queue within one reservation: the part that is the same for every queue with leases.

A `Job` says how a message is acknowledged, failed, given back and renewed; `drain` processes one job after another. A
message that cannot be processed goes to a failed list. A failed renewal is tried again until the lease has run out by
this machine's clock; then, or when another consumer has the job, the work is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nullworker import aio
from nullworker.consumer.reservations import Reservation

log = logging.getLogger(__name__)

#: Seconds for which a queue may not answer before the reservation is released.
AWAY_SECONDS = 180.0
#: Seconds between two tries of a queue that does not answer: the first, and the longest.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 5.0
#: The part of a lease after which it counts as over; the rest is time for the work to stop.
LEASE_SHARE: Final = 0.9
#: Seconds for giving a job back while the consumer is stopping.
GIVE_BACK_SECONDS: Final = 2.0
#: Seconds for one call of the queue.
CALL_SECONDS: Final = 10.0
#: Failures in a row after which the reservation is released: the jobs are not at fault.
MAX_FAILURES: Final = 10
#: Length of an error that the caller of /reserve gets.
MAX_ERROR_CHARS: Final = 1000


class Lost(Exception):
    """Another consumer may have the job by now. The message, which the caller gets, says why."""


class Job(ABC):
    """A message that was taken from a queue and is neither acknowledged nor given back.

    Attributes:
        body: JSON, as it was put into the queue.
        lease: seconds for which it is ours after it was taken or renewed; `math.inf`: no limit.
        wait: seconds before the work begins, in which another consumer that had the job can stop; it is renewed
            meanwhile.
    """

    body: str | bytes
    lease: float = math.inf
    wait: float = 0.0

    @abstractmethod
    async def done(self) -> None:
        """Acknowledge it. Must be idempotent: a call that failed half-way is repeated."""

    @abstractmethod
    async def failed(self, why: str) -> None:
        """Put it into the failed list, with the reason, and acknowledge it."""

    @abstractmethod
    async def give_back(self) -> None:
        """Return it to the queue at once; the reservation has ended, or the consumer is stopping."""

    async def renew(self) -> None:  # noqa: B027  # a queue without leases has nothing to renew
        """Renew the lease.

        Raises:
            Lost: another consumer has it.
        """

    async def lost(self) -> str:
        """Wait until another consumer may have it, and return why; for queues that signal this."""
        await asyncio.Event().wait()
        raise AssertionError


Take = Callable[[], Awaitable["Job | None"]]


async def drain(
    reservation: Reservation, take: Take, work: Callable[[Any], Awaitable[object]], *, idle: float = 0.0
) -> dict[str, Any]:
    """Process one job after another until the queue is empty. Return the result for the reservation.

    Args:
        take: returns the next job, or None if none has come for a while.
        work: called with the JSON of a job. If it raises, the job goes to the failed list.
        idle: seconds for which an empty queue is polled, after 1 s, doubling to 10 s, before this returns.

    Returns:
        `{"done": n, "failed": n}`, and `"error"`, a sentence, if something went wrong.
    """
    loop, pause = asyncio.get_running_loop(), aio.Backoff(1.0, 10.0)
    result: dict[str, Any] = {"done": 0, "failed": 0}
    empty_since: float | None = None
    failures = 0
    while reservation.may_begin() and failures < MAX_FAILURES:
        try:
            job = await _next_job(take)
        except Exception as error:
            result["error"] = _shortened(f"the queue cannot be read: {_described(error)}")
            return result
        if job is None:
            empty_since = empty_since or loop.time()
            left = empty_since + idle - loop.time()
            if left <= 0:
                break
            await asyncio.sleep(min(pause.failed(), left))
            continue
        empty_since = None
        pause.worked()
        why = await _process(job, work)
        failures = 0 if why is None else failures + 1
        result["done" if why is None else "failed"] += 1
        if why is not None:
            log.warning("a job was not done: %s", why)
            result["error"] = _shortened(why)
    return result


async def _process(job: Job, work: Callable[[Any], Awaitable[object]]) -> str | None:
    """Process one job. None: it is done and acknowledged; else why not."""

    async def do() -> str | None:
        try:
            content = json.loads(job.body)
        except (ValueError, RecursionError) as error:
            return f"the message is not JSON: {error}"
        await asyncio.sleep(job.wait)
        try:
            await work(content)
        except Exception as error:
            return _described(error)
        return None

    async def settle() -> str | None:
        why = await do()
        await _settle(job.done if why is None else lambda: job.failed(_shortened(why)))
        return why

    keeping = [asyncio.ensure_future(_renew(job)), asyncio.ensure_future(job.lost())]
    working = asyncio.ensure_future(settle())
    try:
        await asyncio.wait({working, *keeping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await _cancel(working)
            raise Lost(next(task.result() for task in keeping if task.done()))
        return working.result()
    except Lost as lost:
        return f"the job was lost to another consumer: {lost}"
    except asyncio.CancelledError:
        await _cancel(working)
        with contextlib.suppress(Exception):
            await aio.wait_for(job.give_back(), GIVE_BACK_SECONDS)
        raise
    finally:
        for task in keeping:
            await _cancel(task)


async def _renew(job: Job) -> str:
    """Renew the lease until it is lost. Return why it was lost."""
    loop = asyncio.get_running_loop()
    if math.isinf(job.lease):
        await asyncio.Event().wait()
    until = loop.time() + job.lease * LEASE_SHARE
    while True:
        await asyncio.sleep(job.lease / 3)
        while True:
            began = loop.time()
            try:
                await aio.wait_for(job.renew(), min(CALL_SECONDS, max(until - began, 0.1)))
                until = began + job.lease * LEASE_SHARE
                break
            except Lost as lost:
                return str(lost)
            except Exception as error:
                log.warning("a lease was not renewed yet: %s", _described(error))
                if loop.time() >= until:
                    return f"its lease ran out and could not be renewed: {_described(error)}"
                await asyncio.sleep(min(FIRST_RETRY_SECONDS, job.lease / 10))


async def _next_job(take: Take) -> Job | None:
    """The next job. A queue that does not answer is asked again for AWAY_SECONDS."""
    loop, pause = asyncio.get_running_loop(), aio.Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
    until = loop.time() + AWAY_SECONDS
    while True:
        try:
            return await take()
        except Exception as error:
            if loop.time() >= until:
                raise
            log.warning("the queue does not answer; trying again: %s", _described(error))
            await asyncio.sleep(pause.failed())


async def _settle(call: Callable[[], Awaitable[None]]) -> None:
    """Repeat the call until it succeeds; the end of the lease cancels it."""
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + AWAY_SECONDS, aio.Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
    while True:
        try:
            await aio.wait_for(call(), CALL_SECONDS)
            return
        except Lost:
            raise
        except Exception as error:
            if loop.time() >= until:
                raise Lost(f"it could not be acknowledged: {_described(error)}") from error
            log.warning("a job is not acknowledged yet: %s", _described(error))
            await asyncio.sleep(pause.failed())


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel the task and wait for its end, even if this is cancelled meanwhile."""
    task.cancel()
    cancelled: BaseException | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()  # marks it as retrieved, or asyncio logs it
    if cancelled is not None:
        raise cancelled


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shortened(text: str) -> str:
    return " ".join(text.split())[:MAX_ERROR_CHARS]
