"""Jobs from Amazon SQS, all of them in one reservation. A job is a message: {"id": 1, "url": "https://example.com"}

A message that was taken is hidden from others for VISIBILITY_SECONDS, again and again while the work goes on, and is
deleted after it. One that fails is sent to SQS_FAILED_URL. Have a redrive policy too, for jobs that kill the consumer.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import boto3  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from nullworker.consumer import Job, Lost, drain, health_endpoint, reservations, run

QUEUE, FAILED = os.environ["SQS_QUEUE_URL"], os.environ["SQS_FAILED_URL"]
VISIBILITY = int(os.environ.get("VISIBILITY_SECONDS", "60"))
#: Seconds for which a job is waited for.
WAIT = int(os.environ.get("WAIT_SECONDS", "5"))


async def work(job: dict[str, Any]) -> None:
    """Your work stands here; code that blocks belongs into reservation.run_process. This looks at job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        print(job["id"], hashlib.sha256(await answer.read()).hexdigest(), flush=True)


async def call(method: Callable[..., Any], queue: str = QUEUE, **arguments: Any) -> Any:
    """One call of boto3, in a thread. To cancel it does not end it: a job that still comes is seen again later."""
    return await asyncio.shield(asyncio.to_thread(method, QueueUrl=queue, **arguments))


class Message(Job):
    """One message, which is ours for VISIBILITY seconds."""

    lease = float(VISIBILITY)

    def __init__(self, sqs: Any, message: dict[str, Any]) -> None:
        self.sqs, self.receipt, self.body = sqs, message["ReceiptHandle"], message["Body"]

    async def renew(self) -> None:
        await self._hide(VISIBILITY)

    async def done(self) -> None:
        await call(self.sqs.delete_message, ReceiptHandle=self.receipt)

    async def failed(self, why: str) -> None:
        error = {"error": {"DataType": "String", "StringValue": why or "failed"}}
        await call(self.sqs.send_message, FAILED, MessageBody=self.body, MessageAttributes=error)
        await self.done()

    async def give_back(self) -> None:
        await self._hide(0)

    async def _hide(self, seconds: int) -> None:
        try:
            await call(self.sqs.change_message_visibility, ReceiptHandle=self.receipt, VisibilityTimeout=seconds)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if "NotInflight" in code or "ReceiptHandle" in code or "InvalidParameterValue" in code:
                raise Lost(f"its receipt has expired: {code}") from error
            raise


async def take(sqs: Any) -> Message | None:
    """The next job."""
    taken = await call(sqs.receive_message, WaitTimeSeconds=WAIT, VisibilityTimeout=VISIBILITY)
    return Message(sqs, taken["Messages"][0]) if taken.get("Messages") else None


async def main() -> None:
    sqs = boto3.client("sqs")  # region, keys and AWS_ENDPOINT_URL are boto3's own settings
    async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await drain(reservation, lambda: take(sqs), work)


if __name__ == "__main__":
    run(main())
