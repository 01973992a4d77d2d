"""Iterates over the reservations of the worker on this machine, each held for as long as the body of its block runs.

    async for reservation in reservations():
        async with reservation:
            job = await queue.get()
            reservation.result = await reservation.run_process(work, job)
            await job.acknowledge()

While the body runs, this process is attached to the reservation: the worker extends a session while it is attached, and
ends a reservation whose consumer has died. When the body is done, the reservation is released by its id, with the
result, or with {"error": ...} if the body has raised. When the reservation ends first, because its caller hung up, its
deadline passed or the worker stopped, the body is cancelled, and the loop continues with the next one.

Everything that belongs to a job, including its acknowledgement, must be inside the `async with`: the line after it is
also reached when the body was cancelled (`reservation.gone_because` says so). One worker has one consumer: a second one
waits until the first has ended.

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
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import datetime
from typing import Any, Final, Literal, TypeVar, get_args

from nullworker import aio
from nullworker.consumer import blocking, current
from nullworker.consumer.control_port import RETRY_SECONDS, AsyncControlClient
from nullworker.consumer.liveness import LivenessConnection
from nullworker.errors import WorkerUnreachable

log = logging.getLogger(__name__)

#: Seconds for which a worker may be silent before its reservation counts as gone: a restart takes less.
PATIENCE_SECONDS = 30.0
#: Seconds between two polls of the held reservation, beside the news of the liveness connection; and for an answer.
POLL_SECONDS = 5.0
#: Seconds for which a release is repeated without an answer; after that, when the same reservation comes back.
RELEASE_SECONDS = 5.0
#: Seconds for which another consumer may seem attached: it may be our last connection, whose end is not noticed yet.
TAKEN_SECONDS = 3.0

ReservationState = Literal["offered", "working", "releasing", "owed", "released", "gone"]
Move = Literal["enter", "end", "leave", "taken", "stale", "silent"]
ReleaseReason = Literal["explicit", "consumer_exit"]

#: `offered`: attached, the body has not begun. `working`: the body runs. `releasing`: the body has ended. `owed`: a
#: release was sent, and no answer came. `gone`: it ended without a release of ours.
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
    """The result is not JSON, or over 64 KiB; the reservation was released with an error in its place."""


async def reservations(
    url: str | None = None,
    *,
    extend: bool = False,
    cancel: bool = True,
    reason: ReleaseReason = "explicit",
    patience: float = PATIENCE_SECONDS,
) -> AsyncGenerator[Reservation, None]:
    """The reservations of the worker on this machine, one after another, for ever; also after the worker's restart.

    Args:
        url: its control port; None is http://127.0.0.1:$NULL_CONTROL_PORT, by default 18999.
        extend: let the worker extend a request too; a session is always extended. A body that hangs then holds the
            worker for up to NULL_MAX_HOLD_SECONDS: give it a time limit.
        cancel: cancel the body when the reservation is gone; False: the body must check `gone` itself.
        reason: the reason of the release in the log: explicit or consumer_exit.
        patience: seconds for which the worker may be silent before its reservation counts as gone.

    Raises:
        ValueError: there is no such reason.
    """
    if reason not in get_args(ReleaseReason):
        raise ValueError(f"reason must be explicit or consumer_exit, not {reason!r}")
    control = AsyncControlClient(url)
    last: Reservation | None = None
    async with control.http:
        while True:
            if current.stopping.is_set():
                raise asyncio.CancelledError("the consumer is stopping")
            row = await control.next()
            if last is not None and row["id"] == last.id and last.state in ("offered", "owed"):
                await _to_its_end(last.finish())  # the worker has not received the release yet
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
    """Wait until the consumer is attached. False: the reservation has ended before."""
    logged = False
    while connection.state != "attached":
        if connection.state == "over":
            return False
        if connection.state == "taken" and not logged:
            log.warning("another consumer is attached to reservation %s: waiting until it has ended", reservation_id)
            logged = True
        await changed.wait(POLL_SECONDS)
    return True


def _from_thread(function: Callable[[], object]) -> Callable[[], None]:
    """A function for any thread, which calls `function` in the running loop, while that loop runs."""
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
        id: as in the log and in the answer to its caller.
        kind: request or session.
        metadata: the caller's, or {}.
        ends_at: the deadline, ISO 8601 UTC; each extension moves it.
        result: any JSON, set by the body, for the caller.
        state: see MOVES.
        gone: set when the reservation has ended without a release; `gone_because` says how. Any thread may call
            `gone.is_set()`.
    """

    def __init__(
        self,
        control: AsyncControlClient,
        row: dict[str, Any],
        connection: LivenessConnection,
        changed: aio.AutoResetEvent,
        *,
        cancel: bool,
        reason: ReleaseReason,
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
        self._deadline: float  # by the loop's clock
        self._note(row)
        self._release: dict[str, Any] = {}
        self._threads: set[concurrent.futures.Future[Any]] = set()

    @property
    def released(self) -> bool:
        """Whether the worker has accepted the release."""
        return self.state == "released"

    def seconds_left(self) -> float:
        """Seconds until the deadline, by the worker's clock."""
        return self._deadline - asyncio.get_running_loop().time()

    def may_begin(self) -> bool:
        """Whether another job may begin in this reservation.

        False once it has ended, half of NULL_MAX_HOLD_SECONDS has passed, or the consumer is stopping.
        """
        limit = self._connection.max_hold
        held = asyncio.get_running_loop().time() - self._begun
        if current.stopping.is_set():
            return False
        return self.state == "working" and (limit is None or held < limit / 2)

    async def extend(self, seconds: float) -> bool:
        """Move the deadline to `seconds` from now. False: the worker refused, or did not answer."""
        try:
            status, answer = await self._control.post("/extend", {"reservation_id": self.id, "seconds": seconds})
        except WorkerUnreachable:
            return False
        if status == 200:  # the worker's cap may make it less than requested
            self._deadline += _seconds(answer["ends_at"]) - _seconds(self.ends_at)
            self.ends_at = answer["ends_at"]
        return status == 200

    async def run_process(self, function: Callable[..., _T], *args: Any, kill_after: float = 5.0) -> _T:
        """Call `function(*args)` in a process of its own, which ends with the reservation, and return its result.

        For code that blocks, such as GPU work. When the body is cancelled, the process and its children get SIGTERM,
        and SIGKILL after `kill_after` seconds; they have ended when this raises. The process is a new Python
        (multiprocessing's `spawn`): function, arguments and result are pickled, and the module that defines the
        function is imported there.

        Raises:
            ChildDied: the process has ended without a result.
            Exception: whatever the function has raised.
        """
        return await blocking.run_process(function, args, kill_after=kill_after)

    async def run_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call `function(*args)` in a thread of its own, and return its result.

        A thread cannot be ended: when the body is cancelled, it continues, and no other reservation is taken before it
        has ended. It may check `reservation.gone.is_set()`. Only the end of this process ends it at once.
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
        self._watcher.cancel()  # first: a body that has ended must not be cancelled any more
        stopped = isinstance(error, asyncio.CancelledError) and not self._is_ours(error)
        try:
            if self._threads and not stopped:
                log.warning("reservation %s: a thread still runs; the next one is taken when it has ended", self.id)
                await asyncio.wait([asyncio.wrap_future(thread) for thread in self._threads])
        finally:
            current.left(self.id)
            await _to_its_end(self._leave(error))
        ours = self._is_ours(error)
        if self._cancel and self.gone.is_set():
            getattr(self._body, "uncancel", int)()  # Python 3.11 and newer count cancellations
        return ours

    async def _leave(self, error: BaseException | None) -> None:
        (failure,) = await asyncio.gather(self._watcher, return_exceptions=True)
        if isinstance(failure, Exception):
            raise failure
        if self.state == "gone":
            log.info("reservation %s is gone: %s", self.id, self.gone_because)
            return
        self._move("leave")
        self._release = {"reservation_id": self.id, "reason": self._reason}
        if isinstance(error, Exception):
            self._release["result"] = {"error": f"{type(error).__name__}: {error}"}
        elif self.result is not _NOTHING:
            self._release["result"] = self.result
        elif error is not None:
            self._release["result"] = {"error": "the consumer was stopped"}
        await self.finish()

    async def finish(self) -> None:
        """Release it by its id, with the result. The request is repeated for RELEASE_SECONDS if no answer comes.

        Raises:
            ResultRefused: it was released, but without its result.
        """
        if self.state not in ("releasing", "owed"):
            raise RuntimeError("hold each reservation with `async with reservation:`")
        loop = asyncio.get_running_loop()
        until = loop.time() + RELEASE_SECONDS
        while (left := until - loop.time()) > 0:
            try:
                status, answer = await aio.wait_for(self._control.post("/release", self._release), left)
                taken = status == 200 and (answer["released"] or await self._was_taken())
            except (WorkerUnreachable, asyncio.TimeoutError) as error:
                if self.state == "releasing":  # log it once, not twice a second
                    log.warning("reservation %s is not released yet: %s", self.id, str(error) or "no answer")
                self._move("silent")
                await asyncio.sleep(RETRY_SECONDS)
            except (TypeError, ValueError) as error:
                await self._refused(f"the result is not JSON: {error}")
            else:
                if status in (413, 422):
                    await self._refused(answer.get("result") or answer["error"])
                self._move("taken" if taken else "stale")
                if not taken:
                    self.gone_because = answer.get("reason") or answer.get("error")
                    log.warning("reservation %s was not released: %s", self.id, self.gone_because)
                return

    async def _was_taken(self) -> bool:
        """Whether an earlier release of ours, whose answer was lost, has ended it."""
        row = await self._control.known(self.id) if self.state == "owed" else None
        ours = ["released", self._reason, self._release.get("result")]
        return row is not None and json.loads(json.dumps(ours)) == [row["state"], row["reason"], row["result"]]

    async def _refused(self, why: str) -> None:
        if self._release.get("result") == {"error": why}:
            raise RuntimeError(why)  # even the error was refused
        self._release["result"] = {"error": why}
        await self.finish()
        raise ResultRefused(why)

    def _is_ours(self, error: BaseException | None) -> bool:
        """Whether the exception is the cancellation of the body by this class, and not also by another caller."""
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
        """Take over the deadline, by the loop's clock. The worker's clock shows `held_at` + `held_seconds` now."""
        left = _seconds(row["ends_at"]) - _seconds(row["held_at"]) - row["held_seconds"]
        self.ends_at = row["ends_at"]
        self._deadline = asyncio.get_running_loop().time() + left

    async def _watch(self) -> None:
        """Wait until it is not held any more, and cancel the body."""
        why = await self._until_gone()
        self._move("end")
        self.gone_because = why
        self.gone.set()
        current.ended(self.id)
        if self._cancel:
            self._body.cancel()

    async def _until_gone(self) -> str:
        """Poll /reservation until it is not held; return why. The liveness connection only triggers the polls."""
        loop = asyncio.get_running_loop()
        answered, taken_since = loop.time(), math.inf
        while True:
            taken_since = min(taken_since, loop.time()) if self._connection.state == "taken" else math.inf
            if loop.time() > taken_since + TAKEN_SECONDS:
                return "another consumer has attached to it"
            limit = answered + self._patience
            if self.kind == "request":  # a session is held after a restart, however late that is
                limit = min(limit, self._deadline)
            try:
                row = await aio.wait_for(self._control.held(), POLL_SECONDS)
                if row is None or row["id"] != self.id:
                    return await self._control.fate(self.id)
            except (WorkerUnreachable, asyncio.TimeoutError) as error:
                if loop.time() > limit:
                    return f"the worker is gone: {str(error) or f'no answer from {self._control.url}'}"
                await asyncio.sleep(RETRY_SECONDS)
                continue
            answered = loop.time()
            self._note(row)
            await self._changed.wait(POLL_SECONDS)


async def _to_its_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await it to its end, even if this is cancelled meanwhile; raise the cancellation afterwards."""
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
