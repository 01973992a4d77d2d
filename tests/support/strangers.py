"""HTTP servers that give arbitrary answers, for tests of clients."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def answering(
    answer: Answer, tls: ssl.SSLContext | None = None, *, host: str = "127.0.0.1"
) -> AsyncIterator[str]:
    """A server that gives each connection this answer, and closes it. Where it is: host and port."""

    answers: set[asyncio.Task[object] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.add(asyncio.current_task())
        with contextlib.suppress(asyncio.CancelledError):  # nobody asks any more, and asyncio would log it as an error
            try:
                await answer(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    await writer.wait_closed()

    async with await asyncio.start_server(serve, host, 0, ssl=tls) as server:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"
        for task in filter(None, answers):
            task.cancel()
        await asyncio.gather(*filter(None, answers), return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says what it was asked."""
    writer.write(await reader.read(4096))
