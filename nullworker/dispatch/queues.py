"""Reads how many jobs wait in the user's queue and how many are in flight: one adapter for each kind of queue.

Each adapter uses the usual library of its queue (extra `queues`), imported when it is opened. Our own parameters are
removed from the URL; the rest is passed on. Both numbers are read in one transaction or reply if possible, else those
in flight first, so that a job which moves meanwhile is counted once or not at all, but never twice. Errors contain no
password.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import math
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from nullworker.clock import stopwatch
from nullworker.dispatch.decision import Counts
from nullworker.errors import BadSettings, CannotStart, NullworkerError

#: Seconds that one read may take.
READ_SECONDS: Final = 10.0
#: Entries of a Redis stream that are counted at most, where it has lost count.
MOST_ENTRIES: Final = 1000
_SHOWN_PARAMETERS: Final = frozenset(("list", "busy", "stream", "group", "consumer", "queue"))


class QueueUnreadableError(NullworkerError):
    """The queue cannot be read now; the sentence says why, without a password."""


class Queue(Protocol):
    """One queue.

    Attributes:
        shown: what it is called in log lines; no password is in it.
    """

    shown: str

    async def read(self) -> Counts:
        """One look at it. Raises whatever its library raises; use `look`."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


async def look(queue: Queue, seconds: float = READ_SECONDS) -> Counts:
    """One look at a queue, within so many seconds.

    Raises:
        QueueUnreadableError: it cannot be read; its connections are closed, and the next look opens new ones.
    """
    task = asyncio.ensure_future(queue.read())
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise QueueUnreadableError(f"{queue.shown} does not answer within {seconds:g} s")
        counts = task.result()
    except Exception as error:  # each library has errors of its own
        with contextlib.suppress(Exception):
            await queue.close()
        if isinstance(error, QueueUnreadableError):
            raise
        raise QueueUnreadableError(f"{queue.shown} cannot be read: {_words(error, queue)}") from error
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)
        if task.done() and not task.cancelled():
            task.exception()  # looked at, or asyncio complains of one that nobody saw
    if counts.waiting < 0 or (counts.in_flight or 0) < 0:
        raise QueueUnreadableError(f"{queue.shown} cannot be read: it has a negative number of jobs: {counts}")
    return counts


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
    opener = _KINDS.get(address.parts.scheme)
    if opener is None:
        allowed = ", ".join(f"{scheme}://" for scheme in _KINDS)
        raise BadSettings(f"--queue (NULL_QUEUE) must begin with one of {allowed}; for all others there is --command")
    return opener(address)


class Address(NamedTuple):
    """A queue's URL, taken apart."""

    parts: SplitResult
    query: list[tuple[str, str]]

    @classmethod
    def parse(cls, url: str) -> Address:
        """The parts of a URL; ValueError where it is none."""
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for one that is no number
        return cls(parts, parse_qsl(parts.query, keep_blank_values=True))

    def take(self, *required: str, optional: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
        """The URL without these parameters, and their values. Those that are optional may be missing.

        Raises:
            BadSettings: one is missing.
        """
        values = {name: value for name, value in self.query if name in (*required, *optional)}
        missing = [name for name in required if not values.get(name)]
        if missing:
            raise BadSettings(
                f"--queue (NULL_QUEUE) {self.parts.scheme}:// needs the parameter {missing[0]}=, as in {self.example}"
            )
        rest = urlencode([(name, value) for name, value in self.query if name not in values])
        return self.parts._replace(query=rest).geturl(), values

    @property
    def example(self) -> str:
        """A URL of this kind as it should be."""
        return _EXAMPLES[_KINDS[self.parts.scheme]]

    @property
    def shown(self) -> str:
        """Without the user, the password, and parameters that are not ours."""
        host = self.parts.netloc.rpartition("@")[2]
        query = "&".join(f"{name}={value}" for name, value in self.query if name in _SHOWN_PARAMETERS)
        return f"{self.parts.scheme}://{host}{self.parts.path}{'?' if query else ''}{query}"


class _Redis:
    def __init__(self, address: Address) -> None:
        names = ("stream", "group") if any(name == "stream" for name, _ in address.query) else ("list",)
        self._url, self._names = address.take(*names, optional=("busy",))
        self._library = _library("redis.asyncio", "redis")
        self._client: Any = None
        self.shown, self.secrets = address.shown, _secrets(address)
        try:
            self._library.ConnectionPool.from_url(self._url)
        except (ValueError, TypeError) as error:
            raise BadSettings(f"--queue (NULL_QUEUE) {self.shown}: {_words(error, self)}") from None

    async def read(self) -> Counts:
        if self._client is None:
            self._client = self._library.Redis.from_url(self._url)
        return await (self._stream() if "stream" in self._names else self._list())

    async def _list(self) -> Counts:
        async with self._client.pipeline(transaction=True) as multi:
            if "busy" in self._names:
                multi.llen(self._names["busy"])
            multi.llen(self._names["list"])
            *in_flight, waiting = await multi.execute()
        return Counts(int(waiting), int(in_flight[0]) if in_flight else None)

    async def _stream(self) -> Counts:
        name, wanted = self._names["stream"], self._names["group"]
        async with self._client.pipeline(transaction=True) as multi:
            multi.xinfo_groups(name)
            multi.xlen(name)
            groups, length = await multi.execute(raise_on_error=False)
        if isinstance(length, Exception):
            raise length
        if isinstance(groups, Exception):
            if length == 0:  # there is no such stream yet
                return Counts(0, 0)
            raise groups
        group = next((each for each in groups if _text(each["name"]) == wanted), None)
        if group is None:  # its consumers make it when the first of them starts
            return Counts(int(length), 0)
        waiting = group.get("lag")
        if waiting is None:  # Redis has lost count: an entry that was waiting has been deleted, or the id was set
            after = f"({_text(group['last-delivered-id'])}"
            waiting = len(await self._client.xrange(name, min=after, max="+", count=MOST_ENTRIES))
        return Counts(int(waiting), int(group["pending"]))

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _Nats:
    def __init__(self, address: Address) -> None:
        self._url, self._names = address.take("stream", "consumer")
        self._library = _library("nats", "nats-py")
        self._connection: Any = None
        self.shown, self.secrets = address.shown, _secrets(address)

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


class _Amqp:
    """A passive declare tells only what is ready; what is unacknowledged, only the management plugin."""

    def __init__(self, address: Address) -> None:
        self._url, self._names = address.take("queue", optional=("management",))
        self._parts = address.parts
        self.shown, self.secrets = address.shown, _secrets(address)
        self._connection: Any = None
        self._http: Any = None
        management = self._names.get("management")
        if management is None:
            self._library = _library("aio_pika", "aio-pika")
        elif urlsplit(management).scheme not in ("http", "https"):
            raise BadSettings("--queue (NULL_QUEUE): management= must be an http or https URL")
        else:
            self.secrets += _secrets(Address.parse(management))

    async def read(self) -> Counts:
        if "management" in self._names:
            return await self._managed()
        if self._connection is None:
            self._connection = await self._library.connect(self._url, timeout=5)
        async with self._connection.channel() as channel:
            queue = await channel.declare_queue(self._names["queue"], passive=True)
            return Counts(int(queue.declaration_result.message_count or 0), None)

    async def _managed(self) -> Counts:
        import aiohttp

        base = urlsplit(self._names["management"])
        who = base if base.username else self._parts
        login = f"{unquote(who.username or 'guest')}:{unquote(who.password or 'guest')}"
        headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
        host = base.netloc.rpartition("@")[2]
        vhost = unquote(self._parts.path.removeprefix("/")) or "/"
        path = f"{base.path.rstrip('/')}/api/queues/{quote(vhost, safe='')}/{quote(self._names['queue'], safe='')}"
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READ_SECONDS))
        url = _yarl(f"{base.scheme}://{host}{path}")
        async with self._http.get(url, headers=headers) as answer:
            if answer.status != 200:
                raise QueueUnreadableError(f"{self.shown}: the management plugin at {host} answered {answer.status}")
            answered = await answer.json()
        if "messages_ready" not in answered:  # it was made in the last seconds
            raise QueueUnreadableError(f"{self.shown}: the management plugin at {host} has no figures of it yet")
        return Counts(int(answered["messages_ready"]), int(answered["messages_unacknowledged"]))

    async def close(self) -> None:
        connections, self._connection, self._http = (self._connection, self._http), None, None
        for each in connections:
            if each is not None:
                await each.close()


class _Sqs:
    """Its figures are approximate, and up to a minute old."""

    def __init__(self, address: Address) -> None:
        _, self._names = address.take(optional=("endpoint",))
        self._region, self._queue = address.parts.hostname or "", address.parts.path.strip("/")
        if not self._region or not self._queue:
            raise BadSettings(f"--queue (NULL_QUEUE) needs a region and a queue's name, as in {address.example}")
        self._library = _library("boto3", "boto3")
        self._client: Any = None
        self._queue_url: str | None = None
        self.shown, self.secrets = address.shown, _secrets(address)

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


class _Sqlite:
    """The query gives one row: waiting, and in flight if it has a second column; one statement sees one moment."""

    def __init__(self, address: Address) -> None:
        _, self._names = address.take("query")
        path = unquote(address.parts.path.removeprefix("/"))
        if not path or address.parts.netloc:
            raise BadSettings(f"--queue (NULL_QUEUE) needs a file, as in {address.example}")
        self._path = Path(path)
        if not self._path.is_absolute() and not self._path.exists() and Path("/", path).exists():
            self._path = Path("/", path)  # sqlite:///tmp/jobs.db, as in a file URL
        self.shown, self.secrets = f"sqlite:///{path}", ()

    async def read(self) -> Counts:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Counts:
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        until = stopwatch() + READ_SECONDS
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=READ_SECONDS / 2)) as conn:
            conn.set_progress_handler(lambda: int(stopwatch() > until), 10_000)  # a thread cannot be cancelled
            row = conn.execute(self._names["query"]).fetchone()
        if row is None:
            raise ValueError("the query gives no row")
        return _counts(row)

    async def close(self) -> None:
        """Nothing is open between two reads."""


class CommandQueue:
    """A shell command that prints one or two numbers: waiting, and what is in flight."""

    def __init__(self, command: str) -> None:
        self._command = command
        self.shown, self.secrets = "--command", ()

    async def read(self) -> Counts:
        """Run it; it and what it has started are killed when the read is cancelled."""
        process = await asyncio.create_subprocess_shell(
            self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                await process.communicate()
        if process.returncode != 0:
            said = err.decode(errors="replace").strip().splitlines()
            raise ValueError(f"it ended with exit code {process.returncode}{': ' + said[-1] if said else ''}")
        return _counts(out.decode(errors="replace").split())

    async def close(self) -> None:
        """Nothing is open between two reads."""


def _counts(numbers: Any) -> Counts:
    """One or two numbers; a fraction, as Prometheus gives, is rounded up.

    Raises:
        ValueError: they are others.
    """
    try:
        read = [math.ceil(float(number)) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        read = []
    if len(read) not in (1, 2) or min(read) < 0:
        shown = " ".join(str(number) for number in numbers)[:80]
        raise ValueError(f"one or two numbers from 0 up are wanted, and there is {shown!r}")
    return Counts(read[0], read[1] if len(read) == 2 else None)


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise CannotStart(
            f"this kind of queue needs {package}, which is not installed: pip install 'nullworker[queues]'"
        ) from None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _yarl(url: str) -> Any:
    import yarl

    return yarl.URL(url, encoded=True)  # a vhost named / is %2F there


def _secrets(address: Address) -> tuple[str, ...]:
    """All that must not be quoted: the password, as it is written and as it is meant, and foreign parameters."""
    found = [address.parts.password or "", unquote(address.parts.password or "")]
    found += [value for name, value in address.query if name not in _SHOWN_PARAMETERS]
    return tuple(each for each in found if each)


def _words(error: BaseException, queue: Any) -> str:
    """An error in one line, without a password and without an address's userinfo."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in queue.secrets:
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]+@", "//", text)[:300]


_KINDS: Final[Mapping[str, Callable[[Address], Queue]]] = {
    "redis": _Redis,
    "rediss": _Redis,
    "nats": _Nats,
    "tls": _Nats,
    "amqp": _Amqp,
    "amqps": _Amqp,
    "sqs": _Sqs,
    "sqlite": _Sqlite,
}

_EXAMPLES: Final[Mapping[Callable[[Address], Queue], str]] = {
    _Redis: "redis://HOST/0?list=jobs&busy=jobs:busy or redis://HOST/0?stream=jobs&group=workers",
    _Nats: "nats://HOST?stream=JOBS&consumer=workers",
    _Amqp: "amqp://USER@HOST/VHOST?queue=jobs",
    _Sqs: "sqs://eu-central-1/jobs",
    _Sqlite: "sqlite:///jobs.db?query=SELECT count(*) FROM jobs WHERE state = 'new'",
}
