"""Other programs beside a worker in tests: consumers, and the files they share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import forks
from harness import PATIENCE, ROOT, LoggedProcess, WorkerProcess


class Program(LoggedProcess):
    """A command in a folder; its stdout is in the file `out` there."""

    def __init__(self, folder: Path, *command: str, **env: str) -> None:
        own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
        super().__init__(folder, command, own, folder / "out")


def nullworker_work(worker: WorkerProcess, *arguments: str, **env: str) -> Program:
    """`nullworker work` beside a worker."""
    command = (sys.executable, "-m", "nullworker", "work", *arguments)
    return Program(worker.folder, *command, NULL_CONTROL_PORT=str(worker.control_port), NULL_LOG_FORMAT="json", **env)


async def run(*command: str, code: int = 0, **env: str) -> str:
    """Run it to its end, which must be of that code. What it printed: stdout, or stderr if it failed."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
    process = await forks.start(command, cwd=Path.cwd(), env=own)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == code, (process.returncode, out, err)
    return (err if code else out).decode()


async def nullworker(*arguments: str, code: int = 0, **env: str) -> str:
    """A command of `nullworker`."""
    return await run(sys.executable, "-m", "nullworker", *arguments, code=code, **env)


@contextlib.contextmanager
def inherited(disposition: signal.Handlers) -> Iterator[None]:
    """SIGHUP's disposition in programs that are started meanwhile; `nohup` starts them with SIG_IGN."""
    before = signal.signal(signal.SIGHUP, disposition)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.asynccontextmanager
async def caller(worker: WorkerProcess, **payload: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Somebody who reserves: a task that gives the answer's JSON. To leave the block is to hang up."""

    async def reserve() -> Any:
        async with aiohttp.ClientSession() as http, http.post(worker.url + "/reserve", json=payload) as answer:
            return await answer.json()

    task = asyncio.ensure_future(reserve())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answered(task: asyncio.Task[Any]) -> Any:
    """What the caller got."""
    return await asyncio.wait_for(asyncio.shield(task), PATIENCE)


async def session(worker: WorkerProcess, **payload: Any) -> str:
    """The id of a session."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(worker.url + "/session/create", json={"lifetime": 600, **payload}) as answer,
    ):
        return str((await answer.json())["session_id"])


async def until(true: Callable[[], bool]) -> None:
    """Wait for what tells nobody: a file that is written, a process that is nobody's child."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE
    while not true():
        assert loop.time() < end, "it did not come"
        await asyncio.sleep(0.01)


def python_path(folder: Path, code: str) -> str:
    """PYTHONPATH of a program with which `code` runs before all else."""
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{ROOT}"


def free_port() -> int:
    """A port that nobody has now; for what must have the same one after a restart.

    It is below those that the kernel gives to connections, so that none of the other tests' takes it meanwhile.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


def dead_address() -> str:
    """An address that refuses connections: nobody has listened on this port since."""
    return f"http://127.0.0.1:{free_port()}"


def listens(port: int) -> bool:
    """Whether somebody on this machine listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
