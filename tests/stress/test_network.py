"""A caller and a worker on two machines: the link goes down, comes back, or never does.

The worker runs in a network namespace of its own, so these tests need root and `ip` (iproute2). Where there is neither,
they are skipped, and say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import PATIENCE, WorkerProcess, changed
from programs import free_port

from nullworker.client import HoldError, SessionLost, WorkerSession, hold_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2, for network namespaces"
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A worker behind a link. `url`: its external port, from here."""

    def __init__(self, folder: Path) -> None:
        self.name = f"nw{os.getpid()}"
        port = free_port()
        self.url = f"http://10.231.7.2:{port}"
        module = changed(nullworker__http__sse__KEEPALIVE_SECONDS=0.5)
        self.worker = WorkerProcess(folder, module=module, WORKER_PORT=str(port), MAX_RESERVATION_SECONDS="60")
        self.worker._command = ("ip", "netns", "exec", self.name, sys.executable, *module)

    def down(self) -> None:
        """At the machine's end: here the route would go too, and another one would be taken."""
        ip("netns", "exec", self.name, "ip", "link", "set", f"{self.name}b", "down")

    def up(self) -> None:
        ip("netns", "exec", self.name, "ip", "link", "set", f"{self.name}b", "up")

    async def release(self, result: Any) -> None:
        """On the machine itself, whose control port nobody else reaches."""
        script = (
            "import json, urllib.request as r; r.urlopen(r.Request("
            f"'http://127.0.0.1:{self.worker.control_port}/release', json.dumps({{'result': {result!r}}}).encode()))"
        )
        process = await asyncio.create_subprocess_exec("ip", "netns", "exec", self.name, sys.executable, "-c", script)
        assert await process.wait() == 0


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    machine = Machine(tmp_path)
    name = machine.name
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("addr", "add", "10.231.7.1/24", "dev", f"{name}a")
        ip("netns", "exec", name, "ip", "addr", "add", "10.231.7.2/24", "dev", f"{name}b")
        ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        ip("link", "set", f"{name}a", "up")
        machine.up()
        async with machine.worker:
            yield machine
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", f"{name}a")
        ip("netns", "del", name)


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds without a byte after which a stream is given up; 45 outside of tests."""
    monkeypatch.setattr("nullworker.client.worker_http.SILENCE_SECONDS", 2.0)
    return 2.0


async def held(machine: Machine, **more: Any) -> tuple[asyncio.Task[Any], list[str]]:
    said: list[str] = []
    holding = asyncio.ensure_future(hold_at(machine.url, say=said.append, **more))
    await machine.worker.line("reservation_held")
    return holding, said


def session_at(machine: Machine, lifetime: float) -> WorkerSession:
    grant = {"cost": 100, "endpoint": "e", "reqnum": 1, "request_idx": 1, "signature": "unsecured", "url": machine.url}
    return WorkerSession(machine.url, grant, {"lifetime": lifetime})


async def test_a_request_whose_link_goes_down_is_lost_after_the_silence(machine: Machine, silence: float) -> None:
    holding, _ = await held(machine)
    machine.down()
    since = asyncio.get_running_loop().time()
    with pytest.raises(HoldError, match="the reservation is lost"):
        await asyncio.wait_for(holding, PATIENCE)
    assert silence - 0.6 <= asyncio.get_running_loop().time() - since < silence + 5


async def test_a_stall_that_is_shorter_than_the_silence_is_survived(machine: Machine) -> None:
    holding, _ = await held(machine)
    machine.down()
    await asyncio.sleep(3.0)  # of the 45 that a caller waits
    machine.up()
    await machine.release({"rows": 1})
    assert (await asyncio.wait_for(holding, 40))["result"] == {"rows": 1}


async def test_a_session_goes_on_when_its_link_comes_back(machine: Machine, silence: float) -> None:
    session, said = session_at(machine, 30), list[str]()
    async with aiohttp.ClientSession() as http:
        await session.create(http)
        keeping = asyncio.ensure_future(session.keep(http, say=said.append))
        await machine.worker.line("reservation_held")
        machine.down()
        await asyncio.sleep(2.5 * silence)
        machine.up()
        await asyncio.sleep(0.5)
        await machine.release({"rows": 2})
        final = await asyncio.wait_for(keeping, 40)
    assert (final["reason"], final["result"]) == ("explicit", {"rows": 2})


async def test_a_session_whose_machine_is_gone_is_lost_after_its_lifetime(machine: Machine, silence: float) -> None:
    session = session_at(machine, 4)
    async with aiohttp.ClientSession() as http:
        await session.create(http)
        since = asyncio.get_running_loop().time()
        keeping = asyncio.ensure_future(session.keep(http))
        await asyncio.sleep(0.2)
        machine.down()
        with pytest.raises(SessionLost, match="no consumer had attached"):
            await asyncio.wait_for(keeping, PATIENCE)
        assert 4 <= asyncio.get_running_loop().time() - since < 12
