"""Real queue servers for tests, each on a free port and in its own folder, and how many jobs are left in them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from harness import PATIENCE, ROOT
from programs import free_port


class Queue(Protocol):
    """One queue. `example`: the command of its consumer; `env`: what the consumer is told."""

    example: tuple[str, ...]
    env: dict[str, str]

    async def put(self, job: dict[str, Any]) -> None:
        """A job for the consumer."""

    async def put_text(self, text: str) -> None:
        """A message of any text."""

    async def left(self) -> int:
        """Jobs that are not done, those that somebody has begun included; ask it when no consumer runs."""

    async def failed(self) -> int:
        """Jobs in the failed list."""

    #: Its server, if it can be restarted; and the port to which a proxy may lead.
    server: Server | None
    port: int | None


def python(name: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "examples" / name / "consumer.py"))


class Server:
    """A server that listens on a port."""

    def __init__(self, port: int, folder: Path, *command: str, **env: str) -> None:
        self.port, self._folder, self._command, self._env = port, folder, command, env
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with (self._folder / "server.log").open("ab") as log:
            env = {**os.environ, **self._env}
            self._process = subprocess.Popen(self._command, cwd=self._folder, env=env, stdout=log, stderr=log)
        end = time.monotonic() + 3 * PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            said = (self._folder / "server.log").read_text
            assert self._process.poll() is None, said()
            assert time.monotonic() < end, said()
            time.sleep(0.05)

    def stop(self) -> None:
        """End it in order."""
        self._process.terminate()
        self._process.wait(PATIENCE)


@contextlib.contextmanager
def server(port: int, folder: Path, *command: str, **env: str) -> Iterator[Server]:
    """A server that listens on a port until the block ends."""
    running = Server(port, folder, *command, **env)
    try:
        running.start()
        yield running
    finally:
        running.stop()


class RedisQueue:
    example = python("redis")

    def __init__(self, server: Server) -> None:
        self.server: Server | None = server
        self.port: int | None = server.port
        self.env = {"REDIS_URL": f"redis://127.0.0.1:{server.port}", "LEASE_SECONDS": "6"}

    async def put(self, job: dict[str, Any]) -> None:
        async with self._open() as redis:
            await redis.xadd("jobs", {"job": json.dumps(job)})

    async def put_text(self, text: str) -> None:
        async with self._open() as redis:
            await redis.xadd("jobs", {"job": text})

    async def failed(self) -> int:
        async with self._open() as redis:
            return int(await redis.xlen("jobs:failed"))

    async def lose_what_was_begun(self) -> None:
        """Trim the stream, as MAXLEN does."""
        async with self._open() as redis:
            await redis.xtrim("jobs", maxlen=0, approximate=False)

    async def left(self) -> int:
        async with self._open() as redis:
            return int(await redis.xlen("jobs"))

    def _open(self) -> Any:
        from redis.asyncio import Redis

        return Redis.from_url(self.env["REDIS_URL"])

    @staticmethod
    @contextlib.contextmanager
    def run(folder: Path) -> Iterator[RedisQueue]:
        port = free_port()
        options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "yes", "--timeout", "3")
        with server(port, folder, "redis-server", *options, "--appendfsync", "always") as running:
            yield RedisQueue(running)


class NatsQueue:
    example = python("nats")

    def __init__(self, server: Server) -> None:
        self.server: Server | None = server
        self.port: int | None = server.port
        self.env = {"NATS_URL": f"nats://127.0.0.1:{server.port}", "ACK_WAIT_SECONDS": "6"}

    async def put(self, job: dict[str, Any]) -> None:
        async with self._open() as stream:
            await stream.publish("jobs", json.dumps(job).encode())

    async def put_text(self, text: str) -> None:
        async with self._open() as stream:
            await stream.publish("jobs", text.encode())

    async def failed(self) -> int:
        async with self._open() as stream:
            return int((await stream.stream_info("FAILED")).state.messages)

    async def left(self) -> int:
        async with self._open() as stream:
            return int((await stream.stream_info("JOBS")).state.messages)

    @contextlib.asynccontextmanager
    async def _open(self) -> Any:
        import nats
        from nats.js.api import RetentionPolicy

        connection = await nats.connect(self.env["NATS_URL"])
        stream = connection.jetstream()
        await stream.add_stream(name="JOBS", subjects=["jobs"], retention=RetentionPolicy.WORK_QUEUE)
        yield stream
        await connection.close()

    @staticmethod
    @contextlib.contextmanager
    def run(folder: Path) -> Iterator[NatsQueue]:
        port = free_port()
        options = ("-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder))
        with server(port, folder, "nats-server", *options) as running:
            yield NatsQueue(running)


def persistent(text: str) -> Any:
    """A message that outlives its server."""
    import aio_pika

    return aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)


class RabbitQueue:
    example = python("rabbitmq")

    def __init__(self, port: int, server: Server | None = None) -> None:
        self.server = server
        self.port: int | None = port
        self.env = {"AMQP_URL": f"amqp://guest:guest@127.0.0.1:{port}/", "STOP_SECONDS": "3"}

    async def put(self, job: dict[str, Any]) -> None:
        async with self._open() as channel:
            await channel.default_exchange.publish(persistent(json.dumps(job)), "jobs")

    async def put_text(self, text: str) -> None:
        async with self._open() as channel:
            await channel.default_exchange.publish(persistent(text), "jobs")

    async def failed(self) -> int:
        async with self._open() as channel:
            queue = await channel.declare_queue("jobs.failed", durable=True, passive=True)
            return int(queue.declaration_result.message_count or 0)

    async def left(self) -> int:
        async with self._open() as channel:
            queue = await channel.declare_queue("jobs", passive=True)
            return int(queue.declaration_result.message_count or 0)

    @contextlib.asynccontextmanager
    async def _open(self) -> Any:
        import aio_pika

        async with await aio_pika.connect(self.env["AMQP_URL"]) as connection:
            channel = await connection.channel()
            await channel.declare_queue("jobs", durable=True)
            yield channel

    @staticmethod
    @contextlib.contextmanager
    def run(folder: Path) -> Iterator[RabbitQueue]:
        port, epmd, dist = free_port(), free_port(), free_port()
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{port}\ndistribution.listener.interface = 127.0.0.1\n"
        )
        env = {
            "HOME": str(folder),  # for the cookie
            "RABBITMQ_NODENAME": f"test{port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_MNESIA_BASE": str(folder),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_DIST_PORT": str(dist),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd),
        }
        try:
            # the script in /usr/sbin would become the user rabbitmq, who may not write here
            with server(port, folder, "/usr/lib/rabbitmq/bin/rabbitmq-server", **env) as running:
                yield RabbitQueue(port, running)
        finally:
            subprocess.run(
                ["epmd", "-port", str(epmd), "-kill"], capture_output=True, check=False
            )  # Erlang's own daemon


class SqsQueue:
    example = python("sqs")

    def __init__(self, port: int) -> None:
        self.env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "VISIBILITY_SECONDS": "6",
        }
        self.server: Server | None = None  # moto forgets its queues with its process
        self.port: int | None = port
        self.env["SQS_QUEUE_URL"] = self._open().create_queue(QueueName="jobs")["QueueUrl"]
        self.env["SQS_FAILED_URL"] = self._open().create_queue(QueueName="jobs-failed")["QueueUrl"]

    async def put(self, job: dict[str, Any]) -> None:
        await self.put_text(json.dumps(job))

    async def put_text(self, text: str) -> None:
        self._open().send_message(QueueUrl=self.env["SQS_QUEUE_URL"], MessageBody=text)

    async def left(self) -> int:
        return self._count("SQS_QUEUE_URL")

    async def failed(self) -> int:
        return self._count("SQS_FAILED_URL")

    def _count(self, queue: str) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._open().get_queue_attributes(QueueUrl=self.env[queue], AttributeNames=names)
        return sum(int(found["Attributes"][name]) for name in names)

    def _open(self) -> Any:
        import boto3  # type: ignore[import-untyped]

        return boto3.client(
            "sqs",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    @staticmethod
    @contextlib.contextmanager
    def run(folder: Path) -> Iterator[SqsQueue]:
        port = free_port()
        with server(port, folder, sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)):
            yield SqsQueue(port)


class FolderQueue:
    """The one of the bash example: a job is a script, which here asks for a page."""

    example = (str(ROOT / "examples" / "bash" / "consumer.sh"),)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.env = {"JOB_FOLDER": str(folder)}
        self.server: Server | None = None
        self.port: int | None = None
        (folder / "new").mkdir()

    async def put(self, job: dict[str, Any]) -> None:
        (self._folder / "new" / str(job["id"])).write_text(f"curl -fsS {job['url']}\n")

    async def put_text(self, text: str) -> None:
        (self._folder / "new" / "a b\n'\"$(c).sh").write_text(text)

    async def left(self) -> int:
        return sum(len(os.listdir(self._folder / name)) for name in ("new", "current"))

    async def failed(self) -> int:
        return len(os.listdir(self._folder / "failed"))

    @staticmethod
    @contextlib.contextmanager
    def run(folder: Path) -> Iterator[FolderQueue]:
        yield FolderQueue(folder)


QUEUES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Any]]] = {
    "redis": RedisQueue.run,
    "nats": NatsQueue.run,
    "rabbitmq": RabbitQueue.run,
    "sqs": SqsQueue.run,
    "bash": FolderQueue.run,
}
