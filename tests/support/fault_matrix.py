"""One queue with its example, a worker, and one fault in the middle of a job: every job done, none twice at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web
from cuts import CutProxy
from harness import WorkerProcess
from programs import Program, free_port, until
from queues import Queue

#: The faults that apply to each queue. moto forgets its queues at a restart; a folder has no server; and "gone" needs a
#: queue whose messages can be removed without a trace.
FAULTS: Final = {
    "redis": ("poison", "restart", "cut", "idle", "kill consumer", "kill worker", "gone"),
    "nats": ("poison", "restart", "cut", "idle", "kill consumer", "kill worker"),
    "rabbitmq": ("poison", "restart", "cut", "idle", "kill consumer", "kill worker"),
    "sqs": ("poison", "cut", "idle", "kill consumer", "kill worker"),
    "bash": ("poison", "kill consumer", "kill worker"),
}
JOBS: Final = ("a", "b", "c")
#: Seconds for all of a run beside the fault itself: a lease of 6 s may have to run out.
RUN_SECONDS: Final = 90.0


class Pages:
    """What jobs ask for. A page of `stuck` is answered when `gate` is set.

    Attributes:
        begun, done: how often each was asked for, and answered.
        most: how many asked for the same page at the same time.
    """

    def __init__(self, *stuck: str) -> None:
        self.stuck, self.gate = set(stuck), asyncio.Event()
        self.begun: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
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

    async def until_begun(self, name: str, times: int = 1) -> None:
        """Wait until it was asked for so often."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.begun[name] >= times), RUN_SECONDS)

    async def until_done(self, *names: str, seconds: float = RUN_SECONDS) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: all(self.done[name] for name in names)), seconds)

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.begun[name] += 1
        self.now[name] += 1
        self.most[name] = max(self.most[name], self.now[name])
        try:
            async with self._changed:
                self._changed.notify_all()
            if name in self.stuck:
                await self.gate.wait()
            self.done[name] += 1
            async with self._changed:
                self._changed.notify_all()
            return web.Response(text=f"page {name}")
        finally:
            self.now[name] -= 1


@contextlib.asynccontextmanager
async def reserving(worker: WorkerProcess) -> AsyncIterator[list[Any]]:
    """Somebody who reserves, again and again: a request, of an hour. Gives the answers so far."""
    answers: list[Any] = []

    async def forever() -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with aiohttp.ClientSession() as http, http.post(worker.url + "/reserve", json={}) as answer:
                    answers.append(await answer.json())
            await asyncio.sleep(0.1)

    task = asyncio.ensure_future(forever())
    try:
        yield answers
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def through(queue: Queue, proxy: CutProxy | None) -> dict[str, str]:
    """The environment of its consumer, which goes through a proxy."""
    if proxy is None:
        return queue.env
    return {name: value.replace(f":{queue.port}", f":{proxy.port}") for name, value in queue.env.items()}


async def run(queue: Any, fault: str, folder: Path, *, seconds: float) -> None:
    """One run with a queue that is empty; `seconds` is how long a cut lasts.

    Raises:
        AssertionError: a promise was broken.
    """
    pages = Pages() if fault in ("poison", "idle") else Pages("a")
    ports = {each: str(free_port()) for each in ("WORKER_PORT", "NULL_CONTROL_PORT", "HEALTH_PORT")}
    settings = {**ports, "BACKEND_HEALTH_URL": f"http://127.0.0.1:{ports['HEALTH_PORT']}/health"}
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(pages.serve())
        proxy = None if queue.port is None else await stack.enter_async_context(CutProxy(queue.port))
        env = {**ports, **through(queue, proxy), "PYTHONWARNINGS": "default", "WAIT_SECONDS": "1"}
        consumer = Program(folder, *queue.example, **env)
        settings |= {"NULL_HEALTH_INTERVAL": "0.2", "NULL_CONSUMER_GRACE_SECONDS": "1"}
        worker = WorkerProcess(folder, module=("-m", "nullworker", "serve"), **settings)
        await stack.enter_async_context(worker)
        await stack.enter_async_context(consumer)
        await worker.line("consumer_healthy")
        try:
            await _with(fault, queue, pages, worker, consumer, proxy, stack, seconds)
        except (AssertionError, asyncio.TimeoutError):
            print(f"begun {dict(pages.begun)}, done {dict(pages.done)}, left {await queue.left()}")
            for who in (worker, consumer):
                print(*who.lines[-15:], f"exit code {who.process.returncode}", sep="\n")
            raise
        assert all(most == 1 for most in pages.most.values()), f"at the same time: {pages.most}"
        if fault != "kill consumer":
            assert consumer.process.returncode is None, "the consumer has died"
        assert await consumer.terminate() in (0, 143)
        assert await queue.left() == 0
        lost = worker.sql("SELECT max(ended_at) FROM reservations WHERE reason = 'consumer_lost'")
        assert (lost[0][0] is not None) is (fault in ("kill consumer", "gone"))


async def _with(
    fault: str,
    queue: Any,
    pages: Pages,
    worker: WorkerProcess,
    consumer: Program,
    proxy: CutProxy | None,
    stack: contextlib.AsyncExitStack,
    seconds: float,
) -> None:
    wanted: tuple[str, ...] = JOBS
    if fault == "poison":
        await queue.put_text("this is no JSON, and no command; exit 1")
    for job in JOBS:
        await queue.put({"id": job, "url": f"{pages.url}/{job}"})
    if fault == "idle":
        assert proxy is not None
        await proxy.close_all()
        await asyncio.sleep(seconds)
    answers = await stack.enter_async_context(reserving(worker))
    if fault not in ("poison", "idle"):
        await pages.until_begun("a")
    if fault == "restart":
        await asyncio.to_thread(queue.server.stop)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(queue.server.start)
    elif fault == "cut":
        assert proxy is not None
        await proxy.cut()
        await asyncio.sleep(seconds)
        await proxy.mend()
    elif fault == "kill consumer":
        consumer.process.kill()
        await worker.line("reservation_cancelled", where=lambda line: line["reason"] == "consumer_lost")
        await consumer.process.wait()
        await consumer.start()
    elif fault == "kill worker":
        await worker.kill()
        await worker.start()
    elif fault == "gone":
        await queue.lose_what_was_begun()
        await queue.put({"id": "d", "url": f"{pages.url}/d"})
        consumer.process.kill()
        await worker.line("reservation_cancelled", where=lambda line: line["reason"] == "consumer_lost")
        await consumer.process.wait()
        await consumer.start()
        wanted = ("d",)
    pages.gate.set()
    await pages.until_done(*wanted)
    while await queue.left():  # noqa: ASYNC110  # a queue rings no bell
        await asyncio.sleep(0.1)
    if fault == "poison":
        assert await queue.failed() == 1
    if fault in ("poison", "idle", "restart", "cut"):
        await until(lambda: bool(answers))
        did = answers[0]["result"]
        assert did.get("done", did.get("runs", 0) - did.get("failed", 0)) == len(JOBS), answers[0]
