"""A TCP proxy whose connections can be cut: all at once, for a while, or only those that are idle."""

from __future__ import annotations

import asyncio
import contextlib
import socket


class CutProxy:
    """Passes connections on to a port of this machine. Attributes: `port`, where it listens."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> CutProxy:
        self._listener.close()
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def mend(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, reuse_address=True)

    async def cut(self) -> None:
        """Close every connection, and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.close_all()

    async def close_all(self) -> None:
        """Close every connection, as a server does with idle ones; new ones are taken."""
        for writer in list(self._writers):
            writer.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError):
            their_reader, other = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(other)
            both = [
                asyncio.ensure_future(self._pass(reader, other)),
                asyncio.ensure_future(self._pass(their_reader, writer)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in both:
                    each.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        for each_writer in (writer, other):
            if each_writer is not None:
                each_writer.close()
                self._writers.discard(each_writer)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
