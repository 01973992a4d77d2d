"""Fixtures of the tests with real processes: the stand-in autoscaler, and a worker that reports to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import WorkerProcess, secured

from nullworker.testing import StandIn


@pytest.fixture
async def vast() -> AsyncIterator[StandIn]:
    async with StandIn() as vast:
        yield vast


@pytest.fixture
async def worker(vast: StandIn, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    """A worker with the settings that it has by itself; it takes signed claims."""
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        yield worker
