"""A Redis list, with one for what is busy if there is one, or a stream with its group."""

from __future__ import annotations

from typing import Any, Final

from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.reading import in_words, library
from nullworker.errors import BadSettings

#: Entries of a Redis stream that are counted at most, where it has lost count.
MOST_ENTRIES: Final = 1000


class RedisQueue:
    example = "redis://HOST/0?list=jobs&busy=jobs:busy or redis://HOST/0?stream=jobs&group=workers"

    def __init__(self, address: Address) -> None:
        names = ("stream", "group") if any(name == "stream" for name, _ in address.query) else ("list",)
        self._url, self._names = address.take(*names, optional=("busy",))
        self._library = library("redis.asyncio", "redis")
        self._client: Any = None
        self.shown, self.secrets = address.shown, address.secrets
        path = address.parts.path.strip("/")
        if path and not path.isdecimal():  # the library would read database 0
            raise BadSettings(f"--queue (NULL_QUEUE) {self.shown}: /{path} must be the number of a database, as /0")
        try:
            self._library.ConnectionPool.from_url(self._url).make_connection()  # connects to nothing yet
        except (ValueError, TypeError) as error:
            raise BadSettings(f"--queue (NULL_QUEUE) {self.shown}: {in_words(error, self)}") from None

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


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
