"""A healthy instance for tests of `nullworker doctor`, and the findings of the doctor there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme
from aiohttp import web
from programs import free_port

from nullworker.clock import SystemClock
from nullworker.doctor.examine import examine
from nullworker.doctor.finding import Finding
from nullworker.doctor.machine import Host
from nullworker.testing import FakeAutoscaler

NOW = SystemClock().now()


async def found(machine: Host) -> list[Finding]:
    """The findings; in a thread, for the doctor waits for servers that run in this loop."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: list(examine(machine)))


def the_only(findings: list[Finding], check: str) -> Finding:
    """The one finding that is not well, which is of that check. It says why, and how to fix it."""
    bad = [each for each in findings if each.level != "ok"]
    assert [each.check for each in bad] == [check], bad
    assert bad[0].why
    assert bad[0].fix
    return bad[0]


class Well:
    """An instance on which nothing is wrong; a test breaks one thing."""

    def __init__(self, folder: Path, vast: FakeAutoscaler, health: str) -> None:
        self.folder = folder
        self.certificate, self.key = folder / "instance.crt", folder / "instance.key"
        self.sign(timedelta(days=90))
        self.mounts = folder / "mounts"
        self.mounts.write_text("overlay / overlay rw 0 0\n")
        self.port, self.control = free_port(), free_port()
        self.environ = {
            "CONTAINER_ID": "7",
            "MASTER_TOKEN": "secret",
            "REPORT_ADDR": vast.url,
            "WORKER_PORT": str(self.port),
            "WORKER_HTTP_PORT": str(free_port()),
            "NULL_CONTROL_PORT": str(self.control),
            "PUBLIC_IPADDR": "1.2.3.4",
            f"VAST_TCP_PORT_{self.port}": "40123",
            "USE_SSL": "true",
            "WORKSPACE_DIR": str(folder),
            "BACKEND_HEALTH_URL": health,
        }

    def sign(self, valid: timedelta) -> None:
        """A certificate of an authority, as Vast's start script gets one."""
        pair = trustme.CA().issue_cert("1.2.3.4", not_after=datetime.fromtimestamp(NOW, timezone.utc) + valid)
        self.certificate.write_bytes(pair.cert_chain_pems[0].bytes())
        self.key.write_bytes(pair.private_key_pem.bytes())

    def machine(self, **env: str) -> Host:
        """As it stands now; an empty variable is unset."""
        return Host(
            environ={**self.environ, **env},
            certificate=self.certificate,
            private_key=self.key,
            self_signed_mark=self.folder / "mark",
            mounts=self.mounts,
            free_bytes=lambda path: 10**10,
        )


@asynccontextmanager
async def consumer(status: int = 200) -> AsyncIterator[str]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/health", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/health"
    await runner.cleanup()
