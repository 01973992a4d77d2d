"""The examples with real queue servers: every job is done exactly once, also when a process is killed meanwhile.

The worker reports to the fake autoscaler, and the official client makes the reservations.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from harness import PATIENCE, ROOT, WorkerProcess, secured
from programs import Program, free_port
from queues import QUEUES, Queue

from nullworker.cli.reserve import HoldError, hold
from nullworker.testing import FakeAutoscaler

pytestmark = pytest.mark.slow

EXAMPLES = sorted(QUEUES)


class Pages:
    """What jobs ask for. The first one who asks for a page of `stuck` waits for it until it is gone itself."""

    def __init__(self) -> None:
        self.stuck: set[str] = set()
        self.begun: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Pages]:
        app = web.Application()
        app.router.add_get("/{name}", self._page)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def until_begun(self, name: str) -> None:
        """Wait until somebody asks for it."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.begun[name] > 0), PATIENCE)

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.begun[name] += 1
        async with self._changed:
            self._changed.notify_all()
        if name in self.stuck and self.begun[name] == 1:
            await asyncio.Event().wait()
        self.done[name] += 1
        return web.Response(text=f"page {name}")


@pytest.fixture(params=EXAMPLES)
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Queue]:
    folder = tmp_path / "queue"
    folder.mkdir()
    with QUEUES[request.param](folder) as running:
        yield running


@pytest.fixture
async def pages() -> AsyncIterator[Pages]:
    async with Pages().serve() as served:
        yield served


@contextlib.asynccontextmanager
async def both(vast: FakeAutoscaler, queue: Queue, folder: Path) -> AsyncIterator[tuple[WorkerProcess, Program]]:
    """A worker, and beside it the example's consumer, whose health it looks at."""
    ports = {name: str(free_port()) for name in ("WORKER_PORT", "NULL_CONTROL_PORT", "HEALTH_PORT")}
    health = f"http://127.0.0.1:{ports['HEALTH_PORT']}/health"
    worker = secured(folder, vast, **ports, BACKEND_HEALTH_URL=health, NULL_HEALTH_INTERVAL="0.2")
    # The libraries of the queues may warn of what is theirs to fix.
    consumer = Program(folder, *queue.example, **ports, **queue.env, PYTHONWARNINGS="default")
    async with worker, consumer:
        await worker.line("consumer_healthy")
        yield worker, consumer


async def reserve_until_done(vast: FakeAutoscaler, jobs: int) -> list[Any]:
    """What whoever has put the jobs in does: reserve, as long as there are jobs left. The results that name a job."""
    results: list[Any] = []
    while len(results) < jobs:
        try:
            answer = await hold("null", autoscaler=vast.url)
        except HoldError:
            continue  # its worker was killed
        if answer["result"].get("job") is not None:
            results.append(answer["result"])
    return results


async def put(queue: Queue, pages: Pages, *names: str) -> None:
    for name in names:
        await queue.put({"id": name, "url": f"{pages.url}/{name}"})


async def check(queue: Queue, pages: Pages, worker: WorkerProcess, consumer: Program, results: list[Any]) -> None:
    """Each of the jobs a and b is done once, and nothing is held or left."""
    assert Counter(str(result["job"]) for result in results) == {"a": 1, "b": 1}
    assert not [result for result in results if "error" in result or result.get("exit_code")]
    assert pages.done == {"a": 1, "b": 1}
    assert (await worker.get("/status"))["held"] is None
    assert worker.sql("SELECT * FROM live") == []
    assert await consumer.terminate() == 0
    assert await queue.left() == 0


async def test_every_job_is_done_once(vast: FakeAutoscaler, queue: Queue, pages: Pages, tmp_path: Path) -> None:
    async with both(vast, queue, tmp_path) as (worker, consumer):
        await put(queue, pages, "a", "b")
        results = await asyncio.wait_for(reserve_until_done(vast, 2), 3 * PATIENCE)
        await check(queue, pages, worker, consumer, results)


async def test_the_consumer_is_killed_in_mid_job(
    vast: FakeAutoscaler, queue: Queue, pages: Pages, tmp_path: Path
) -> None:
    async with both(vast, queue, tmp_path) as (worker, consumer):
        pages.stuck.add("a")
        await put(queue, pages, "a", "b")
        reserving = asyncio.ensure_future(reserve_until_done(vast, 2))
        await pages.until_begun("a")
        await consumer.kill()
        await consumer.start()
        results = await asyncio.wait_for(reserving, 3 * PATIENCE)
        await check(queue, pages, worker, consumer, results)


async def test_the_worker_is_killed_in_mid_job(
    vast: FakeAutoscaler, queue: Queue, pages: Pages, tmp_path: Path
) -> None:
    async with both(vast, queue, tmp_path) as (worker, consumer):
        pages.stuck.add("a")
        await put(queue, pages, "a", "b")
        reserving = asyncio.ensure_future(reserve_until_done(vast, 2))
        await pages.until_begun("a")
        await worker.kill()
        await worker.start()
        results = await asyncio.wait_for(reserving, 3 * PATIENCE)
        assert ("cancelled", "worker_restart") in worker.story()
        await check(queue, pages, worker, consumer, results)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_has_a_program_file_for_the_supervisor_and_a_readme(name: str) -> None:
    folder = ROOT / "examples" / name
    parsed = configparser.RawConfigParser()
    parsed.read(folder / "consumer.conf")
    program = parsed["program:consumer"]
    script = Path(program["command"].split()[-1])
    assert (folder / script.name).is_file()
    assert int(program["stopwaitsecs"]) == 10
    assert program["autorestart"] == "true"
    told = {pair.partition("=")[0] for pair in program["environment"].split(",")}
    assert told - {"PROC_NAME", "PYTHONPATH"} <= {
        word for word in told if word in (folder / script.name).read_text()
    } | {"AWS_DEFAULT_REGION"}
    readme = (folder / "README.md").read_text()
    for word in (script.name, "consumer.conf", "BACKEND_HEALTH_URL"):
        assert word in readme
