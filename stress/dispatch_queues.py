"""The queues that `stress.dispatch_kills` drains: each a real server, a consumer of one job, and its `--queue` URL.

Each consumer takes one job with a lease of LEASE seconds, renews it while it works, and settles it. A job whose
consumer was killed comes back when its lease is over (RabbitMQ: when its connection breaks).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

ROOT: Final = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

import queues  # noqa: E402  # of tests/support
from cuts import CutProxy as CutProxy  # noqa: E402
from programs import free_port  # noqa: E402

#: Seconds.
LEASE: Final = 5

#: What every consumer does with the `take` of its queue: each step is a line in the file RUNS.
_WORK: Final = """
import asyncio, json, os, sys, time

LEASE = float(os.environ["LEASE"])
runs = os.open(os.environ["RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(job, what):
    line = [job, os.environ["NULLWORKER_RESERVATION_ID"], os.getpid(), what, time.time()]
    os.write(runs, json.dumps(line).encode() + b"\\n")

async def main():
    taken = await take()
    if taken is None:
        note("", "empty")
        return
    job, renew, finish = taken
    name, seconds = job["id"], job["seconds"]
    note(name, "begin")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(0.5, left))
        if not await renew():
            note(name, "lost")
            sys.exit(3)
        note(name, "alive")
    note(name, "finishing")
    note(name, "done" if await finish() else "lost")
"""

_REDIS: Final = """
from redis.asyncio import Redis

redis = Redis.from_url(os.environ["REDIS_URL"])
me = os.environ["NULLWORKER_RESERVATION_ID"] + "/" + str(os.getpid())
take_one = redis.register_script('''
for _, job in ipairs(redis.call("LRANGE", KEYS[2], 0, -1)) do
    if redis.call("EXISTS", "lease:" .. job) == 0 then
        redis.call("LREM", KEYS[2], 1, job)
        redis.call("LPUSH", KEYS[1], job)
    end
end
local job = redis.call("LMOVE", KEYS[1], KEYS[2], "LEFT", "RIGHT")
if job then redis.call("SET", "lease:" .. job, ARGV[1], "PX", ARGV[2]) end
return job
''')
renew_one = redis.register_script('''
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
redis.call("PEXPIRE", KEYS[1], ARGV[2])
return 1
''')
finish_one = redis.register_script('''
if redis.call("GET", KEYS[2]) ~= ARGV[1] then return 0 end
redis.call("DEL", KEYS[2])
redis.call("LREM", KEYS[1], 1, ARGV[2])
return 1
''')

async def take():
    job = await take_one(keys=["jobs", "jobs:busy"], args=[me, int(LEASE * 1000)])
    if job is None:
        return None
    job = job.decode()
    return (
        json.loads(job),
        lambda: renew_one(keys=["lease:" + job], args=[me, int(LEASE * 1000)]),
        lambda: finish_one(keys=["jobs:busy", "lease:" + job], args=[me, job]),
    )
"""

_NATS: Final = """
import nats
from nats.errors import TimeoutError
from nats.js.api import ConsumerConfig

async def take():
    server = await nats.connect(os.environ["NATS_URL"])
    jobs = await server.jetstream().pull_subscribe("jobs", "workers", config=ConsumerConfig(ack_wait=LEASE))
    try:
        (message,) = await jobs.fetch(1, timeout=1)
    except TimeoutError:
        return None

    def confirmed(word):
        async def ask():
            await server.request(message.reply, word, timeout=LEASE)
            return True
        return ask

    await confirmed(b"+WPI")()
    return json.loads(message.data), confirmed(b"+WPI"), confirmed(b"+ACK")
"""

_RABBITMQ: Final = """
import aio_pika

async def take():
    connection = await aio_pika.connect(os.environ["AMQP_URL"])
    channel = await connection.channel()
    message = await (await channel.declare_queue("jobs", durable=True)).get(fail=False)
    if message is None:
        return None

    async def renew():
        return not connection.is_closed

    async def finish():
        await message.ack()
        await connection.close()
        return True

    return json.loads(message.body), renew, finish
"""

_SQS: Final = """
import boto3
from botocore.exceptions import ClientError

async def take():
    sqs, url = boto3.client("sqs"), os.environ["SQS_QUEUE_URL"]
    taken = sqs.receive_message(QueueUrl=url, WaitTimeSeconds=0, VisibilityTimeout=int(LEASE)).get("Messages")
    if not taken:
        return None
    receipt = {"QueueUrl": url, "ReceiptHandle": taken[0]["ReceiptHandle"]}

    async def renew():
        try:
            await asyncio.to_thread(sqs.change_message_visibility, VisibilityTimeout=int(LEASE), **receipt)
        except ClientError:
            return False
        return True

    async def finish():
        await asyncio.to_thread(sqs.delete_message, **receipt)
        return True

    return json.loads(taken[0]["Body"]), renew, finish
"""


class _Jobs(Protocol):
    env: dict[str, str]

    async def put(self, job: dict[str, Any]) -> None: ...
    async def left(self) -> int: ...


class Kind(NamedTuple):
    """A running queue."""

    jobs: _Jobs
    url: str  # for --queue
    consumer: str  # a program


class _RedisList:
    """A list, with one for what is busy."""

    def __init__(self, port: int) -> None:
        self.env = {"REDIS_URL": f"redis://127.0.0.1:{port}/0"}

    async def put(self, job: dict[str, Any]) -> None:
        async with self._open() as redis:
            await redis.rpush("jobs", json.dumps(job))

    async def left(self) -> int:
        async with self._open() as redis:
            return int(await redis.llen("jobs")) + int(await redis.llen("jobs:busy"))

    def _open(self) -> Any:
        from redis.asyncio import Redis

        return Redis.from_url(self.env["REDIS_URL"])


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[Kind]:
    port = free_port()
    command = ("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "")
    with queues.server(port, folder, *command):
        jobs = _RedisList(port)
        yield Kind(jobs, f"{jobs.env['REDIS_URL']}?list=jobs&busy=jobs:busy", _REDIS)


@contextlib.contextmanager
def _nats(folder: Path) -> Iterator[Kind]:
    with queues.NatsQueue.run(folder) as jobs:
        yield Kind(jobs, f"{jobs.env['NATS_URL']}?stream=JOBS&consumer=workers", _NATS)


@contextlib.contextmanager
def _rabbitmq(folder: Path) -> Iterator[Kind]:
    with queues.RabbitQueue.run(folder) as jobs:
        yield Kind(jobs, f"{jobs.env['AMQP_URL']}?queue=jobs", _RABBITMQ)


@contextlib.contextmanager
def _sqs(folder: Path) -> Iterator[Kind]:
    with queues.SqsQueue.run(folder) as jobs:
        yield Kind(jobs, f"sqs://us-east-1/jobs?endpoint={jobs.env['AWS_ENDPOINT_URL']}", _SQS)


_KINDS: Final = {"redis": _redis, "nats": _nats, "rabbitmq": _rabbitmq, "sqs": _sqs}
NAMES: Final = tuple(_KINDS)


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[Kind]:
    """The queue of this name, with its server in `folder`."""
    folder.mkdir()
    with _KINDS[name](folder) as kind:
        yield kind._replace(consumer=_WORK + kind.consumer + "\nasyncio.run(main())\n")
