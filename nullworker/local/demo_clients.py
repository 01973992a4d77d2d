"""The clients of the demo: the official one through `nullworker reserve`, or plain HTTP where it is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nullworker.errors import NullworkerError
from nullworker.local.fleet_worker import ROOT
from nullworker.testing import FakeAutoscaler

#: Seconds between two calls of /route/.
POLL_SECONDS = 0.5


class Job(NamedTuple):
    """One entry of the queue. `seconds` of work; `asked_at`: seconds after the start."""

    name: str
    seconds: float
    asked_at: float

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of its reservation, for the consumer."""
        return {"job": self.name, "seconds": self.seconds}


class NotReserved(NullworkerError):
    """The client failed; the message is its own."""


@functools.cache
def official_version() -> str | None:
    """The version of the official client, None when it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("vastai")
    return None


async def official(
    vast: FakeAutoscaler, job: Job, env: Mapping[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Run `nullworker reserve`, which uses the official client, and pass its progress messages to `say`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "nullworker", "reserve", "--endpoint", vast.endpoint),
        *("--autoscaler", vast.url, "--metadata", json.dumps(job.metadata)),
        env={**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    reading = asyncio.ensure_future(process.stdout.read())
    try:
        last = ""
        async for raw in process.stderr:
            last = raw.decode(errors="replace").strip()
            if last.startswith(("held on", "waiting for a worker (0 s)")):
                say(last.replace(" (0 s)", ": there is none yet"))
        out = await reading
        if await process.wait():
            raise NotReserved(f"{job.name}: {last}")
        answer: dict[str, Any] = json.loads(out)
        return answer
    finally:
        reading.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def plain(vast: FakeAutoscaler, job: Job, env: Mapping[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """The same over plain HTTP: poll the autoscaler for a grant and send it to the worker."""
    import aiohttp

    ask = {"endpoint": vast.endpoint, "api_key": "", "cost": 100, "request_idx": 0}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
        while True:
            async with http.post(f"{vast.url}/route/", json=ask) as answer:
                grant = await answer.json()
            if "url" in grant:
                break
            if not ask["request_idx"]:
                say("waiting for a worker: there is none yet")
            ask["request_idx"] = grant["request_idx"]
            await asyncio.sleep(POLL_SECONDS)
        say(f"held on {grant['url']}, by a plain request")
        body = {"auth_data": grant, "payload": {"metadata": job.metadata}, "session_id": None}
        async with http.post(f"{grant['url']}/reserve", json=body) as answer:
            body_of_answer: dict[str, Any] = await answer.json()
            if not answer.ok:
                raise NotReserved(f"{job.name}: {grant['url']} answered {answer.status} {body_of_answer}")
            return body_of_answer
