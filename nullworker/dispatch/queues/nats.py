"""A stream of NATS JetStream and its consumer."""

from __future__ import annotations

import importlib
from typing import Any

from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.reading import library


class NatsQueue:
    example = "nats://HOST?stream=JOBS&consumer=workers"

    def __init__(self, address: Address) -> None:
        self._url, self._names = address.take("stream", "consumer")
        self._library = library("nats", "nats-py")
        self._connection: Any = None
        self.shown, self.secrets = address.shown, address.secrets

    async def read(self) -> Counts:
        async def ignore(*_: Any) -> None:
            """What is wrong is in the exception of the call."""

        if self._connection is None:
            self._connection = await self._library.connect(
                self._url, allow_reconnect=False, connect_timeout=5, error_cb=ignore
            )
        jetstream = self._connection.jetstream()
        errors = importlib.import_module("nats.js.errors")
        try:
            consumer = await jetstream.consumer_info(self._names["stream"], self._names["consumer"])
        except errors.NotFoundError:
            stream = await jetstream.stream_info(self._names["stream"])  # its consumers make theirs when they start
            return Counts(int(stream.state.messages), 0)
        return Counts(int(consumer.num_pending or 0), int(consumer.num_ack_pending or 0))

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
