"""Iterates over the reservations of the worker on this machine, each held for as long as the body of its block runs.

    async for reservation in reservations():
        async with reservation:
            job = await queue.get()
            reservation.result = await reservation.run_process(work, job)
            await job.acknowledge()

While the body runs, this process is attached to the reservation: the worker extends a session for as long as that is
so, and ends a reservation whose consumer has died. When the body is done, the reservation is released by its id, with
the result; when the body raises, with {"error": ...}. When the reservation ends first, because its caller hung up, its
deadline came or the worker stopped, the body is cancelled, and the loop goes on with the next one.

Everything that belongs to a job, its acknowledgement too, must stand inside the `async with`: the line after it is also
reached when the body was cancelled (`reservation.gone_because` says so). One worker has one consumer: a second one
waits until the first is gone.

```mermaid
stateDiagram-v2
    [*] --> offered
    offered --> working: enter
    working --> gone: end
    working --> releasing: leave
    releasing --> released: taken
    releasing --> gone: stale
    releasing --> owed: silent
    owed --> owed: silent
    owed --> released: taken
    owed --> gone: stale
```
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import datetime
from typing import Any, Final, Literal, TypeVar

from nullworker import aio
from nullworker.consumer import blocking, current
from nullworker.consumer.control_port import RETRY_SECONDS, AsyncControlClient
from nullworker.consumer.liveness import LivenessConnection
from nullworker.errors import WorkerUnreachable

log = logging.getLogger(__name__)

#: Seconds for which a worker may be silent before its reservation counts as gone: a restart takes less.
PATIENCE_SECONDS = 30.0
#: Seconds between two looks at what is held, also when the liveness connection has said nothing; and for an answer.
LOOK_SECONDS = 5.0
#: Seconds for a release that is not answered; it is tried again when the same reservation comes back.
FAREWELL_SECONDS = 5.0
#: Seconds for which another connection may stand in the way of ours: the worker may not have seen the end of our last.
TAKEN_SECONDS = 3.0

ReservationState = Literal["offered", "working", "releasing", "owed", "released", "gone"]
Move = Literal["enter", "end", "leave", "taken", "stale", "silent"]

#: `offered`: told of, and attached to. `working`: its body runs. `releasing`: the body is over. `owed`: a release was
#: sent, and nobody knows what came of it. `gone`: it ended without us.
MOVES: Final[dict[tuple[ReservationState, Move], ReservationState]] = {
    ("offered", "enter"): "working",
    ("working", "end"): "gone",
    ("working", "leave"): "releasing",
    ("releasing", "taken"): "released",
    ("releasing", "stale"): "gone",
    ("releasing", "silent"): "owed",
    ("owed", "silent"): "owed",
    ("owed", "taken"): "released",
    ("owed", "stale"): "gone",
}

_NOTHING: Any = object()
_T = TypeVar("_T")


class ResultRefused(ValueError):
    """The result is no JSON or over 64 KiB; the reservation was released with an error in its place."""


async def reservations(
    url: str | None = None,
    *,
    extend: bool = False,
    cancel: bool = True,
    reason: str = "explicit",
    patience: float = PATIENCE_SECONDS,
) -> AsyncGenerator[Reservation, None]:
    """Every reservation of the worker on this machine, one after another, for ever; also after the worker's restart.

    Args:
        url: its control port; None is http://127.0.0.1:$NULL_CONTROL_PORT, by default 18999.
        extend: let the worker move the deadline of a request too; that of a session it moves in any case. A body that
            hangs then holds the worker up to NULL_MAX_HOLD_SECONDS: give it a time limit of its own.
        cancel: cancel the body when the reservation is gone; False leaves it to the body to look at `gone`.
        reason: how the log calls the release: explicit or consumer_exit.
        patience: seconds for which the worker may be silent before its reservation counts as gone.
    """
    control = AsyncControlClient(url)
    last: Reservation | None = None
    async with control.http:
        while True:
            if current.stopping.is_set():
                raise asyncio.CancelledError("the consumer was told to stop")
            row = await control.next()
            if last is not None and row["id"] == last.id and last.state in ("offered", "owed"):
                await _to_its_end(last.finish())  # it has not heard of the release yet
                continue
            changed = aio.AutoResetEvent()
            connection = LivenessConnection(
                control.url, row["id"], extend="all" if extend else "1", changed=_from_thread(changed.set)
            )
            connection.start()
            try:
                if not await _attached(connection, changed, row["id"]):
                    continue
                last = Reservation(control, row, connection, changed, cancel=cancel, reason=reason, patience=patience)
                yield last
            finally:
                connection.close()


async def _attached(connection: LivenessConnection, changed: aio.AutoResetEvent, reservation_id: str) -> bool:
    """Wait until it is attached. False: the reservation has ended before."""
    logged = False
    while connection.state != "attached":
        if connection.state == "over":
            return False
        if connection.state == "taken" and not logged:
            log.warning(
                "another consumer is attached to reservation %s: this one waits until it is gone", reservation_id
            )
            logged = True
        await changed.wait(LOOK_SECONDS)
    return True


def _from_thread(function: Callable[[], object]) -> Callable[[], None]:
    """Calls `function` in the running loop, from any thread, for as long as that loop runs."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            pass

    return call


class Reservation:
    """One reservation of this worker; hold it with `async with`.

    Attributes:
        id, kind, metadata: as the caller made it.
        ends_at: the deadline, ISO 8601; it moves with each extension.
        result: any JSON, set by the body; handed to the caller.
        state: where it stands, see MOVES.
        gone: set when the reservation has ended without this consumer, `gone_because` says how. `gone.is_set()` may be
            asked from any thread.
    """

    def __init__(
        self,
        control: AsyncControlClient,
        row: dict[str, Any],
        connection: LivenessConnection,
        changed: aio.AutoResetEvent,
        *,
        cancel: bool,
        reason: str,
        patience: float,
    ) -> None:
        self.id: str = row["id"]
        self.kind: str = row["kind"]
        self.metadata: dict[str, Any] = row["metadata"] or {}
        self.ends_at: str = row["ends_at"]
        self.result: Any = _NOTHING
        self.state: ReservationState = "offered"
        self.gone = asyncio.Event()
        self.gone_because: str | None = None
        self._control = control
        self._connection, self._changed = connection, changed
        self._cancel, self._reason, self._patience = cancel, reason, patience
        self._begun: float = asyncio.get_running_loop().time() - row["held_seconds"]
        self._deadline = 0.0  # by the loop's clock
        self._note(row)
        self._farewell: dict[str, Any] = {}
        self._threads: set[concurrent.futures.Future[Any]] = set()

    @property
    def released(self) -> bool:
        """Whether the release was taken."""
        return self.state == "released"

    def seconds_left(self) -> float:
        """Until the deadline, as the worker counts."""
        return self._deadline - asyncio.get_running_loop().time()

    def may_begin(self) -> bool:
        """Whether another job may begin in this reservation: while it is held, up to half of NULL_MAX_HOLD_SECONDS.

        Not when the consumer was told to stop, either.
        """
        limit = self._connection.max_hold
        held = asyncio.get_running_loop().time() - self._begun
        if current.stopping.is_set():
            return False
        return self.state == "working" and (limit is None or held < limit / 2)

    async def extend(self, seconds: float) -> bool:
        """Move the deadline to `seconds` from now. False: the worker did not."""
        try:
            status, answer = await self._control.post("/extend", {"reservation_id": self.id, "seconds": seconds})
        except WorkerUnreachable:
            return False
        if status == 200:  # the worker's cap may have made it less than what was asked for
            self._deadline += _seconds(answer["ends_at"]) - _seconds(self.ends_at)
            self.ends_at = answer["ends_at"]
        return status == 200

    async def run_process(self, function: Callable[..., _T], *args: Any, kill_after: float = 5.0) -> _T:
        """What `function(*args)` returns, called in a process of its own, which ends with the reservation.

        For code that blocks, such as GPU work: the event loop stays free. When the body is cancelled, the process and
        its children get SIGTERM, and SIGKILL after `kill_after` seconds; they are gone when this raises. The process is
        started anew (multiprocessing's `spawn`): function, arguments and result are pickled, and the module that
        defines the function is imported there.

        Raises:
            ChildDied: the process has ended without a result.
            Exception: whatever the function has raised.
        """
        return await blocking.run_process(function, args, kill_after=kill_after)

    async def run_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """What `function(*args)` returns, called in a thread of its own.

        A thread cannot be ended: when the body is cancelled, it goes on, and no other reservation is taken before it
        has ended. It may look at `reservation.gone.is_set()`. Only the end of this process ends it at once.
        """
        future = blocking.start_thread(function, args)
        self._threads.add(future)
        future.add_done_callback(self._threads.discard)
        return await asyncio.wrap_future(future)

    async def __aenter__(self) -> Reservation:
        self._move("enter")
        body = asyncio.current_task()
        assert body is not None
        self._body = body
        current.entered(self._control.url, self.id)
        self._watcher = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self._watcher.cancel()  # at once: a body that is over is not cancelled any more
        stopped = isinstance(error, asyncio.CancelledError) and not self._is_ours(error)
        try:
            if self._threads and not stopped:
                log.warning("reservation %s: a thread still runs; the next one is taken when it has ended", self.id)
                await asyncio.wait([asyncio.wrap_future(each) for each in self._threads])
        finally:
            current.left(self.id)
            await _to_its_end(self._leave(error))
        ours = self._is_ours(error)
        if self._cancel and self.gone.is_set():
            getattr(self._body, "uncancel", int)()  # from Python 3.11 on cancellations are counted: this one is over
        return ours

    async def _leave(self, error: BaseException | None) -> None:
        (failure,) = await asyncio.gather(self._watcher, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure
        if self.state == "gone":
            log.info("reservation %s is gone: %s", self.id, self.gone_because)
            return
        self._move("leave")
        self._farewell = {"reservation_id": self.id, "reason": self._reason}
        if isinstance(error, Exception):
            self._farewell["result"] = {"error": f"{type(error).__name__}: {error}"}
        elif self.result is not _NOTHING:
            self._farewell["result"] = self.result
        elif error is not None:
            self._farewell["result"] = {"error": "the consumer was stopped"}
        await self.finish()

    async def finish(self) -> None:
        """Release it by its id, as the body has ended it. Silence is borne for FAREWELL_SECONDS.

        Raises:
            ResultRefused: it was released, but without its result.
        """
        if self.state not in ("releasing", "owed"):
            raise RuntimeError("hold each reservation with `async with reservation:`")
        loop = asyncio.get_running_loop()
        until = loop.time() + FAREWELL_SECONDS
        while (left := until - loop.time()) > 0:
            try:
                status, answer = await aio.wait_for(self._control.post("/release", self._farewell), left)
                taken = status == 200 and (answer["released"] or await self._was_taken())
            except (WorkerUnreachable, asyncio.TimeoutError) as error:
                if self.state == "releasing":  # once: it is tried twice a second
                    log.warning("reservation %s is not released yet: %s", self.id, str(error) or "no answer")
                self._move("silent")
                await asyncio.sleep(RETRY_SECONDS)
            except (TypeError, ValueError) as error:
                await self._refused(f"the result is no JSON: {error}")
            else:
                if status == 422:
                    await self._refused(answer.get("result") or answer["error"])
                self._move("taken" if taken else "stale")
                if not taken:
                    self.gone_because = answer.get("reason") or answer.get("error")
                    log.warning("reservation %s was not released: %s", self.id, self.gone_because)
                return

    async def _was_taken(self) -> bool:
        """Whether what has ended it is an earlier release of ours, of which the answer was lost."""
        known = await self._control.known(self.id) if self.state == "owed" else None
        ours = ["released", self._reason, self._farewell.get("result")]
        return known is not None and json.loads(json.dumps(ours)) == [known["state"], known["reason"], known["result"]]

    async def _refused(self, why: str) -> None:
        if self._farewell["result"] == {"error": why}:
            raise RuntimeError(why)  # not even the error is taken: nothing that a second try could mend
        self._farewell["result"] = {"error": why}
        await self.finish()
        raise ResultRefused(why)

    def _is_ours(self, error: BaseException | None) -> bool:
        """Whether the exception is this class's own cancellation of the body, and nobody else's at the same time."""
        if not (self._cancel and self.gone.is_set() and isinstance(error, asyncio.CancelledError)):
            return False
        return bool(getattr(self._body, "cancelling", lambda: 1)() <= 1)

    def _move(self, move: Move) -> None:
        after = MOVES.get((self.state, move))
        if after is None:
            raise RuntimeError(
                f"a reservation that is {self.state} cannot {move}; hold each one once, with `async with`"
            )
        self.state = after

    def _note(self, row: dict[str, Any]) -> None:
        """The deadline by the loop's clock; the worker's own clock is what `held_at` and `held_seconds` make."""
        left = _seconds(row["ends_at"]) - _seconds(row["held_at"]) - row["held_seconds"]
        self.ends_at = row["ends_at"]
        self._deadline = asyncio.get_running_loop().time() + left

    async def _watch(self) -> None:
        """Find out when it is not held any more."""
        because = await self._until_gone()
        self._move("end")
        self.gone_because = because
        self.gone.set()
        current.ended(self.id)
        if self._cancel:
            self._body.cancel()

    async def _until_gone(self) -> str:
        """The liveness connection only wakes this up; what is true is what /reservation says."""
        loop = asyncio.get_running_loop()
        heard = attached = loop.time()
        while True:
            self._changed.clear()
            if self._connection.state != "taken":
                attached = loop.time()
            elif loop.time() > attached + TAKEN_SECONDS:
                return "another consumer has attached to it"
            limit = heard + self._patience
            if self.kind == "request":  # the worker gives a session's consumer time after its restart, however late
                limit = min(limit, self._deadline)
            try:
                row = await aio.wait_for(self._control.held(), LOOK_SECONDS)
                if row is None or row["id"] != self.id:
                    return await self._control.fate(self.id)
            except (WorkerUnreachable, asyncio.TimeoutError) as error:
                if loop.time() > limit:
                    return f"the worker is gone: {str(error) or f'no answer from {self._control.url}'}"
                await asyncio.sleep(RETRY_SECONDS)
                continue
            heard = loop.time()
            self._note(row)
            await self._changed.wait(LOOK_SECONDS)


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
