"""Starts the processes that are measured. Each ends with its block, and when this process dies in any way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from nullworker.processes import OrphanGuard

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
#: Seconds of patience for one step of anything, such as the start of a process.
PATIENCE = 30.0
#: Seconds in which a process must end after SIGTERM.
END_SECONDS = 20.0


@functools.cache
def _guard() -> OrphanGuard:
    return OrphanGuard(signal.SIGKILL)


class Child:
    """A process in a process group of its own, with its output in the file `out`. `await Child.start(...)`."""

    def __init__(self, process: asyncio.subprocess.Process, out: Path) -> None:
        self.process, self.out = process, out
        self.pid = process.pid

    @classmethod
    async def start(cls, *command: str, folder: Path, out: str, env: Mapping[str, str]) -> Child:
        """`env` is added to what a Python process needs; nothing else of this process's environment is passed on."""
        guard = _guard()
        with (folder / out).open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env={**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        guard.hold(process.pid)
        return cls(process, folder / out)

    def check(self) -> None:
        """Whether it still runs.

        Raises:
            RuntimeError: it has ended; with the end of its output.
        """
        if self.process.returncode is not None:
            raise RuntimeError(f"{self.out.stem} has ended with {self.process.returncode}: {self.output()[-800:]}")

    def output(self) -> str:
        """All that it has said."""
        return self.out.read_text(errors="replace")

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal it, and kill its group if it does not end."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            await asyncio.wait_for(self.process.wait(), END_SECONDS)
        except asyncio.TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _guard().forget(self.pid)


@contextlib.asynccontextmanager
async def running(*command: str, folder: Path, out: str, env: Mapping[str, str]) -> AsyncIterator[Child]:
    """A child, until the block ends."""
    child = await Child.start(*command, folder=folder, out=out, env=env)
    try:
        yield child
    finally:
        await child.end()


async def until(what: str, found: Callable[[], T], child: Child, seconds: float = PATIENCE, pause: float = 0.01) -> T:
    """The value of `found()` once it is true, asked again and again.

    Raises:
        TimeoutError, RuntimeError: it takes too long, or the child has ended; the sentence says what was waited for.
    """
    give_up_at = time.perf_counter() + seconds
    while not (value := found()):
        child.check()
        if time.perf_counter() > give_up_at:
            raise TimeoutError(f"{what}: not within {seconds:g} s; {child.out.stem} said: {child.output()[-800:]}")
        await asyncio.sleep(pause)
    return value
