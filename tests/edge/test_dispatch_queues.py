"""What the dispatcher reads from queues: real servers, commands, and what is said when they cannot be read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from harness import PATIENCE
from programs import free_port
from queues import RabbitQueue, SqsQueue, server

from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues import local
from nullworker.dispatch.queues.local import CommandQueue
from nullworker.dispatch.queues.opening import open_queue
from nullworker.dispatch.queues.reading import Queue, QueueUnreadableError, in_words, look
from nullworker.errors import BadSettings


def connections(queue: Queue) -> dict[str, Any]:
    return {name: value for name, value in vars(queue).items() if name in ("_client", "_connection", "_http")}


async def once(url: str, seconds: float = PATIENCE) -> Counts:
    """Its counts. A second look must use the same connections, and the end of the dispatcher closes them."""
    queue = open_queue(url)
    try:
        counts = await look(queue, seconds)
        before = connections(queue)
        await look(queue, seconds)
        assert all(connections(queue)[name] is value for name, value in before.items())
        return counts
    finally:
        await queue.close()
        assert not any(connections(queue).values())


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    command = ("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--requirepass", "hunter2")
    with server(port, tmp_path_factory.mktemp("redis"), *command):
        yield port


@pytest.fixture
async def redis(redis_port: int) -> AsyncIterator[Any]:
    from redis.asyncio import Redis

    client = Redis.from_url(f"redis://:hunter2@127.0.0.1:{redis_port}/3")
    await client.flushall()
    yield client
    await client.aclose()


async def test_a_redis_list_with_and_without_one_for_what_is_busy(redis: Any, redis_port: int) -> None:
    base = f"redis://:hunter2@127.0.0.1:{redis_port}/3?list=jobs"
    assert await once(base) == Counts(0, None)
    await redis.rpush("jobs", *range(5))
    await redis.lmove("jobs", "jobs:busy", "LEFT", "RIGHT")
    assert await once(base) == Counts(4, None)
    assert await once(f"{base}&busy=jobs:busy") == Counts(4, 1)
    assert await once(f"{base}&busy=jobs:busy&socket_timeout=3&health_check_interval=0") == Counts(4, 1)


async def test_a_job_that_moves_while_a_redis_list_is_read_is_counted_once(redis: Any, redis_port: int) -> None:
    await redis.rpush("jobs", *range(20))
    queue = open_queue(f"redis://:hunter2@127.0.0.1:{redis_port}/3?list=jobs&busy=jobs:busy")

    stop = asyncio.Event()

    async def move() -> None:
        while not stop.is_set():
            await redis.lmove("jobs", "jobs:busy", "LEFT", "RIGHT")
            await redis.lmove("jobs:busy", "jobs", "LEFT", "RIGHT")

    moving = asyncio.ensure_future(move())
    seen = [sum((await look(queue))[:2]) for _ in range(100)]  # type: ignore[arg-type]
    stop.set()
    await moving
    await queue.close()
    assert set(seen) == {20}


async def test_a_redis_stream_before_its_group_with_it_and_when_redis_has_lost_count(
    redis: Any, redis_port: int
) -> None:
    url = f"redis://:hunter2@127.0.0.1:{redis_port}/3?stream=jobs&group=workers"
    assert await once(url) == Counts(0, 0)  # no stream
    entries = [await redis.xadd("jobs", {"job": str(n)}) for n in range(6)]
    assert await once(url) == Counts(6, 0)  # no group: its consumers make it
    await redis.xgroup_create("jobs", "workers", id="0")
    await redis.xreadgroup("workers", "me", {"jobs": ">"}, count=2)
    assert await once(url) == Counts(4, 2)
    await redis.xdel("jobs", entries[4])
    (group,) = await redis.xinfo_groups("jobs")
    assert group["lag"] is None
    assert await once(url) == Counts(3, 2)
    await redis.xack("jobs", "workers", entries[0])
    assert await once(url) == Counts(3, 1)


async def test_a_wrong_password_a_wrong_type_and_a_dead_redis_are_said_without_the_password(
    redis: Any, redis_port: int
) -> None:
    await redis.set("jobs", "text")
    for url, said in (
        (f"redis://:hunter2@127.0.0.1:{redis_port}/3?list=jobs", "wrong kind of value"),
        (f"redis://:swordfish@127.0.0.1:{redis_port}/3?list=jobs", "password"),
        (f"redis://me:swordfish@127.0.0.1:{free_port()}/3?list=jobs", "connection refused"),
    ):
        with pytest.raises(QueueUnreadableError, match=said) as raised:
            await once(url)
        assert "hunter2" not in str(raised.value)
        assert "swordfish" not in str(raised.value)
        assert str(raised.value).startswith("redis://127.0.0.1:")


async def test_a_redis_that_comes_back_is_read_again(tmp_path: Path) -> None:
    port = free_port()
    queue = open_queue(f"redis://127.0.0.1:{port}?list=jobs")
    command = ("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "")
    for _ in range(2):
        with server(port, tmp_path, *command):
            assert await look(queue) == Counts(0, None)
        with pytest.raises(QueueUnreadableError):
            await look(queue)
    await queue.close()


@pytest.mark.slow
async def test_a_nats_stream_before_its_consumer_and_with_it(tmp_path: Path) -> None:
    import nats
    from nats.js.api import RetentionPolicy

    port = free_port()
    with server(port, tmp_path, "nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(tmp_path)):
        url = f"nats://127.0.0.1:{port}?stream=JOBS&consumer=workers"
        with pytest.raises(QueueUnreadableError, match="stream not found"):
            await once(url)
        connection = await nats.connect(f"nats://127.0.0.1:{port}")
        jetstream = connection.jetstream()
        await jetstream.add_stream(name="JOBS", subjects=["jobs"], retention=RetentionPolicy.WORK_QUEUE)
        for n in range(5):
            await jetstream.publish("jobs", str(n).encode())
        assert await once(url) == Counts(5, 0)
        consumer = await jetstream.pull_subscribe("jobs", durable="workers")
        (job, _) = await consumer.fetch(2)
        assert await once(url) == Counts(3, 2)
        await job.ack_sync()
        assert await once(url) == Counts(3, 1)
        await connection.close()
    with pytest.raises(QueueUnreadableError):
        await once(url, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_rabbitmq_queue_by_a_passive_declare_and_by_its_management_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aio_pika

    management = free_port()
    (tmp_path / "plugins").write_text("[rabbitmq_management].")
    write = Path.write_text

    def also_management(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if self.name == "rabbitmq.conf":
            text += f"management.tcp.port = {management}\nmanagement.tcp.ip = 127.0.0.1\n"
            text += "collect_statistics_interval = 1000\n"
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", also_management)
    with RabbitQueue.run(tmp_path) as rabbit:
        host = rabbit.env["AMQP_URL"].rstrip("/")
        url = f"{host}/?queue=jobs"
        managed = f"{url}&management={quote(f'http://guest:guest@127.0.0.1:{management}', safe='')}"
        with pytest.raises(QueueUnreadableError, match="no queue 'jobs'"):
            await once(url)
        for n in range(4):
            await rabbit.put({"id": n})
        assert await once(url) == Counts(4, None)
        async with await aio_pika.connect(rabbit.env["AMQP_URL"]) as connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=1)
            await (await channel.get_queue("jobs", ensure=False)).get()
            assert await once(url) == Counts(3, None)
            counts = Counts(0, 0)
            for _ in range(60):  # its figures are some seconds old
                with contextlib.suppress(QueueUnreadableError):
                    counts = await once(managed)
                if counts == Counts(3, 1):
                    break
                await asyncio.sleep(0.5)
            assert counts == Counts(3, 1)
        with pytest.raises(QueueUnreadableError, match="answered 401") as raised:
            await once(f"{url}&management=http://guest:swordfish@127.0.0.1:{management}")
        assert "swordfish" not in str(raised.value)


@pytest.mark.slow
async def test_an_sqs_queue_with_a_message_that_somebody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SqsQueue.run(tmp_path) as sqs:
        for name, value in sqs.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        url = f"sqs://us-east-1/jobs?endpoint={sqs.env['AWS_ENDPOINT_URL']}"
        assert await once(url) == Counts(0, 0)
        for n in range(3):
            await sqs.put({"id": n})
        assert await once(url) == Counts(3, 0)
        sqs._open().receive_message(QueueUrl=sqs.env["SQS_QUEUE_URL"])
        assert await once(url) == Counts(2, 1)
        with pytest.raises(QueueUnreadableError, match="does not exist"):
            await once(url.replace("/jobs", "/jogs"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.db"
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, state TEXT)")
        conn.executemany("INSERT INTO jobs (state) VALUES (?)", [("new",), ("new",), ("busy",), ("done",)])
    return path


@pytest.mark.parametrize("slashes", ["sqlite:///", "sqlite://"])
async def test_an_sqlite_query_of_one_or_two_columns(database: Path, slashes: str) -> None:
    one = f"{slashes}{database}?query=SELECT count(*) FROM jobs WHERE state = 'new'"
    assert await once(one) == Counts(2, None)
    two = quote("SELECT sum(state = 'new'), sum(state = 'busy') FROM jobs")
    assert await once(f"{slashes}{database}?query={two}") == Counts(2, 1)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT count(*) FROM jogs", "no such table: jogs"),
        ("SELECT 1, 2, 3", "one or two numbers"),
        ("SELECT 'many'", "'many'"),
        ("SELECT NULL", "'None'"),
        ("SELECT -1", "'-1'"),
        ("SELECT 1 FROM jobs WHERE id > 99", "no row"),
        ("DELETE FROM jobs", "readonly"),
    ],
)
async def test_an_sqlite_query_that_gives_no_numbers_is_said(database: Path, query: str, said: str) -> None:
    with pytest.raises(QueueUnreadableError, match=said):
        await once(f"sqlite:///{database}?query={query}")


async def test_an_sqlite_query_may_take_a_while(database: Path) -> None:
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i %2B 1 FROM n LIMIT 100000) SELECT count(*) FROM n"
    assert await once(f"sqlite:///{database}?query={rows}") == Counts(100_000, None)


async def test_an_sqlite_query_without_an_end_is_given_up(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "READ_SECONDS", 0.3)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i %2B 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(QueueUnreadableError, match="interrupted"):
        await once(f"sqlite:///{database}?query={endless}")


@pytest.mark.parametrize(
    ("command", "counts"),
    [
        ("echo 3", Counts(3, None)),
        ("echo 3 1", Counts(3, 1)),
        ("echo 3; echo 1", Counts(3, 1)),
        ("echo 2.0", Counts(2, None)),
        ("echo 2.1 0.5", Counts(3, 1)),
        ("echo '{}' >&2; expr 3 + 4", Counts(7, None)),
    ],
)
async def test_a_command_prints_one_or_two_numbers(command: str, counts: Counts) -> None:
    assert await look(CommandQueue(command)) == counts


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("true", "one or two numbers"),
        ("echo 1 2 3", "'1 2 3'"),
        ("echo -1", "'-1'"),
        ("echo nan", "'nan'"),
        ("echo inf", "'inf'"),
        ("echo many", "'many'"),
        ("echo 3; echo no route to host >&2; exit 7", "exit code 7: no route to host"),
        ("nonexistent-command", "exit code 127"),
        ("kill -9 $$", "exit code -9"),
        ("seq 10000", "more than 4096 bytes"),
        (
            "echo at redis://me:hun@ter@host/0?password=s, host down >&2; false",
            r"exit code 1: at redis://host/0\?\*\*\* host",
        ),
    ],
)
async def test_a_command_that_prints_something_else_or_fails_is_said(command: str, said: str) -> None:
    with pytest.raises(QueueUnreadableError, match=said):
        await look(CommandQueue(command))


async def test_a_command_that_prints_without_an_end_is_given_up_and_not_kept_in_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(QueueUnreadableError, match="does not answer within"):
            await look(CommandQueue("yes & exec yes >&2"), 0.5)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


async def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    queue = CommandQueue(f"sleep 61 & echo $! > {tmp_path}/pid; sleep 62")
    began = time.monotonic()
    with pytest.raises(QueueUnreadableError, match="does not answer within"):
        await look(queue, 0.5)
    assert time.monotonic() - began < 5
    child = psutil.Process(_pid(tmp_path)) if psutil.pid_exists(_pid(tmp_path)) else None
    for _ in range(100):
        if child is None or not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.05)
    pytest.fail("it still runs")


def _pid(folder: Path) -> int:
    return int((folder / "pid").read_text())


async def test_a_server_that_never_answers_is_given_up() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        queue = open_queue(f"redis://127.0.0.1:{listener.getsockname()[1]}?list=jobs")
        with pytest.raises(QueueUnreadableError, match=r"does not answer within 0\.3 s"):
            await look(queue, 0.3)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("jobs", "must begin with one of redis://"),
        ("postgres://host/db", "--command"),
        ("redis://host:port/0?list=jobs", "no URL"),
        ("redis://host/0", "needs the parameter list="),
        ("redis://host/jobs?list=jobs", "/jobs must be the number of a database"),
        ("redis://host/0?stream=jobs", "needs the parameter group="),
        ("redis://host/0?list=jobs&socket_timeout=soon", "socket_timeout"),
        ("redis://host/0?list=jobs&sokcet_timeout=3", "unexpected keyword argument 'sokcet_timeout'"),
        ("redis://host/0?list=a&stream=b&group=c", "unexpected keyword argument 'list'"),
        ("nats://host?stream=S", "needs the parameter consumer="),
        ("amqp://host/", "needs the parameter queue="),
        ("amqp://host/?queue=q&management=host", "http or https"),
        ("sqs://eu-central-1", "region and a queue"),
        ("sqlite:///jobs.db", "needs the parameter query="),
        ("sqlite://jobs.db?query=SELECT 1", "needs a file"),
    ],
)
def test_a_url_that_is_none_says_what_is_missing(url: str, said: str) -> None:
    with pytest.raises(BadSettings, match=said):
        open_queue(url)


@pytest.mark.parametrize("url", ["redis://h", "nats://h", "amqp://h", "sqs://h", "sqlite:///f"])
def test_the_example_for_a_url_that_lacks_something_is_one_that_works(url: str) -> None:
    with pytest.raises(BadSettings) as refused:
        open_queue(url)
    _, _, examples = str(refused.value).partition(", as in ")
    for example in examples.split(" or "):
        open_queue(example)


def test_no_password_is_in_what_is_shown() -> None:
    for url in (
        "redis://me:hunter2@host:6379/0?list=jobs&busy=jobs:busy&password=hunter2",
        "amqps://me:hunter2@host/v?queue=jobs&management=https://me:hunter2@host:15671",
        "nats://hunter2@host?stream=S&consumer=C",
    ):
        queue = open_queue(url)
        assert "hunter2" not in queue.shown
        assert "hunter2" not in json.dumps(in_words(ValueError(f"cannot connect to {url}"), queue))
