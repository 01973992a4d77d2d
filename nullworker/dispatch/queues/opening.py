"""Finds the adapter for a queue's URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.amqp import AmqpQueue
from nullworker.dispatch.queues.local import SqliteQueue
from nullworker.dispatch.queues.nats import NatsQueue
from nullworker.dispatch.queues.reading import Queue
from nullworker.dispatch.queues.redis import RedisQueue
from nullworker.dispatch.queues.sqs import SqsQueue
from nullworker.errors import BadSettings

_Kind = type[RedisQueue] | type[NatsQueue] | type[AmqpQueue] | type[SqsQueue] | type[SqliteQueue]

_KINDS: Final[Mapping[str, _Kind]] = {
    "redis": RedisQueue,
    "rediss": RedisQueue,
    "nats": NatsQueue,
    "tls": NatsQueue,
    "amqp": AmqpQueue,
    "amqps": AmqpQueue,
    "sqs": SqsQueue,
    "sqlite": SqliteQueue,
}


def open_queue(url: str) -> Queue:
    """The queue behind a URL. Nothing is connected yet.

    Raises:
        BadSettings: the URL is none, or lacks a parameter; the sentence says what is allowed.
        CannotStart: its library is not installed.
    """
    try:
        address = Address.parse(url)
    except ValueError as error:
        raise BadSettings(f"--queue (NULL_QUEUE) is no URL: {error}") from None
    kind = _KINDS.get(address.parts.scheme)
    if kind is None:
        allowed = ", ".join(f"{scheme}://" for scheme in _KINDS)
        raise BadSettings(f"--queue (NULL_QUEUE) must begin with one of {allowed}; for all others there is --command")
    return kind(address._replace(example=kind.example))
