"""Runs blocking functions beside an event loop: in a process that can be ended, or in a thread that cannot."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

from nullworker.processes import OrphanGuard, how_it_ended

_T = TypeVar("_T")

#: prctl(2): the kernel signals this process when its parent dies.
_PR_SET_PDEATHSIG: Final = 1
#: Seconds between two checks whether a process group has ended.
_CHECK_SECONDS: Final = 0.02


class ChildDied(RuntimeError):
    """The process that ran a function has ended without a result."""


def start_thread(function: Callable[..., _T], args: tuple[Any, ...]) -> concurrent.futures.Future[_T]:
    """Call a function in a daemon thread: the end of this process does not wait for it."""
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # it cannot be cancelled: the thread would continue

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(function, "__name__", "job"), daemon=True).start()
    return future


async def run_process(function: Callable[..., _T], args: tuple[Any, ...], *, kill_after: float) -> _T:
    """Call a function in a process with a group of its own. Cancellation ends the whole group.

    Raises:
        ChildDied: the process has ended without a result.
        Exception: whatever the function has raised.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, os.getpid(), function, args), daemon=False)
    with ours, contextlib.closing(OrphanGuard(signal.SIGKILL)) as guard:
        with theirs:
            process.start()
        assert process.pid is not None
        guard.hold(process.pid)
        try:
            await _readable(ours.fileno())
            good, value = await asyncio.shield(asyncio.wrap_future(start_thread(_receive, (ours,))))
        except EOFError:
            await _readable(process.sentinel)
            process.join()
            raise ChildDied(
                f"the process of {_name(function)} has ended: {how_it_ended(process.exitcode or 0)}"
            ) from None
        finally:
            try:
                await _end(process, kill_after)
            finally:  # when cancelled once more, the group has ended too
                guard.forget(process.pid)
    if not good:
        raise value
    return value  # type: ignore[no-any-return]  # what the function returned


async def _end(process: Any, kill_after: float) -> None:
    """End the group: SIGTERM, and SIGKILL after `kill_after` seconds or at a cancellation."""
    loop = asyncio.get_running_loop()
    until, cancelled = loop.time() + kill_after, None
    _signal(process.pid, signal.SIGTERM)
    _signal(process.pid, signal.SIGCONT)  # a stopped process does not handle SIGTERM
    while _runs(process):
        if loop.time() >= until or cancelled is not None:
            _signal(process.pid, signal.SIGKILL)
        try:
            await asyncio.sleep(_CHECK_SECONDS)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _runs(process: Any) -> bool:
    """Whether a process of its group runs, or the child itself, which may not have created its group yet."""
    if process.is_alive():
        return True
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # the group does not exist yet, or has ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    except PermissionError:  # a process of the group runs as another user
        pass


async def _readable(file: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(file, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)


def _receive(connection: Connection) -> tuple[bool, Any]:
    good, value = connection.recv()
    return good, value


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _call(connection: Connection, parent: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In the new process: create a group, die with the parent, call the function."""
    os.setsid()
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    try:
        answer: tuple[bool, Any] = (True, function(*args))
    except Exception as error:
        answer = (False, error)
    try:
        connection.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        connection.send((False, TypeError(f"the result of {_name(function)} cannot be pickled: {error}")))
