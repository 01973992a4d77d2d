"""Fixtures of many tests: the fake autoscaler, a worker that reports to it, and a client of either."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from harness import WorkerProcess, secured

from nullworker import logs
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.testing import FakeAutoscaler


@pytest.fixture
async def vast() -> AsyncIterator[FakeAutoscaler]:
    async with FakeAutoscaler() as vast:
        yield vast


@pytest.fixture
async def worker(vast: FakeAutoscaler, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    """A worker with the settings that it has by itself; it takes signed claims."""
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        yield worker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


@pytest.fixture
def logged() -> Iterator[Callable[[], list[str]]]:
    """The events of the warnings and errors that this process has logged so far, those of libraries too."""
    stream = io.StringIO()
    logs.configure("json", "warning", stream)
    yield lambda: [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    logs.configure("console", "warning")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an event log is to be."""
    return tmp_path / "nullworker.db"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    """A new one there."""
    with contextlib.closing(open_log(path)) as log:
        yield log
