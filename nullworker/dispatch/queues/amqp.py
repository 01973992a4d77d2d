"""A queue of RabbitMQ, by AMQP or by its management plugin."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.reading import READ_SECONDS, QueueUnreadableError, library
from nullworker.errors import BadSettings


class AmqpQueue:
    """A passive declare tells only what is ready; what is unacknowledged, only the management plugin."""

    example = "amqp://USER@HOST/VHOST?queue=jobs"

    def __init__(self, address: Address) -> None:
        self._url, self._names = address.take("queue", optional=("management",))
        self._parts = address.parts
        self.shown, self.secrets = address.shown, address.secrets
        self._connection: Any = None
        self._http: Any = None
        management = self._names.get("management")
        if management is None:
            self._library = library("aio_pika", "aio-pika")
        elif urlsplit(management).scheme not in ("http", "https"):
            raise BadSettings("--queue (NULL_QUEUE): management= must be an http or https URL")
        else:
            self.secrets += Address.parse(management).secrets

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


def _yarl(url: str) -> Any:
    import yarl

    return yarl.URL(url, encoded=True)  # a vhost named / is %2F there
