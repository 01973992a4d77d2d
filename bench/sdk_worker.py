"""The peer: a null worker on the official SDK's worker framework, written as its users write one.

A remote function holds a request until POST /release on a local port. It has no log and no metrics.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from aiohttp import web
from vastai.serverless.server.worker import BenchmarkConfig, HandlerConfig, LogActionConfig, Worker, WorkerConfig

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


async def main() -> None:
    app = web.Application()
    app.router.add_post("/release", release)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ["NULL_CONTROL_PORT"])).start()
    await Worker(
        WorkerConfig(
            model_log_file="model.log",
            log_action_config=LogActionConfig(on_load=["ready"]),
            handlers=[
                HandlerConfig(
                    route="/reserve",
                    max_queue_time=None,
                    is_remote_dispatch=True,
                    remote_function=hold,
                    benchmark_config=BenchmarkConfig(dataset=[{}], runs=1),
                )
            ],
        )
    ).run_async()


if __name__ == "__main__":
    Path(".has_benchmark").write_text("100")  # how its users pin max_perf
    Path("model.log").write_text("ready\n")  # and how they tell that the worker is ready: a line in the model's log
    asyncio.run(main())
