"""The worker under test: a real process on fixed ports, killed and started again, with its log lines watched.

Clients and the autoscaler know an instance by its ports, so they are fixed. They lie below the kernel's range for
outgoing connections, so that no client's own socket can take one while the worker is down.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Seconds that a start may take before the run is given up.
PATIENCE = 30.0
#: Short enough for every way to end to happen often.
LIMITS = {"MAX_RESERVATION_SECONDS": "2", "NULL_MAX_QUEUE_SECONDS": "0.5", "NULL_MAX_QUEUED": "6"}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the ephemeral range. No seed decides: runs with one may be side by side."""
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


class Worker:
    """One instance, over all its lives.

    Attributes:
        alarms: log lines that no fault outside the process explains; there must be none.
        lives: how often it was started.
    """

    def __init__(self, folder: Path, rng: random.Random, report_addr: str) -> None:
        self.db = folder / "nullworker.db"
        self.alarms: list[str] = []
        self.lives = 0
        self.port, self.control_port, self.http_port = free_ports(3)
        self.url = f"http://127.0.0.1:{self.port}"
        self.control = f"http://127.0.0.1:{self.control_port}"
        self._env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "CONTAINER_ID": "7",
            "MASTER_TOKEN": "crash",
            "REPORT_ADDR": report_addr,
            "WORKER_PORT": str(self.port),
            "WORKER_HTTP_PORT": str(self.http_port),
            "NULL_CONTROL_PORT": str(self.control_port),
            "NULL_EVENT_LOG": str(self.db),
            "NULL_LOG_FORMAT": "json",
            **LIMITS,
        }
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]
        self._started = asyncio.Event()

    async def spawn(self) -> None:
        """Start it, and do not wait."""
        self.lives += 1
        self._started.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nullworker", "serve", env=self._env, stderr=asyncio.subprocess.PIPE
        )
        self._reader = asyncio.ensure_future(self._read())

    async def started(self) -> None:
        """Wait until it listens.

        Raises:
            RuntimeError: it has ended, or does not come.
        """
        listening = asyncio.ensure_future(self._started.wait())
        await asyncio.wait({listening, self._reader}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if not self._started.is_set():
            raise RuntimeError(f"the worker did not start: {self.alarms[-3:]}")

    async def kill(self) -> None:
        """kill -9; of one that has ended already, nothing."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reader

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self._process.wait(), PATIENCE)
        await self._reader
        return code

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            line = _parse(raw)
            if line.get("event") == "worker_started":
                self._started.set()
            if line.get("level") not in ("debug", "info", "warning"):
                self.alarms.append(json.dumps(line)[:2000])


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    # a kill in the middle of a line leaves its beginning, which is no alarm
    if isinstance(line, dict):
        return line
    return {"level": "info"} if raw.startswith(b"{") else {"level": "text", "text": raw.decode(errors="replace")}
