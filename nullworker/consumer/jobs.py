"""Works off a queue within one reservation: what is the same for every queue that lends its jobs for a while.

A `Job` says how one message is acknowledged, failed, given back and renewed; `drain` takes one after another and does
them. Whatever is wrong with one message ends with that message in a failed list. A renewal that fails is tried again
until the lease has run out by this machine's clock; then, and when another consumer has the job, the work is cancelled.
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

#: Seconds for which a queue may be away, while a reservation waits for it.
AWAY_SECONDS = 180.0
#: Seconds between two tries of a queue that is away: the first, and the longest.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 5.0
#: The part of a lease after which it counts as over: what is left of it is for the work to stop.
LEASE_SHARE: Final = 0.9
#: Seconds for a job to be given back while the consumer is being stopped.
GIVE_BACK_SECONDS: Final = 2.0
#: Seconds for one call of the queue.
CALL_SECONDS: Final = 10.0
#: So many failures in a row are not the jobs' fault: the reservation is released.
MAX_FAILURES: Final = 10
#: Bytes of an error that the caller of /reserve is told.
MAX_ERROR_CHARS: Final = 1000


class Lost(Exception):
    """The right to a job is lost: somebody else may do it by now. The message says why, for the caller."""


class Job(ABC):
    """One message that was taken from a queue and not settled yet.

    Attributes:
        body: JSON, as it was put in.
        lease: seconds for which it is ours after it was taken or renewed; `math.inf` without such a limit.
        wait: seconds before the work may begin, for another consumer that had it to stop; it is renewed meanwhile.
    """

    body: str | bytes
    lease: float = math.inf
    wait: float = 0.0

    @abstractmethod
    async def done(self) -> None:
        """Acknowledge it. A second call, after one that failed half-way, must do no harm."""

    @abstractmethod
    async def failed(self, why: str) -> None:
        """Put it into the failed list, with the reason, and acknowledge it."""

    @abstractmethod
    async def give_back(self) -> None:
        """Let others have it at once; the reservation is gone, or the consumer is being stopped."""

    async def renew(self) -> None:  # noqa: B027  # a queue without leases has nothing to renew
        """Begin the lease anew.

        Raises:
            Lost: somebody else has it.
        """

    async def lost(self) -> str:
        """Wait until the right to it is lost, and return why; for queues that say so by themselves."""
        await asyncio.Event().wait()
        raise AssertionError


Take = Callable[[], Awaitable["Job | None"]]


async def drain(
    reservation: Reservation, take: Take, work: Callable[[Any], Awaitable[object]], *, idle: float = 0.0
) -> dict[str, Any]:
    """Do one job after another until the queue is empty; the reservation's result.

    Args:
        take: the next job, or None when none has come for a while.
        work: is called with the JSON of a job. What it raises ends the job in the failed list.
        idle: seconds for which an empty queue is asked again, after 1 s, doubling to 10 s, before this returns.

    Returns:
        `{"done": n, "failed": n}`, and with `"error"`, a sentence, when something was not well.
    """
    loop, pause = asyncio.get_running_loop(), aio.Backoff(1.0, 10.0)
    result: dict[str, Any] = {"done": 0, "failed": 0}
    empty_since: float | None = None
    failures = 0
    while reservation.may_begin() and failures < MAX_FAILURES:
        try:
            job = await _patiently(take)
        except Exception as error:
            result["error"] = _words(f"the queue cannot be read: {_described(error)}")
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
        why = await _one(job, work)
        failures = 0 if why is None else failures + 1
        result["done" if why is None else "failed"] += 1
        if why is not None:
            log.warning("a job was not done: %s", why)
            result["error"] = _words(why)
    return result


async def _one(job: Job, work: Callable[[Any], Awaitable[object]]) -> str | None:
    """One job to its end: None when it is done and acknowledged, else why not."""

    async def do() -> str | None:
        try:
            asked = json.loads(job.body)
        except (ValueError, RecursionError) as error:
            return f"the message is no JSON: {error}"
        await asyncio.sleep(job.wait)
        try:
            await work(asked)
        except Exception as error:
            return _described(error)
        return None

    async def settle() -> str | None:
        why = await do()
        await _again_and_again(job.done if why is None else lambda: job.failed(_words(why)))
        return why

    keeping = [asyncio.ensure_future(_keep(job)), asyncio.ensure_future(job.lost())]
    working = asyncio.ensure_future(settle())
    try:
        await asyncio.wait({working, *keeping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await _cancel(working)
            raise Lost(next(task.result() for task in keeping if task.done()))
        return working.result()
    except Lost as lost:
        return f"the right to the job is lost: {lost}"
    except asyncio.CancelledError:
        await _cancel(working)
        with contextlib.suppress(Exception):
            await aio.wait_for(job.give_back(), GIVE_BACK_SECONDS)
        raise
    finally:
        for task in keeping:
            await _cancel(task)


async def _keep(job: Job) -> str:
    """Renew the lease until it is lost: why."""
    loop = asyncio.get_running_loop()
    if math.isinf(job.lease):
        await asyncio.Event().wait()
    until = loop.time() + job.lease * LEASE_SHARE
    while True:
        await asyncio.sleep(job.lease / 3)
        while True:
            asked = loop.time()
            try:
                await aio.wait_for(job.renew(), min(CALL_SECONDS, max(until - asked, 0.1)))
                until = asked + job.lease * LEASE_SHARE
                break
            except Lost as lost:
                return str(lost)
            except Exception as error:
                log.warning("a lease was not renewed yet: %s", _described(error))
                if loop.time() >= until:
                    return f"its lease ran out and could not be renewed: {_described(error)}"
                await asyncio.sleep(min(FIRST_RETRY_SECONDS, job.lease / 10))


async def _patiently(take: Take) -> Job | None:
    """The next job, also from a queue that is away for AWAY_SECONDS."""
    loop, pause = asyncio.get_running_loop(), aio.Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
    until = loop.time() + AWAY_SECONDS
    while True:
        try:
            return await take()
        except Exception as error:
            if loop.time() >= until:
                raise
            log.warning("the queue is away, and asked again: %s", _described(error))
            await asyncio.sleep(pause.failed())


async def _again_and_again(settle: Callable[[], Awaitable[None]]) -> None:
    """Until it has worked; the end of the lease cancels it."""
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + AWAY_SECONDS, aio.Backoff(FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
    while True:
        try:
            await aio.wait_for(settle(), CALL_SECONDS)
            return
        except Lost:
            raise
        except Exception as error:
            if loop.time() >= until:
                raise Lost(f"it could not be acknowledged: {_described(error)}") from error
            log.warning("a job is not acknowledged yet: %s", _described(error))
            await asyncio.sleep(pause.failed())


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel it and wait for its end, also when cancelled meanwhile."""
    task.cancel()
    cancelled: BaseException | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()  # retrieved, or asyncio logs that nobody did
    if cancelled is not None:
        raise cancelled


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _words(text: str) -> str:
    return " ".join(text.split())[:MAX_ERROR_CHARS]
