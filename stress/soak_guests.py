"""The other visitors of a soak: forged, broken and slow requests, scrapers, readers of /events, and the commands.

Each counts what it did and adds a wrong answer to `problems`. One that ends a reservation records that in the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from nullworker.testing import FakeAutoscaler
from stress.crash_load import LOST, Ledger, Release
from stress.crash_worker import ROOT, Worker
from stress.soak_load import Lost, noting

#: Seconds after which a connection that says nothing more must have been closed: the worker's 10, and patience with
#: a machine that does other things. Counted one by one, so that a machine that stands still counts as one.
OPEN_SECONDS = 30
#: Seconds for any answer.
ANSWER_SECONDS = 30
MOST_PROBLEMS = 100
#: The status of a signed request while the worker starts, and there is no key to tell by.
NO_KEY = 503
FORGED = "Zm9yZ2Vk" * 40
#: What is asked of the control port, and which answers are right.
ASKED = {
    "/metrics": (200,),
    "/status": (200,),
    "/reservations?limit=20": (200,),
    "/reservations?state=cancelled&limit=20": (200,),
    "/readyz": (200, 503),
    "/": (200,),
}
#: The beginnings of requests that never end.
SLOW = {
    "connects only": b"",
    "half a head": b"POST /reserve HTTP/1.1\r\nHost: worker\r\nX: ",
    "half a body": b'POST /reserve HTTP/1.1\r\nHost: worker\r\nContent-Length: 900\r\n\r\n{"auth_data": ',
}
#: Bodies that are refused: method, path, body, status. A dict is a payload that is signed.
BAD: dict[str, tuple[str, str, bytes | dict[str, Any], int]] = {
    "not JSON": ("POST", "/reserve", b"{nope", 422),
    "not UTF-8": ("POST", "/session/create", b'{"auth_data": "\xff"}', 422),
    "no auth_data": ("POST", "/reserve", b"{}", 422),
    "auth_data null": ("POST", "/ping", b'{"auth_data": null, "payload": {}}', 422),
    "too large": ("POST", "/reserve", b" " * (1024 * 1024 + 1), 413),
    "no such route": ("POST", "/nowhere", b"{}", 404),
    "wrong method": ("GET", "/reserve", b"", 405),
    "wrong token": ("POST", "/pyworker/update", b"{}", 401),
    "negative duration": ("POST", "/reserve", {"duration": -1}, 422),
    "duration NaN": ("POST", "/reserve", {"duration": float("nan")}, 422),
    "large metadata": ("POST", "/reserve", {"metadata": {"job": "x" * 5000}}, 422),
    "lifetime 0": ("POST", "/session/create", {"lifetime": 0}, 422),
}


class Guests:
    """`run` them until cancelled. `seq` is the last event that the reader who stays has seen.

    `lost`: requests without an answer, or with one that came too late.
    """

    def __init__(
        self,
        worker: Worker,
        vast: FakeAutoscaler,
        ledger: Ledger,
        rng: random.Random,
        pause: float,
        counts: Counter[str],
        key_in_doubt: Callable[[], bool],
    ) -> None:
        self.problems: list[str] = []
        self.lost: Lost = []
        self.seq = 0
        self._worker, self._vast, self._ledger, self._rng = worker, vast, ledger, rng
        self._pause, self._counts = pause, counts
        self._key_in_doubt = key_in_doubt

    async def run(self) -> None:
        """All of them, each one action after the other."""
        connector = aiohttp.TCPConnector(limit=0)
        trace = noting(self.lost, aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trace_configs=[trace]) as http:
            await asyncio.gather(
                self._stay(http),
                self._again(lambda: self._look_in(http), 2.0),
                self._again(lambda: self._forge(http), 0.3),
                self._again(lambda: self._bad(http), 0.5),
                *(self._again(self._dawdle, 1.0) for _ in range(4)),
                self._again(lambda: self._ask(http), 1.0),
                self._again(lambda: self._extend(http), 2.0),
                self._again(self._command, self._pause),
            )

    async def _again(self, action: Callable[[], Awaitable[None]], pause: float) -> None:
        while True:
            with contextlib.suppress(*LOST, asyncio.TimeoutError):  # `lost` has it
                await action()
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * pause)

    def _judge(self, what: str, status: int, right: tuple[int, ...]) -> None:
        self._counts[f"{what}: {status}"] += 1
        if status == NO_KEY and NO_KEY not in right:
            self.lost.append((time.time(), f"{what} was answered with {status}"))
        elif status not in right and len(self.problems) < MOST_PROBLEMS:
            self.problems.append(f"{what} was answered with {status}, not {' or '.join(map(str, right))}")

    # -- the external port ---------------------------------------------------------------------------------------

    async def _forge(self, http: aiohttp.ClientSession) -> None:
        path = self._rng.choice(["/reserve", "/session/create", "/ping"])
        auth = {**self._vast.grant(self._worker.url, request_idx=0), "signature": FORGED}
        in_doubt = self._key_in_doubt()
        async with http.post(self._worker.url + path, json={"auth_data": auth, "payload": {}}) as answer:
            await answer.read()
            in_doubt = in_doubt or self._key_in_doubt()
            self._judge("forged", answer.status, (401, NO_KEY) if in_doubt else (401,))

    async def _bad(self, http: aiohttp.ClientSession) -> None:
        name = self._rng.choice(list(BAD))
        method, path, body, status = BAD[name]
        if isinstance(body, dict):
            grant = self._vast.grant(self._worker.url, request_idx=0)
            body = json.dumps({"auth_data": grant, "payload": body}).encode()
        async with http.request(method, self._worker.url + path, data=io.BytesIO(body)) as answer:
            await answer.read()
            self._judge(name, answer.status, (status,))

    async def _dawdle(self) -> None:
        name = self._rng.choice(list(SLOW))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._worker.port)
        writer.write(SLOW[name])
        closed = asyncio.ensure_future(reader.read())
        try:
            for _ in range(OPEN_SECONDS):
                if (await asyncio.wait({closed}, timeout=1.0))[0]:
                    break
            else:
                self.problems.append(f"{name}: still open after {OPEN_SECONDS} s")
                return
            got = closed.result()
            self._counts[f"{name}: closed"] += 1
            if got and not got.startswith(b"HTTP/1.1 408 "):
                self.problems.append(f"{name} was answered with {got[:80]!r}")
        finally:
            closed.cancel()
            writer.close()

    # -- the control port ----------------------------------------------------------------------------------------

    async def _ask(self, http: aiohttp.ClientSession) -> None:
        path = self._rng.choice(list(ASKED))
        async with http.get(self._worker.control + path) as answer:
            await answer.read()
            self._judge(path, answer.status, ASKED[path])

    async def _extend(self, http: aiohttp.ClientSession) -> None:
        """To the cap from now, so never to less."""
        async with http.post(self._worker.control + "/extend", json={"seconds": 3600}) as answer:
            await answer.read()
            self._judge("/extend", answer.status, (200, 409))

    async def _command(self) -> None:
        """A person or a script: `nullworker release`, and `nullworker history`, which reads the log itself."""
        if self._rng.random() < 0.5:
            await self._run("history", "--json", "--limit", "20", "--log", str(self._worker.db))
            return
        release = Release(f"command-{len(self._ledger.releases)}", None, time.time())
        self._ledger.releases.append(release)
        result = json.dumps({"token": release.token})
        try:
            said = await self._run("release", "--json", "--result", result, "--control-url", self._worker.control)
            with contextlib.suppress(ValueError):
                release.answer = json.loads(said)
        finally:
            release.done = time.time()

    async def _run(self, command: str, *words: str) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nullworker", command, *words),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, complained = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._counts[f"nullworker {command}: exit {process.returncode}"] += 1
        if b"Traceback" in complained or process.returncode not in (0, 1):  # 1: no worker, or nothing held
            self.problems.append(f"nullworker {command} exits with {process.returncode}: {complained.decode()[-2000:]}")
        return said

    # -- readers of /events --------------------------------------------------------------------------------------

    async def _look_in(self, http: aiohttp.ClientSession) -> None:
        """A reader that comes, reads for a moment, from somewhere, and goes."""
        after = max(0, self.seq - self._rng.choice([0, 10, 1000]))
        async with http.get(self._worker.control + f"/events?after={after}") as answer:
            self._judge("reader that comes and goes", answer.status, (200,))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drop(answer), self._rng.uniform(0.1, 5.0))

    async def _drop(self, answer: aiohttp.ClientResponse) -> None:
        async for _ in answer.content.iter_any():
            pass

    async def _stay(self, http: aiohttp.ClientSession) -> None:
        """A reader that stays, comes back after each restart where it left off, and misses nothing."""
        while True:
            try:
                headers = {"Last-Event-ID": str(self.seq)}
                timeout = aiohttp.ClientTimeout(total=None, sock_read=60)  # there are keepalives
                async with http.get(self._worker.control + "/events", headers=headers, timeout=timeout) as answer:
                    self._judge("reader that stays", answer.status, (200,))
                    async for line in answer.content:
                        if line.startswith(b"id: "):
                            self._next(int(line[4:]))
            except LOST:
                await asyncio.sleep(0.1)

    def _next(self, seq: int) -> None:
        if seq != self.seq + 1 and len(self.problems) < MOST_PROBLEMS:
            self.problems.append(f"/events: after event {self.seq} came {seq}")
        self.seq = seq
