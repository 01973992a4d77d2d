"""Worker processes to be compared, started alike: this project's, the SDK's, bare aiohttp, and the bound."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.children import PATIENCE, ROOT, Child
from nullworker.testing import FakeAutoscaler

COMMANDS = {
    "nullworker": ["-m", "nullworker", "serve"],
    "normal": ["-m", "nullworker", "serve"],  # the same at NULL_LOG_SYNC=normal: what the disk costs
    "SDK": [str(ROOT / "bench" / "sdk_worker.py")],
    "floor": [str(ROOT / "bench" / "floor.py")],
    "bound": [str(ROOT / "bench" / "bound.py")],
}

#: Those that speak to no autoscaler.
BARE = ("floor", "bound")


class Peer:
    """One running worker. `seconds_to_port` and `seconds_to_ready` are counted from its start."""

    def __init__(self, name: str, vast: FakeAutoscaler, folder: Path, **env: str) -> None:
        self.name = name
        self.vast = vast
        self.folder = folder
        self.env = env
        self.seconds_to_port = self.seconds_to_ready = float("nan")
        self._numbers = itertools.count(1)
        self._grant: dict[str, Any] | None = None

    async def __aenter__(self) -> Peer:
        self.port, self.control_port, session_end_port = free_ports(3)
        self._heard = len(self.vast.statuses)  # what came earlier is of one that had the same port
        self.url = f"http://127.0.0.1:{self.port}"
        self.control = f"http://127.0.0.1:{self.control_port}"
        env = {
            "PYTHONPATH": str(ROOT),
            "CONTAINER_ID": str(self.port),
            "MASTER_TOKEN": "token",
            "REPORT_ADDR": self.vast.url,
            "PUBLIC_IPADDR": "127.0.0.1",
            "WORKER_PORT": str(self.port),
            f"VAST_TCP_PORT_{self.port}": str(self.port),
            "WORKER_HTTP_PORT": str(session_end_port),
            "NULL_CONTROL_PORT": str(self.control_port),
            "NULL_EVENT_LOG": str(self.folder / "log.db"),
            "NULL_MAX_QUEUE_SECONDS": "3600",
            "NULL_MAX_QUEUED": "20000",
            "NULL_LOG_SYNC": "normal" if self.name == "normal" else "full",
            "UNSECURED": "false",
            "USE_SSL": "false",
            **self.env,
        }
        started = time.perf_counter()
        command = (sys.executable, *COMMANDS[self.name])
        self.child = await Child.start(*command, folder=self.folder, out=f"{self.name}.log", env=env)
        try:
            self.stats = psutil.Process(self.child.pid)
            while not await _answers(self.port):
                self.child.check()
                if time.perf_counter() - started > PATIENCE:
                    raise TimeoutError(f"{self.name} opens no port: {self.child.output()[-800:]}")
            self.seconds_to_port = time.perf_counter() - started
            if self.name not in BARE:
                await self.vast.wait_for(self._ready, timeout=PATIENCE)
                self.seconds_to_ready = time.perf_counter() - started
        except BaseException:
            await self.child.end(signal.SIGKILL)
            raise
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    def _ready(self) -> bool:
        return any(status["max_perf"] > 0 for status in self.statuses)

    @property
    def statuses(self) -> list[dict[str, Any]]:
        """What it has reported to the autoscaler."""
        return [status for status in self.vast.statuses[self._heard :] if status["id"] == self.port]

    @property
    def outcomes(self) -> int:
        """How many ends of requests it has reported."""
        return sum(outcome["worker_id"] == self.port for outcome in self.vast.outcomes)

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        await self.child.end(signal.SIGKILL)

    def body(self) -> dict[str, Any]:
        """A signed request, each with a number of its own: the same one again would be asked for how it has ended."""
        number = next(self._numbers)
        if self._grant is None:
            self._grant = self.vast.grant(self.url, request_idx=number, reqnum=number)
        grant = {**self._grant, "request_idx": number, "reqnum": number}  # only the url is signed
        return {"auth_data": grant, "payload": {"duration": 3600}}

    async def reserve(self, body: dict[str, Any]) -> int:
        """Hold a reservation until it is released. The status."""
        async with self.http.post(self.url + "/reserve", json=body) as answer:
            await answer.read()
            return answer.status

    async def release(self) -> bool:
        """Whether one was released."""
        async with self.http.post(self.control + "/release") as answer:
            return bool((await answer.json())["released"])

    async def idle(self) -> None:
        """Wait until it has nothing to do: less than a tenth of a second of CPU in half a second."""
        busy = -1.0
        while self.cpu() - busy > 0.1:
            busy = self.cpu()
            await asyncio.sleep(0.5)

    def memory(self) -> float:
        """Resident MB."""
        return float(self.stats.memory_info().rss) / 1e6

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        times = self.stats.cpu_times()
        return float(times.user + times.system)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        await asyncio.sleep(0.001)
        return False
    writer.close()
    return True
