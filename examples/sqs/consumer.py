"""A consumer for Amazon SQS: one job for each reservation. A job is a message: {"id": 1, "url": "https://example.com"}

A job that was received is hidden from others for VISIBILITY_SECONDS, which is renewed during the work, and is deleted
after it. A job that fails becomes visible again; the queue's redrive policy decides how often.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import boto3  # type: ignore[import-untyped]

from nullworker.consumer.reservations import health_endpoint, reservations, run

QUEUE = os.environ["SQS_QUEUE_URL"]
VISIBILITY = int(os.environ.get("VISIBILITY_SECONDS", "60"))
#: Seconds for which a job is waited for.
WAIT = 5


async def work(job: dict[str, Any]) -> dict[str, Any]:
    """Your work stands here. This one looks at what is behind job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        body = await answer.read()
    return {"job": job["id"], "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


async def call(method: Callable[..., Any], **arguments: Any) -> Any:
    """One call of boto3, in a thread. To cancel it does not end it: a job that still comes is seen again later."""
    return await asyncio.shield(asyncio.to_thread(method, QueueUrl=QUEUE, **arguments))


async def one_job(sqs: Any) -> dict[str, Any]:
    """Take a job, do it, delete it. What the caller of /reserve gets."""
    taken = await call(sqs.receive_message, WaitTimeSeconds=WAIT, VisibilityTimeout=VISIBILITY)
    if not taken.get("Messages"):
        return {"job": None}
    (message,) = taken["Messages"]
    receipt = message["ReceiptHandle"]
    job = json.loads(message["Body"])
    renewal = asyncio.ensure_future(renew(sqs, receipt))
    try:
        result = await work(job)
    except asyncio.CancelledError:
        await call(sqs.change_message_visibility, ReceiptHandle=receipt, VisibilityTimeout=0)
        raise
    except Exception as error:
        return {"job": job["id"], "error": str(error)}
    finally:
        renewal.cancel()
    await call(sqs.delete_message, ReceiptHandle=receipt)
    return result


async def renew(sqs: Any, receipt: str) -> None:
    """Keep the job hidden while the work goes on."""
    while True:
        await asyncio.sleep(VISIBILITY / 3)
        await call(sqs.change_message_visibility, ReceiptHandle=receipt, VisibilityTimeout=VISIBILITY)


async def main() -> None:
    sqs = boto3.client("sqs")  # region, keys and AWS_ENDPOINT_URL are boto3's own settings
    async with health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await one_job(sqs)


run(main())
