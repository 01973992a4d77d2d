"""A consumer for RabbitMQ: one job for each reservation. A job is a message in `jobs`: {"id": 1, "url": "https://..."}

RabbitMQ redelivers a job as soon as the connection of the consumer that took it is closed. A job that fails goes to the
queue `jobs.failed`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Any

import aio_pika
import aiohttp
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

from nullworker.consumer.reservations import health_endpoint, reservations, run

#: Seconds for which a job is waited for, and between two looks.
WAIT, LOOK = 5.0, 0.25


async def work(job: dict[str, Any]) -> dict[str, Any]:
    """Your work stands here. This one looks at what is behind job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        body = await answer.read()
    return {"job": job["id"], "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


async def one_job(jobs: AbstractQueue) -> dict[str, Any]:
    """Take a job, do it, acknowledge it. What the caller of /reserve gets."""
    message = await take(jobs)
    if message is None:
        return {"job": None}
    job = json.loads(message.body)
    try:
        result = await work(job)
    except asyncio.CancelledError:
        await message.nack(requeue=True)
        raise
    except Exception as error:
        await message.reject(requeue=False)
        return {"job": job["id"], "error": str(error)}
    await message.ack()
    return result


async def take(jobs: AbstractQueue) -> AbstractIncomingMessage | None:
    """The next job, if there is one in time."""
    for _ in range(int(WAIT / LOOK)):
        message = await jobs.get(fail=False)
        if message is not None:
            return message
        await asyncio.sleep(LOOK)
    return None


async def main() -> None:
    connection = await aio_pika.connect(os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1/"))
    async with connection:
        channel = await connection.channel()
        await channel.declare_queue("jobs.failed", durable=True)
        to_failed = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "jobs.failed"}
        jobs = await channel.declare_queue("jobs", durable=True, arguments=to_failed)

        def trouble() -> str | None:
            return "RabbitMQ is away" if channel.is_closed else None

        async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998")), trouble):
            async for reservation in reservations():
                async with reservation:
                    reservation.result = await one_job(jobs)


run(main())
