"""A queue of Amazon SQS."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.reading import library
from nullworker.errors import BadSettings


class SqsQueue:
    """Its figures are approximate, and up to a minute old."""

    example = "sqs://eu-central-1/jobs"

    def __init__(self, address: Address) -> None:
        _, self._names = address.take(optional=("endpoint",))
        self._region, self._queue = address.parts.hostname or "", address.parts.path.strip("/")
        if not self._region or not self._queue:
            raise BadSettings(f"--queue (NULL_QUEUE) needs a region and a queue's name, as in {address.example}")
        self._library = library("boto3", "boto3")
        self._client: Any = None
        self._queue_url: str | None = None
        self.shown, self.secrets = address.shown, address.secrets

    async def read(self) -> Counts:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Counts:
        if self._client is None:
            config = importlib.import_module("botocore.config").Config(
                connect_timeout=4, read_timeout=4, retries={"max_attempts": 1}
            )
            self._client = self._library.client(
                "sqs", region_name=self._region, endpoint_url=self._names.get("endpoint"), config=config
            )
        if self._queue_url is None:
            self._queue_url = self._client.get_queue_url(QueueName=self._queue)["QueueUrl"]
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answered = self._client.get_queue_attributes(QueueUrl=self._queue_url, AttributeNames=names)["Attributes"]
        waiting, in_flight = (int(answered[name]) for name in names)
        return Counts(waiting, in_flight)

    async def close(self) -> None:
        client, self._client, self._queue_url = self._client, None, None
        if client is not None:
            client.close()
