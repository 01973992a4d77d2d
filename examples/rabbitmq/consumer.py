"""Jobs from a RabbitMQ queue, all of them in one reservation. A job is a message in `jobs`: {"id": 1, "url": "..."}

RabbitMQ gives a message to another consumer within 0.1 s of the end of the connection that has it, while the first may
still work. So one that is redelivered is begun only after STOP_SECONDS. A message that fails goes to `jobs.failed`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

import aio_pika
import aiohttp
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from nullworker.consumer import Job, drain, health_endpoint, reservations, run

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1/")
#: Seconds that a consumer needs at most to see that its connection is gone, and to stop its work.
STOP = float(os.environ.get("STOP_SECONDS", "30"))
#: Seconds between two heartbeats, for which a job is waited for, and between two looks.
HEARTBEAT, WAIT, LOOK = 10, float(os.environ.get("WAIT_SECONDS", "5")), 0.25


async def work(job: dict[str, Any]) -> None:
    """Your work stands here; code that blocks belongs into reservation.run_process. This looks at job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        print(job["id"], hashlib.sha256(await answer.read()).hexdigest(), flush=True)


class Message(Job):
    """One message, which is ours for as long as its channel is open."""

    def __init__(self, channel: AbstractChannel, message: AbstractIncomingMessage) -> None:
        self.channel, self.message, self.body = channel, message, message.body
        self.wait = STOP if message.redelivered else 0.0

    async def lost(self) -> str:
        await self.channel.closed()
        return "the connection to RabbitMQ broke, and others get the message"

    async def done(self) -> None:
        await self.message.ack()

    async def failed(self, why: str) -> None:
        headers = {"error": why}
        failed = aio_pika.Message(self.body, headers=headers, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)  # type: ignore[arg-type]  # bytes
        await self.channel.default_exchange.publish(failed, "jobs.failed")
        await self.message.ack()

    async def give_back(self) -> None:
        await self.message.nack(requeue=True)


class Queue:
    """The queue, with a connection that is opened again when it is needed."""

    connection: AbstractConnection | None = None

    async def take(self) -> Message | None:
        """The next job, if there is one in time."""
        if self.connection is None or self.connection.is_closed or self.channel.is_closed:
            self.connection = await aio_pika.connect(URL, heartbeat=HEARTBEAT, timeout=10)
            self.channel = await self.connection.channel()
            await self.channel.declare_queue("jobs.failed", durable=True)
            self.jobs = await self.channel.declare_queue("jobs", durable=True)
        for _ in range(int(WAIT / LOOK)):
            message = await self.jobs.get(fail=False)
            if message is not None:
                return Message(self.channel, message)
            await asyncio.sleep(LOOK)
        return None


async def main() -> None:
    queue = Queue()
    async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await drain(reservation, queue.take, work)


if __name__ == "__main__":
    run(main())
