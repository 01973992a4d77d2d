"""One look at a queue: the protocol of its adapters, its time limit, and errors without a password.

Each adapter uses the usual library of its queue (extra `queues`), imported when it is opened. It reads both numbers in
one transaction or reply if possible, else those in flight first, so that a job which moves meanwhile is counted once or
not at all, but never twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import os
import re
from typing import Any, Final, Protocol

from nullworker.dispatch.decision import Counts
from nullworker.errors import CannotStart, NullworkerError

#: Seconds that one read may take.
READ_SECONDS: Final = 10.0


class QueueUnreadableError(NullworkerError):
    """The queue cannot be read now; the sentence says why, without a password."""


class Queue(Protocol):
    """One queue.

    Attributes:
        shown: what it is called in log lines; no password is in it.
        secrets: what must not be in an error.
    """

    shown: str
    secrets: tuple[str, ...]

    async def read(self) -> Counts:
        """One look at it. Raises whatever its library raises; use `look`."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


async def look(queue: Queue, seconds: float = READ_SECONDS) -> Counts:
    """One look at a queue, within so many seconds.

    Raises:
        QueueUnreadableError: it cannot be read; its connections are closed, and the next look opens new ones.
    """
    task = asyncio.ensure_future(queue.read())
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise QueueUnreadableError(f"{queue.shown} does not answer within {seconds:g} s")
        counts = task.result()
    except Exception as error:  # each library has errors of its own
        with contextlib.suppress(Exception):
            await queue.close()
        if isinstance(error, QueueUnreadableError):
            raise
        raise QueueUnreadableError(f"{queue.shown} cannot be read: {in_words(error, queue)}") from error
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)
        if task.done() and not task.cancelled():
            task.exception()  # looked at, or asyncio complains of one that nobody saw
    if counts.waiting < 0 or (counts.in_flight or 0) < 0:
        raise QueueUnreadableError(f"{queue.shown} cannot be read: it has a negative number of jobs: {counts}")
    return counts


def parse_counts(numbers: Any) -> Counts:
    """One or two numbers; a fraction, as Prometheus gives, is rounded up.

    Raises:
        ValueError: they are others.
    """
    try:
        read = [math.ceil(float(number)) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        read = []
    if len(read) not in (1, 2) or min(read) < 0:
        shown = " ".join(str(number) for number in numbers)[:80]
        raise ValueError(f"one or two numbers from 0 up are wanted, and there is {shown!r}")
    return Counts(read[0], read[1] if len(read) == 2 else None)


def library(module: str, package: str) -> Any:
    """A module of a library that is imported on use.

    Raises:
        CannotStart: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise CannotStart(
            f"this kind of queue needs {package}, which is not installed: pip install 'nullworker[queues]'"
        ) from None


def in_words(error: BaseException, queue: Queue) -> str:
    """An error in one line, without a password, and without the userinfo and the query of a URL in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in queue.secrets:
        text = text.replace(secret, "***")
    return re.sub(r"(//[^\s?]*)\?[^\s'\"]+", r"\1?***", re.sub(r"//[^/\s]+@", "//", text))[:300]
