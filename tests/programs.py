"""Other programs for tests: a consumer beside a worker, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from harness import PATIENCE, ROOT, WorkerProcess


class Program:
    """A command in a folder. `lines` are its stderr: dicts, from JSON where it is that; stdout is in the file `out`."""

    def __init__(self, folder: Path, *command: str, **env: str) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.lines: list[dict[str, Any]] = []
        self._command = command
        self._env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
        self._arrived = asyncio.Condition()
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Program:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reader

    async def start(self) -> None:
        """Start it, or start it again."""
        self.lines = []
        with self.out.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, cwd=self.folder, env=self._env, stdout=out, stderr=asyncio.subprocess.PIPE
            )
        self._reader = asyncio.ensure_future(self._read())

    async def line(self, event: str, *, nth: int = 1) -> Any:
        """The nth line with that word, once it is there."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if line.get("event") == event]

        async with self._arrived:
            try:
                await asyncio.wait_for(self._arrived.wait_for(lambda: len(found()) >= nth), PATIENCE)
            except asyncio.TimeoutError:
                raise AssertionError(f"no line {event!r} number {nth} in {self.lines}") from None
        return found()[nth - 1]

    async def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        """Tell it to stop; its exit code."""
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            try:
                line = json.loads(raw)
            except ValueError:
                line = {"event": raw.decode(errors="replace").rstrip()}
            async with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()


def nullworker_work(worker: WorkerProcess, *arguments: str, **env: str) -> Program:
    """`nullworker work` beside a worker."""
    command = (sys.executable, "-m", "nullworker", "work", *arguments)
    return Program(worker.folder, *command, NULL_CONTROL_PORT=str(worker.control_port), NULL_LOG_FORMAT="json", **env)


async def run(*command: str, code: int = 0, **env: str) -> str:
    """Run it to its end, which must be of that code. What it printed: stdout, or stderr if it failed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == code, (process.returncode, out, err)
    return (err if code else out).decode()


async def nullworker(*arguments: str, code: int = 0, **env: str) -> str:
    """A command of `nullworker`."""
    return await run(sys.executable, "-m", "nullworker", *arguments, code=code, **env)


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


def free_port() -> int:
    """A port that nobody has now; for what must have the same one after a restart."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
