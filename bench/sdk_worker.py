"""The peer: a null worker on the official SDK's own worker framework, as its users write it.

A request is held by a remote function until POST /release on a local port. It has no log and no metrics.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from vastai.serverless.server.worker import BenchmarkConfig, HandlerConfig, Worker, WorkerConfig

held: asyncio.Event | None = None


async def hold(duration: float = 3600.0, **_: Any) -> dict[str, Any]:
    """Called for one request at a time."""
    global held
    held = asyncio.Event()
    try:
        await asyncio.wait_for(held.wait(), duration)
        return {"released": "explicit"}
    except asyncio.TimeoutError:
        return {"released": "duration_elapsed", "duration": duration}
    finally:
        held = None


async def release(_: web.Request) -> web.Response:
    """The consumer is done."""
    if held is None or held.is_set():
        return web.json_response({"released": False, "reason": "no active reservation"})
    held.set()
    return web.json_response({"released": True})


@asynccontextmanager
async def control_port() -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_post("/release", release)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ["NULL_CONTROL_PORT"])).start()
    yield
    await runner.cleanup()


if __name__ == "__main__":
    Path(".has_benchmark").write_text("100")  # how its users pin max_perf
    Worker(
        WorkerConfig(
            handlers=[
                HandlerConfig(
                    route="/reserve",
                    max_queue_time=None,
                    is_remote_dispatch=True,
                    remote_function=hold,
                    benchmark_config=BenchmarkConfig(dataset=[{}], runs=1),
                )
            ],
            lifecycle=control_port(),
        )
    ).run()
