"""The lower bound: bare aiohttp that holds one request until its release. No signature, log, queue or metrics."""

from __future__ import annotations

import asyncio
import os

from aiohttp import web

waiting: list[asyncio.Event] = []


async def reserve(request: web.Request) -> web.Response:
    await request.json()
    event = asyncio.Event()
    waiting.append(event)
    await event.wait()
    return web.json_response({"released": "explicit"})


async def release(_: web.Request) -> web.Response:
    if not waiting:
        return web.json_response({"released": False, "reason": "no active reservation"})
    waiting.pop(0).set()
    return web.json_response({"released": True})


async def main() -> None:
    for port, path, handler in (("WORKER_PORT", "/reserve", reserve), ("NULL_CONTROL_PORT", "/release", release)):
        app = web.Application()
        app.router.add_post(path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(os.environ[port])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
