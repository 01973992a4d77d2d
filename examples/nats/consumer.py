"""Jobs from NATS JetStream, all of them in one reservation. A job: nats pub jobs '{"id": 1, "url": "https://..."}'

A message goes back to the stream when the consumer has not renewed it for ACK_WAIT_SECONDS, and at once when its
reservation is gone. One that was begun MAX_TRIES times and never settled goes to the subject `jobs.failed`.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import aiohttp
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NothingCame
from nats.js.api import ConsumerConfig, RetentionPolicy
from nats.js.client import JetStreamContext

from nullworker.consumer import Job, drain, health_endpoint, reservations, run

ACK_WAIT = float(os.environ.get("ACK_WAIT_SECONDS", "30"))
MAX_TRIES = 5
#: Seconds for which a job is waited for.
WAIT = float(os.environ.get("WAIT_SECONDS", "5"))


async def work(job: dict[str, Any]) -> None:
    """Your work stands here; code that blocks belongs into reservation.run_process. This looks at job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        print(job["id"], hashlib.sha256(await answer.read()).hexdigest(), flush=True)


class Message(Job):
    """One message. Each step is confirmed by the server: a lost connection buffers what is only sent."""

    lease = ACK_WAIT

    def __init__(self, server: Client, message: Msg) -> None:
        self.server, self.message, self.body = server, message, message.data

    async def renew(self) -> None:
        await self._confirmed(b"+WPI")

    async def done(self) -> None:
        await self._confirmed(b"+ACK")

    async def failed(self, why: str) -> None:
        sequence = str(self.message.metadata.sequence.stream)  # the server knows a message that comes again
        headers = {"Nats-Msg-Id": sequence, "Error": why}
        await self.server.jetstream().publish("jobs.failed", self.message.data, headers=headers)
        await self._confirmed(b"+ACK")

    async def give_back(self) -> None:
        await self._confirmed(b"-NAK")

    async def _confirmed(self, word: bytes) -> None:
        await self.server.request(self.message.reply, word, timeout=5)


async def take(server: Client, jobs: JetStreamContext.PullSubscription) -> Message | None:
    """The next job."""
    while True:
        try:
            (message,) = await jobs.fetch(1, timeout=WAIT)
        except NothingCame:
            if server.is_connected:
                return None
            raise  # it is asked again
        job = Message(server, message)
        await job.renew()  # it may have waited in this process since an earlier fetch
        if message.metadata.num_delivered <= MAX_TRIES:
            return job
        await job.failed(f"it was begun {MAX_TRIES} times, and never settled")


async def main() -> None:
    server = await nats.connect(os.environ.get("NATS_URL", "nats://127.0.0.1"), max_reconnect_attempts=-1)
    stream = server.jetstream()
    await stream.add_stream(name="JOBS", subjects=["jobs"], retention=RetentionPolicy.WORK_QUEUE)
    await stream.add_stream(name="FAILED", subjects=["jobs.failed"])
    jobs = await stream.pull_subscribe("jobs", "workers", config=ConsumerConfig(ack_wait=ACK_WAIT))
    async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await drain(reservation, lambda: take(server, jobs), work)


if __name__ == "__main__":
    run(main())
