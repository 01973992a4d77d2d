"""`asyncio.run` for consumers: SIGTERM and SIGINT release what is held, even if the body blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Coroutine
from typing import Any, Final

from nullworker.consumer import current
from nullworker.control_client import ControlClient
from nullworker.errors import NullworkerError

log = logging.getLogger(__name__)

#: Seconds for which the event loop may be blocked after a signal; the worker drains for 5, the supervisor waits 10.
BLOCKED_SECONDS: Final = 3.0
#: Seconds for the release that is made when it is blocked for longer.
RELEASE_SECONDS: Final = 1.0


def _block_signals() -> None:
    """Block the signals around a fork: until the child has reset them, its signals would be written to our pipe."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


def _reset_in_child() -> None:
    for number in _NUMBERS:
        if signal.getsignal(number) is _ignored:
            signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
    _unblock_signals()


def _ignored(*_: object) -> None:
    """A handler that does nothing: without a Python handler, nothing is written to the wakeup pipe."""


_NUMBERS: Final = (signal.SIGTERM, signal.SIGINT)
os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_reset_in_child)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a consumer. SIGTERM and SIGINT cancel it; the held reservation is released, and the process exits 0.

    A body that blocks the event loop cannot be cancelled. After BLOCKED_SECONDS the reservation is then released from
    another thread, and the process exits 1 in the middle of the job.
    """
    asyncio.run(_until_signalled(main))


async def _until_signalled(main: Coroutine[Any, Any, None]) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(main)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # C code that blocks the main thread keeps Python handlers from running, but not the write to this pipe
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _ignored) for number in _NUMBERS}

    def listen() -> None:
        while byte := os.read(reader, 1):
            if byte[0] not in _NUMBERS:
                continue
            handled = threading.Event()

            def stop(handled: threading.Event = handled) -> None:
                handled.set()
                current.stopping.set()
                task.cancel()

            with contextlib.suppress(RuntimeError):  # the loop is closed: the consumer has ended
                loop.call_soon_threadsafe(stop)
                if not handled.wait(BLOCKED_SECONDS):
                    _exit_blocked()
        os.close(reader)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        current.stopping.clear()
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


def _exit_blocked() -> None:
    """Release the held reservations from this thread, and exit."""
    for url, reservation_id in current.held():
        log.error("reservation %s: its body blocks the event loop; releasing it and exiting", reservation_id)
        body = {
            "reservation_id": reservation_id,
            "result": {"error": "the consumer was stopped in the middle of a job"},
        }
        with contextlib.suppress(NullworkerError):
            ControlClient(url).ask("POST", "/release", body, seconds=RELEASE_SECONDS)
    os._exit(1)
