"""Drains a queue by `nullworker dispatch` while the queue, the autoscaler and the disk fail, then checks the accounts.

    python -m stress.dispatch_outages --queue redis --jobs 60 --workers 4 --down 600

One after the other: the queue's server is silent, talks nonsense, and refuses connections; the autoscaler is away for
DOWN seconds; nothing can be written to the ledger's disk (RLIMIT_FSIZE); a limit of hours is reached. Jobs arrive in
each. Meanwhile nothing may be opened that cannot be accounted for; each trouble must be one line in the log when it
begins and one when it is over; and afterwards holds must be opened again. The consumers reach their queue all the time.
`stress.dispatch_audit` says what must be true in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from stress.dispatch_audit import ledger
from stress.dispatch_kills import Run, report
from stress.dispatch_queues import CutProxy

#: Queues that are reached by host and port.
QUEUES: Final = ("redis", "nats", "rabbitmq")
#: Seconds within which a trouble must be told, and its end: a poll of 10 s, and a slow machine.
TOLD_SECONDS: Final = 30.0
#: Seconds that a trouble of the queue or the disk lasts after it was told.
TROUBLE_SECONDS: Final = 20.0
#: Hours of holds that are allowed in the last stage beyond what there were: 36 s.
HOURS_LEFT: Final = 0.01
#: The troubles of the queue, then of the autoscaler, the disk and the limit.
STAGES: Final = 6
#: The lines that begin a trouble; each has another with `_over`, but for a limit.
TROUBLES: Final = ("queue_unreadable", "autoscaler_unreachable", "ledger_unwritable", "limit_reached")

_Act = Callable[[], Awaitable[None]]


class Door(CutProxy):
    """A proxy that can also fall silent, or answer nonsense."""

    _silent = False
    _nonsense = False

    async def mend(self) -> None:
        self._silent = self._nonsense = False
        if self._server is None:
            await super().mend()
        await self.close_all()

    async def silence(self) -> None:
        """Take connections and what comes over them, and answer nothing."""
        self._silent = True

    async def talk_nonsense(self) -> None:
        """Answer with what no queue's client understands."""
        self._nonsense = True
        await self.close_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._silent:
            self._writers.add(writer)
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()
        elif self._nonsense:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()
        else:
            await super()._serve(reader, writer)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not self._silent:
                    sink.write(data)
                    await sink.drain()


class Disk:
    """The disk of a process: nothing more can be written to a file while it is full."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._limit = self._process.rlimit(psutil.RLIMIT_FSIZE)

    async def fill(self) -> None:
        self._process.rlimit(psutil.RLIMIT_FSIZE, (0, self._limit[1]))

    async def clear(self) -> None:
        self._process.rlimit(psutil.RLIMIT_FSIZE, self._limit)


class Outages(Run):
    """One run over a folder; each stage is a line of what was seen."""

    def __init__(self, folder: Path, *, down: float, **options: Any) -> None:
        super().__init__(folder, kills=0, **options)
        self.down = down
        self.seconds += down + STAGES * (TOLD_SECONDS + TROUBLE_SECONDS)
        self.expected: Counter[str] = Counter()  # how often each trouble must have been told

    async def drain(self, jobs: list[dict[str, object]], url: str, vast: asyncio.subprocess.Process) -> None:
        share = -(-len(jobs) // (STAGES + 1))
        queue_port, vast_port = urlsplit(self.kind.url).port, urlsplit(url).port
        assert queue_port is not None
        assert vast_port is not None
        queue, autoscaler = Door(queue_port), Door(vast_port)
        async with queue, autoscaler:
            self.kind = self.kind._replace(url=self.kind.url.replace(f":{queue_port}", f":{queue.port}"))
            url = url.replace(f":{vast_port}", f":{autoscaler.port}")
            async with self.dispatch(url) as process:
                await self.until_connected(process)
                await self.put(jobs, share)
                await self.until(lambda: self.opened() > 0, "a first claim")
                for begins in (queue.silence, queue.talk_nonsense, queue.cut):
                    async with self.trouble("queue_unreadable", begins, queue.mend):
                        await self.put(jobs, share)
                        await asyncio.sleep(TROUBLE_SECONDS)
                async with self.trouble("autoscaler_unreachable", autoscaler.cut, autoscaler.mend, asks=True):
                    await self.put(jobs, share)
                    await asyncio.sleep(self.down)
                disk = Disk(process.pid)
                async with self.trouble("ledger_unwritable", disk.fill, disk.clear):
                    await self.put(jobs, share)
                    await asyncio.sleep(TROUBLE_SECONDS)
                await self.stop(process)
            await self.reach_a_limit(jobs, url)
            async with self.dispatch(url) as process:
                while await self.left() or self.ask("SELECT count(*) FROM open_claims"):
                    await asyncio.sleep(0.5)
                await self.stop(process)
        self.check_lines()

    @contextlib.asynccontextmanager
    async def trouble(
        self,
        event: str,
        begin: Callable[[], Awaitable[None]],
        end: Callable[[], Awaitable[None]],
        *,
        asks: bool = False,
    ) -> AsyncIterator[None]:
        """Nothing is opened from the line about it until it ends; with `asks`, claims may wait and are not granted."""
        self.expected[event] += 1
        await begin()
        await self.until(lambda: self.told(event) == self.expected[event], f"{event} after {begin.__name__}")
        before = self.granted() if asks else self.opened()
        yield
        during = (self.granted() if asks else self.opened()) - before
        if during:
            self.faults.append(f"{during} were {'granted' if asks else 'opened'} during {begin.__name__}")
        await end()
        await self.until(lambda: self.told(f"{event}_over") == self.expected[event], f"{event}_over")
        await self.until(lambda: self.granted() > before, f"another hold after {begin.__name__}")
        print(f"{begin.__name__:16}{event}: {during} opened meanwhile, {self.opened()} so far", flush=True)

    async def reach_a_limit(self, jobs: list[dict[str, object]], url: str) -> None:
        """The rest of the jobs, for more hours than may be used."""
        limit = self.hours() + HOURS_LEFT
        self.expected["limit_reached"] += 1
        async with self.dispatch(url, "--max-hours-per-day", str(limit)) as process:
            await self.put(jobs, len(jobs))
            await self.until(lambda: self.told("limit_reached") == 1, "limit_reached")
            before = self.opened()
            await asyncio.sleep(TROUBLE_SECONDS)
            if self.opened() > before:
                self.faults.append(f"{self.opened() - before} were opened beyond the limit")
            if (used := self.hours()) > limit:
                self.faults.append(f"{used} hours were used, of {limit}")
            print(f"{'a limit':16}limit_reached: {used * 3600:.0f} s used of {limit * 3600:.0f}", flush=True)
            await self.stop(process)

    def check_lines(self) -> None:
        """Each trouble was told once when it began and once when it was over, but for a limit, which is still there."""
        for event in TROUBLES:
            told, over = self.told(event), self.told(f"{event}_over")
            if told != self.expected[event] or over != self.expected[event] * (event != "limit_reached"):
                self.faults.append(f"{event} was told {told} times, and {over} times that it is over")

    def told(self, event: str) -> int:
        return (self.folder / "dispatch.log").read_text().count(f'"event": "{event}"')

    def opened(self) -> int:
        return int(self.ask("SELECT count(*) FROM claims"))

    def granted(self) -> int:
        return int(self.ask("SELECT count(*) FROM claims WHERE session_id IS NOT NULL"))

    def hours(self) -> float:
        return float(self.ask("SELECT total(held_seconds) / 3600 FROM claims"))

    def ask(self, query: str) -> Any:
        return ledger(self.folder, query)[0][0]

    async def until(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TOLD_SECONDS
        while not true():
            if time.monotonic() > end:
                self.faults.append(f"not seen within {TOLD_SECONDS:g} s: {what}")
                return
            await asyncio.sleep(0.1)

    async def stop(self, process: asyncio.subprocess.Process) -> None:
        process.terminate()
        if await process.wait():
            self.faults.append(f"SIGTERM ended the dispatcher with {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", choices=QUEUES, default="redis")
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--down", type=float, default=600.0, help="seconds that the autoscaler is away")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the files also when nothing is wrong")
    report(Outages, parser)


if __name__ == "__main__":
    main()
