"""The examples: all jobs done by one reservation of the official client, and through each fault.

The faults are the short form of `python -m stress.consumers matrix`, with cuts of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_matrix
import pytest
from fault_matrix import FAULTS, JOBS, Pages
from harness import PATIENCE, secured
from programs import Program, free_port
from queues import QUEUES

from nullworker.client import hold
from nullworker.testing import FakeAutoscaler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Gives a queue by its name. Its server runs until the end of this file, and each test leaves it empty."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda name: stack.enter_context(QUEUES[name](tmp_path_factory.mktemp(name))))


@pytest.fixture
def queue(request: pytest.FixtureRequest, started: Callable[[str], Any]) -> Any:
    return started(request.param)


@pytest.mark.parametrize("queue", sorted(FAULTS), indirect=True)
async def test_one_reservation_of_the_official_client_does_all_jobs(
    queue: Any, vast: FakeAutoscaler, tmp_path: Path
) -> None:
    ports = {each: str(free_port()) for each in ("WORKER_PORT", "NULL_CONTROL_PORT", "HEALTH_PORT")}
    settings = {**ports, "BACKEND_HEALTH_URL": f"http://127.0.0.1:{ports['HEALTH_PORT']}/health"}
    # the libraries of the queues may warn of what is theirs to fix
    env = {**ports, **queue.env, "PYTHONWARNINGS": "default", "WAIT_SECONDS": "1"}
    consumer = Program(tmp_path, *queue.example, **env)
    async with (
        Pages().serve() as pages,
        secured(tmp_path, vast, NULL_HEALTH_INTERVAL="0.2", **settings) as worker,
        consumer,
    ):
        await worker.line("consumer_healthy")
        for job in JOBS:
            await queue.put({"id": job, "url": f"{pages.url}/{job}"})
        answer = await asyncio.wait_for(hold("null", autoscaler=vast.url), 3 * PATIENCE)
        result = answer["result"]
        assert result.get("done", result.get("runs")) == len(JOBS)
        assert (result["failed"], "error" in result) == (0, False)
        assert pages.done == dict.fromkeys(JOBS, 1)
        assert await consumer.terminate() == 0
        assert await queue.left() == 0


@pytest.mark.parametrize(
    ("queue", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults], indirect=["queue"]
)
async def test_every_job_is_done_and_none_twice_at_a_time(queue: Any, fault: str, tmp_path: Path) -> None:
    await fault_matrix.run(queue, fault, tmp_path, seconds=1.0)
