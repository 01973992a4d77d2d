"""A consumer for NATS JetStream: one job for each reservation. Add one: nats pub jobs '{"id": 1, "url": "https://..."}'

A job returns to the queue at once when its reservation has ended, and after ACK_WAIT_SECONDS when the consumer has
died; while the work goes on, the consumer reports progress. After five deliveries the server gives it up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Any

import aiohttp
import nats
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NothingCame
from nats.js.api import ConsumerConfig, RetentionPolicy
from nats.js.client import JetStreamContext

from nullworker.consumer.reservations import health_endpoint, reservations, run

ACK_WAIT = float(os.environ.get("ACK_WAIT_SECONDS", "30"))
#: Seconds for which a job is waited for.
WAIT = 5.0


async def work(job: dict[str, Any]) -> dict[str, Any]:
    """Your work stands here. This one looks at what is behind job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        body = await answer.read()
    return {"job": job["id"], "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


async def one_job(jobs: JetStreamContext.PullSubscription) -> dict[str, Any]:
    """Take a job, do it, acknowledge it. What the caller of /reserve gets."""
    try:
        (message,) = await jobs.fetch(1, timeout=WAIT)
    except NothingCame:
        return {"job": None}
    job = json.loads(message.data)
    renewal = asyncio.ensure_future(renew(message))
    try:
        result = await work(job)
    except asyncio.CancelledError:
        await message.nak()
        raise
    except Exception as error:
        await message.nak(delay=5)
        return {"job": job["id"], "error": str(error)}
    finally:
        renewal.cancel()
    await message.ack_sync()
    return result


async def renew(message: Msg) -> None:
    """Show the server that the work goes on."""
    while True:
        await asyncio.sleep(ACK_WAIT / 3)
        await message.in_progress()


async def main() -> None:
    server = await nats.connect(os.environ.get("NATS_URL", "nats://127.0.0.1"))
    stream = server.jetstream()
    await stream.add_stream(name="JOBS", subjects=["jobs"], retention=RetentionPolicy.WORK_QUEUE)
    jobs = await stream.pull_subscribe("jobs", "workers", config=ConsumerConfig(ack_wait=ACK_WAIT, max_deliver=5))

    def trouble() -> str | None:
        return None if server.is_connected else "NATS is away"

    async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998")), trouble):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await one_job(jobs)


run(main())
