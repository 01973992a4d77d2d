"""`nullworker dev` as a process, the official client against it, and a consumer's health endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import sqlite3
import ssl
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import forks
from aiohttp import web
from harness import PATIENCE, ROOT
from marks import MARK, marked


class Dev:
    """`nullworker dev` on free ports. `lines` are what it has said, without the times."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.mark = uuid.uuid4().hex
        ports = ("--port", "0", "--worker-port", "0", "--control-port", "0")
        self._command = (
            sys.executable,
            "-m",
            "nullworker",
            "dev",
            *ports,
            "--folder",
            str(folder / "logs"),
            *arguments,
        )
        self._env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
        self._env |= {MARK: self.mark, "NULL_DRAIN_SECONDS": "1", **env}
        self._arrived = asyncio.Condition()
        self.process: asyncio.subprocess.Process | forks.ForkedProcess

    async def __aenter__(self) -> Dev:
        self.process = await forks.start(self._command, cwd=self.folder, env=self._env, merged=True)
        self._reader = asyncio.ensure_future(self._read())
        self.url = (await self.line("a stand-in for Vast Serverless")).rpartition(" ")[2]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            assert await self.end(signal.SIGINT) == 0
        assert self.running() == []

    async def end(self, *numbers: signal.Signals) -> int:
        """Signal it; its exit code."""
        for number in numbers:
            self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        await self._reader
        return code

    async def line(self, pattern: str, *, nth: int = 1) -> str:
        """The nth line that begins with that pattern, once it is there."""

        def found() -> list[str]:
            return [line for line in self.lines if re.match(pattern, line)]

        async with self._arrived:
            try:
                await asyncio.wait_for(self._arrived.wait_for(lambda: len(found()) >= nth), 2 * PATIENCE)
            except asyncio.TimeoutError:
                raise AssertionError(f"no line {pattern!r} number {nth} in {self.lines}") from None
        return found()[nth - 1]

    def running(self, what: str = "") -> list[int]:
        """The processes that it has started, by whomever, and that still run: not itself."""
        return [pid for pid in marked(self.mark, what) if pid != self.process.pid]

    def sql(self, worker: int, query: str) -> list[Any]:
        """Ask the log of one worker."""
        with contextlib.closing(sqlite3.connect(self.folder / "logs" / f"nullworker-{worker}.db")) as conn:
            return conn.execute(query).fetchall()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            async with self._arrived:
                self.lines.append(re.sub(r"^[\d:]{8}  ", "", raw.decode().rstrip()))
                self._arrived.notify_all()


@contextlib.asynccontextmanager
async def official(dev: Dev) -> AsyncIterator[Any]:
    """The endpoint, by the official client."""
    sdk = importlib.import_module("vastai")
    client = sdk.CoroutineServerless("any", autoscaler_url=dev.url, webserver_url=dev.url)
    client._ssl_context = ssl.create_default_context()  # else it downloads Vast's root certificate
    async with client:
        yield await client.get_endpoint("null")


async def reserve(endpoint: Any, **payload: Any) -> dict[str, Any]:
    """One reservation, as an application has it; the worker's answer."""
    result = await asyncio.wait_for(endpoint.request("/reserve", payload, cost=100), 3 * PATIENCE)
    assert result["ok"], result
    answer: dict[str, Any] = result["response"]
    return answer


@contextlib.asynccontextmanager
async def health(answer: Callable[[int, int], int]) -> AsyncIterator[str]:
    """A consumer's health endpoint: `answer` gets which worker asks, by the order of their first question, from 1 on,
    and how often that one has asked; it gives the status."""
    asked: dict[Any, int] = {}

    async def handle(request: web.Request) -> web.Response:
        asked[request.transport] = asked.get(request.transport, 0) + 1
        return web.Response(status=answer(list(asked).index(request.transport) + 1, asked[request.transport]))

    app = web.Application()
    app.router.add_get("/health", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, keepalive_timeout=600)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/health"
    finally:
        await runner.cleanup()
