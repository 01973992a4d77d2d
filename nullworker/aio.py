"""asyncio helpers: an auto-reset event, a time limit that keeps cancellations, a backoff, and signal handling.

Before Python 3.12, `asyncio.wait_for` loses a cancellation that arrives together with the result: a caller's hang-up
would be missed, and a cancelled task would continue. Use `wait_for` of this module where that matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

#: Signals that end a process in order. SIGHUP stays ignored where it is, as under nohup.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class AutoResetEvent:
    """An event for one waiter, cleared by the `wait` that sees it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self, *_: object) -> None:
        """Wake the waiter. Arguments are ignored, so that it can be used as an observer."""
        self._event.set()

    def clear(self) -> None:
        """Reset it without waiting."""
        self._event.clear()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set, for at most `seconds`. Returns whether it was set."""
        loop = asyncio.get_running_loop()
        timer = None if seconds is None else loop.call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._event.clear()
        return timer is None or loop.time() < timer.when()


class Backoff:
    """Seconds to wait after each failure in a row: `first`, doubled each time, at most `longest`."""

    def __init__(self, first: float = 1.0, longest: float = 10.0) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def failed(self) -> float:
        """Count a failure. Returns the seconds to wait."""
        seconds, self._next = self._next, min(self._next * 2, self._longest)
        return seconds

    def worked(self) -> None:
        """Count a success: the next wait is `first` again."""
        self._next = self._first


async def wait_for(awaitable: Awaitable[T], seconds: float) -> T:
    """Await with a time limit; `awaitable` is cancelled when it takes longer.

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # marks it as retrieved, or asyncio logs it


def on_signals(handler: Callable[[signal.Signals], None], signals: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Call `handler` in the running loop with each signal that arrives."""
    loop = asyncio.get_running_loop()
    for number in signals:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, handler, number)


class Interrupted(Exception):
    """A signal ended `run_until_signalled`. The message is that of the cancellation."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.signal = number


async def run_until_signalled(
    work: Coroutine[Any, Any, T],
    signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    *,
    before: Iterable[signal.Signals] = (),
) -> T:
    """Await `work`; each signal cancels it. `before`: those that have come already.

    Raises:
        Interrupted: a signal came, and `work` ended by cancellation.
    """
    received = list(before)
    task = asyncio.ensure_future(work)

    def stop(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    on_signals(stop, signals)
    if received:
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError as error:
        if not received:
            raise
        raise Interrupted(str(error) or "interrupted", received[0]) from None


async def in_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The result of `function`, run in a thread that an exit of the process does not wait for.

    asyncio's own threads are waited for, and a getaddrinfo on a machine whose DNS is dead takes a quarter of a minute.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if not done.done():  # else the caller was cancelled
            done.set_exception(error) if error else done.set_result(cast(T, result))

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await done
