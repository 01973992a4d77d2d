"""Iterates over the reservations of the worker on this machine, each held for as long as the body of its block runs.

    async for reservation in reservations():
        async with reservation:
            job = await queue.get()
            reservation.result = await work(job)
            await job.acknowledge()

While the body runs, the reservation is extended in the background. When the body is done, the reservation is released
by its id, with the result; when the body raises, with {"error": ...}. When the reservation ends first, because its
caller hung up, its deadline came or the worker stopped, the body is cancelled and the loop goes on with the next one.

Everything that belongs to a job, its acknowledgement too, must stand inside the `async with`: the line after it is also
reached when the body was cancelled (`reservation.gone_because` says so). One worker has one consumer: two would both be
given the same reservation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from datetime import datetime
from typing import Any, TypeVar

from nullworker.aio import AutoResetEvent
from nullworker.consumer.control_port import RETRY_SECONDS, AsyncControlClient
from nullworker.errors import WorkerUnreachable

log = logging.getLogger(__name__)

#: Seconds for which a worker may be silent before its reservation counts as gone: a restart takes less.
PATIENCE_SECONDS = 30.0
#: Seconds between two looks at what is held, also when the stream of events has said nothing.
LOOK_SECONDS = 5.0
#: Seconds for a release that is not answered; it is tried again when the same reservation comes back.
FAREWELL_SECONDS = 5.0

_NOTHING: Any = object()
_T = TypeVar("_T")


class ResultRefused(ValueError):
    """The result is no JSON or over 64 KiB; the reservation was released with an error in its place."""


async def reservations(
    url: str | None = None,
    *,
    extend: bool = True,
    cancel: bool = True,
    reason: str = "explicit",
    patience: float = PATIENCE_SECONDS,
) -> AsyncGenerator[Reservation, None]:
    """Every reservation of the worker on this machine, one after another, for ever; also after the worker's restart.

    Args:
        url: its control port; None is http://127.0.0.1:$NULL_CONTROL_PORT, by default 18999.
        extend: move the deadline, each time half of the hold has passed, to a whole hold from then. A body that hangs
            holds the worker for ever, then: give it a time limit of its own.
        cancel: cancel the body when the reservation is gone; False leaves it to the body to look at `gone`.
        reason: how the log calls the release: explicit or consumer_exit.
        patience: seconds for which the worker may be silent before its reservation counts as gone.
    """
    control = AsyncControlClient(url)
    last: Reservation | None = None
    async with control.http:
        while True:
            told = await control.next()
            if last is not None and told["id"] == last.id and not last.gone.is_set():
                await _to_its_end(last.finish())  # it has not heard of the release yet
                continue
            last = Reservation(control, told, extend=extend, cancel=cancel, reason=reason, patience=patience)
            yield last


class Reservation:
    """One reservation of this worker; hold it with `async with`.

    Attributes:
        id, kind, metadata: as the caller made it.
        ends_at: the deadline, ISO 8601; it moves with each extension.
        result: any JSON, set by the body; handed to the caller.
        gone: set when the reservation has ended without this consumer; `gone_because` says how.
        released: whether the release was taken.
    """

    def __init__(
        self,
        control: AsyncControlClient,
        told: dict[str, Any],
        *,
        extend: bool,
        cancel: bool,
        reason: str,
        patience: float,
    ) -> None:
        self.id: str = told["id"]
        self.kind: str = told["kind"]
        self.metadata: dict[str, Any] = told["metadata"] or {}
        self.ends_at: str = told["ends_at"]
        self.result: Any = _NOTHING
        self.gone = asyncio.Event()
        self.gone_because: str | None = None
        self.released = False
        self._control = control
        self._extend, self._cancel, self._reason, self._patience = extend, cancel, reason, patience
        self._hold = _seconds(told["ends_at"]) - _seconds(told["held_at"])
        self._note(told)
        self._farewell: dict[str, Any] | None = None
        self._body: asyncio.Task[Any] | None = None
        self._cancelled = self._unanswered = False  # its body; a release of which nobody knows what came

    def seconds_left(self) -> float:
        """Until the deadline, as the worker counts."""
        return self._deadline - asyncio.get_running_loop().time()

    async def extend(self, seconds: float) -> bool:
        """Move the deadline to `seconds` from now. False: the worker did not; it is asked again in the background."""
        try:
            status, answer = await self._control.post("/extend", {"reservation_id": self.id, "seconds": seconds})
        except WorkerUnreachable:
            return False
        if status == 200:  # the worker's cap may have made it less than what was asked for
            self._deadline += _seconds(answer["ends_at"]) - _seconds(self.ends_at)
            self.ends_at = answer["ends_at"]
        return status == 200

    async def __aenter__(self) -> Reservation:
        self._body = asyncio.current_task()
        self._watcher = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self._watcher.cancel()  # at once: a body that is over is not cancelled any more
        return await _to_its_end(self._leave(error))

    async def _leave(self, error: BaseException | None) -> bool:
        (failure,) = await asyncio.gather(self._watcher, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure
        if self.gone.is_set():
            log.info("reservation %s is gone: %s", self.id, self.gone_because)
            return self._is_ours(error)
        self._farewell = {"reservation_id": self.id, "reason": self._reason}
        if isinstance(error, Exception):
            self._farewell["result"] = {"error": f"{type(error).__name__}: {error}"}
        elif self.result is not _NOTHING:
            self._farewell["result"] = self.result
        elif error is not None:
            self._farewell["result"] = {"error": "the consumer was stopped"}
        await self.finish()
        return False

    async def finish(self) -> None:
        """Release it by its id, as the body has ended it. Silence is borne for FAREWELL_SECONDS.

        Raises:
            ResultRefused: it was released, but without its result.
        """
        if self._farewell is None:
            raise RuntimeError("hold each reservation with `async with reservation:`")
        loop = asyncio.get_running_loop()
        until = loop.time() + FAREWELL_SECONDS
        while (left := until - loop.time()) > 0:
            try:
                status, answer = await asyncio.wait_for(self._control.post("/release", self._farewell), left)
                taken = status == 200 and (answer["released"] or await self._was_taken())
            except (WorkerUnreachable, asyncio.TimeoutError) as error:
                if not self._unanswered:  # once: it is tried twice a second
                    log.warning("reservation %s is not released yet: %s", self.id, str(error) or "no answer")
                self._unanswered = True
                await asyncio.sleep(RETRY_SECONDS)
            except (TypeError, ValueError) as error:
                await self._refused(f"the result is no JSON: {error}")
            else:
                if status == 422:
                    await self._refused(answer.get("result") or answer["error"])
                self.released = taken
                if not taken:
                    self.gone_because = answer.get("reason") or answer.get("error")
                    log.warning("reservation %s was not released: %s", self.id, self.gone_because)
                return

    async def _was_taken(self) -> bool:
        """Whether what has ended it is an earlier release of ours, of which the answer was lost."""
        known = await self._control.known(self.id) if self._unanswered else None
        ours = ["released", self._reason, (self._farewell or {}).get("result")]
        return known is not None and json.loads(json.dumps(ours)) == [known["state"], known["reason"], known["result"]]

    async def _refused(self, why: str) -> None:
        assert self._farewell is not None
        if self._farewell["result"] == {"error": why}:
            raise RuntimeError(why)  # not even the error is taken: nothing that a second try could mend
        self._farewell["result"] = {"error": why}
        await self.finish()
        raise ResultRefused(why)

    def _is_ours(self, error: BaseException | None) -> bool:
        """Whether the exception is this class's own cancellation, and no other's at the same time."""
        if not self._cancelled:
            return False
        others = getattr(self._body, "uncancel", int)()  # from Python 3.11 on cancellations are counted
        return isinstance(error, asyncio.CancelledError) and not others

    def _note(self, told: dict[str, Any]) -> None:
        """The deadline by the loop's clock; the worker's own clock is what `held_at` and `held_seconds` make."""
        self.ends_at = told["ends_at"]
        left: float = _seconds(told["ends_at"]) - _seconds(told["held_at"]) - told["held_seconds"]
        self._deadline = asyncio.get_running_loop().time() + left

    async def _watch(self) -> None:
        """Extend it while it is held, and find out when it is not any more."""
        wakeup = AutoResetEvent()
        ringer = asyncio.ensure_future(self._control.ring(wakeup))
        try:
            self.gone_because = await self._until_gone(wakeup)
        finally:
            ringer.cancel()
        self.gone.set()
        if self._cancel and self._body is not None:
            self._cancelled = True
            self._body.cancel()

    async def _until_gone(self, wakeup: AutoResetEvent) -> str:
        """The stream of events only wakes this up; what is true is what /reservation says."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while True:
            wakeup.clear()
            try:
                told = await self._control.held()
                if told is None or told["id"] != self.id:
                    return await self._control.fate(self.id)
            except WorkerUnreachable as error:
                if loop.time() > min(heard + self._patience, self._deadline):
                    return f"the worker is gone: {error}"
                await asyncio.sleep(RETRY_SECONDS)
                continue
            heard = loop.time()
            self._note(told)
            pause, half = LOOK_SECONDS, self._hold / 2
            if self._extend:
                if self.seconds_left() <= half:
                    await self.extend(self._hold)
                pause = min(pause, max(self.seconds_left() - half, half / 10))
            await wakeup.wait(pause)


async def _to_its_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for it also when cancelled meanwhile, even twice; the cancellation goes on its way afterwards."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso.replace("Z", "+00:00")).timestamp()


@contextlib.asynccontextmanager
async def health_endpoint(
    port: int, trouble: Callable[[], str | None] = lambda: None, *, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """GET /health for the worker's BACKEND_HEALTH_URL: 200 while `trouble` is None, else 503 and what it says.

    Gives the port, for port 0 is any free one. It shares the consumer's loop: a consumer that is stuck does not answer.
    """
    from aiohttp import web

    async def health(_: web.Request) -> web.Response:
        why = trouble()
        body = {"status": "ok"} if why is None else {"status": "error", "why": why}
        return web.json_response(body, status=200 if why is None else 503)

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def run(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run for a consumer. SIGTERM and SIGINT cancel it: what it holds is released, and the process exits 0."""

    async def until_told() -> None:
        task = asyncio.ensure_future(main)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(until_told())
