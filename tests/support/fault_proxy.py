"""A TCP proxy with the faults of bad networks: it delays, trickles, swallows and cuts connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from random import Random


class FaultProxy:
    """Listens on 127.0.0.1 and passes on to a port. Attributes: `faults`, how many connections had which."""

    def __init__(self, target: int, random: Random) -> None:
        self.faults: Counter[str] = Counter()
        self._target = target
        self._random = random
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        fault = self._random.choice(("none", "none", "delay", "trickle", "swallow", "cut", "reset"))
        self.faults[fault] += 1
        writers, both = [client_out], list[asyncio.Future[None]]()
        try:
            worker_in, worker_out = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(worker_out)
            both.append(asyncio.ensure_future(self._pass(client_in, worker_out, fault)))
            both.append(asyncio.ensure_future(self._pass(worker_in, client_out, fault)))
            life = self._random.uniform(0.02, 2.0) if fault in ("cut", "reset", "swallow") else None
            await asyncio.wait(both, timeout=life, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for writer in writers:
                if fault == "reset":  # an RST and no FIN, as from a machine that was switched off and on
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
            await asyncio.gather(*both, *(each.wait_closed() for each in writers), return_exceptions=True)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, fault: str) -> None:
        swallow_after = self._random.randrange(400) if fault == "swallow" else None
        passed = 0
        while data := await source.read(16 if fault == "trickle" else 65536):
            if fault in ("delay", "trickle"):
                await asyncio.sleep(self._random.uniform(0.0, 0.3 if fault == "delay" else 0.01))
            passed += len(data)
            if swallow_after is not None and passed > swallow_after:
                continue  # it never arrives, and nobody is told
            sink.write(data)
            await sink.drain()
