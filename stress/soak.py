"""The soak test: runs a worker under mixed load for hours, and checks that nothing grows and nothing is lost.

A real process, a fake autoscaler with outages, a consumer whose health flaps; honest callers beside forged, broken and
endless requests, readers of /events, scrapers and commands; SIGTERM and SIGKILL in turn. The last process gets half of
the time, so that a slow leak can show.

    python -m stress.soak --minutes 60 [--seed 1] [--json]

Prints the figures; on a failed check the exit code is 1, each is printed as a sentence, and the folder with the log is
kept. The soak itself uses about 2 kB for each claim, for the audit at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from stress import audit, soak_figures, soak_report
from stress.crash_load import LOST, Ledger
from stress.soak_figures import Life, Sample
from stress.soak_guests import Guests
from stress.soak_load import Honest
from stress.soak_report import Result
from stress.soak_weather import Weather
from stress.soak_worker import Ear, Watched

#: Seconds of a life, about, but for the last.
LIFE_SECONDS = 300.0
#: Seconds for a worker to be ready, and for the last one to deliver all that is owed.
READY_SECONDS, DELIVERY_SECONDS = 30.0, 60.0
#: Seconds for the descriptors to come back to what they were.
SETTLE_SECONDS = 20.0
SAID_SECONDS = 10.0
STALLED_SECONDS = 1.0
#: Seconds after a life's time for the samples that are still missing.
LOOKS_SECONDS = 60.0
#: Samples of a life at least: a start may be slow on a busy machine.
FEWEST_SAMPLES = 5


class Soak:
    """One run in a folder."""

    def __init__(self, folder: Path, vast: Ear, weather: Weather, rng: random.Random, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self.ledger = Ledger()
        self.lives: list[Life] = []
        self.idle_fds = self.last_fds = 0.0
        self.vast, self.weather = vast, weather
        self.worker = Watched(folder, rng, vast.url, weather.health_url)
        pause = min(max(seconds / 20, 2.0), 30.0)
        self.load = Honest(self.worker, vast, self.ledger, random.Random(rng.random()))
        self.guests = Guests(
            self.worker,
            vast,
            self.ledger,
            random.Random(rng.random()),
            pause,
            self.counts,
            lambda: weather.key_in_doubt,
        )
        self.problems: list[str] = []
        self._rng, self._seconds = rng, seconds
        self._every = min(max(seconds / 100, 0.5), 5.0)

    async def go(self) -> None:
        """The whole of it.

        Raises:
            RuntimeError, TimeoutError, asyncio.TimeoutError: a worker does not start, or does not finish.
        """
        self._began = self._said = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as self._http:
            await self._start()
            await asyncio.sleep(1.0)  # the first reports
            self.idle_fds = float(self._process.num_fds())
            users = asyncio.ensure_future(self.load.run())
            others = [asyncio.ensure_future(each) for each in (self.guests.run(), self.weather.run())]
            try:
                for ended_by, over in plan(self._seconds, self._rng):
                    await self._live(over, [users, *others])
                    if ended_by == "the end":
                        break
                    await self._end(ended_by)
                    await self._start()
                others[1].cancel()
                self.weather.clear()
                self.load.over.set()
                await asyncio.wait_for(users, DELIVERY_SECONDS)
                await self._until(self._delivered, DELIVERY_SECONDS, "to deliver all that is owed")
                others[0].cancel()
                await asyncio.wait(others)
                with contextlib.suppress(TimeoutError):
                    await self._until(self._settled, SETTLE_SECONDS, "to close its connections")
                await self._end("SIGTERM at the end")
            finally:
                for task in (users, *others):
                    task.cancel()
                await asyncio.wait([users, *others])
                await self.worker.kill()

    # -- lives ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await self.worker.spawn()
        self._process = psutil.Process(self.worker.pid)
        self.lives.append(Life(len(self.lives) + 1, time.time()))
        await self.worker.started()
        await self._until(self._ready, READY_SECONDS, "to be ready")
        self.lives[-1].ready = time.time()

    async def _live(self, over: float, tasks: list[asyncio.Future[Any]]) -> None:
        """Look at it every now and then, until `over`, in seconds of the whole run, and often enough to judge it."""
        latest = self._began + over + LOOKS_SECONDS
        while time.monotonic() < self._began + over or len(self.lives[-1].samples) < FEWEST_SAMPLES:
            if time.monotonic() > latest:
                raise TimeoutError(f"{len(self.lives[-1].samples)} looks at life {len(self.lives)}, and no more came")
            begun = time.monotonic()
            await asyncio.sleep(self._every)
            late = time.monotonic() - begun - self._every
            if late > STALLED_SECONDS:  # whatever stood still here did so for the worker as well, very likely
                self.counts["seconds in which the soak itself did not run"] += round(late)
            for task in tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("a part of the load has ended by itself")
            if self.worker.dead:
                raise RuntimeError(f"the worker has ended by itself: {self.worker.alarms[-3:]}")
            try:
                self._look(await self._status())
            except (*LOST, psutil.Error, asyncio.TimeoutError) as error:
                self.load.lost.append((time.time(), f"a look at the worker failed: {error!r}"))
        self.lives[-1].over = time.time()

    async def _end(self, ended_by: str) -> None:
        life = self.lives[-1]
        life.over, life.ended_by = time.time(), ended_by
        self.counts[f"ended by {ended_by}"] += 1
        if ended_by == "kill -9":
            self.ledger.kills.append(time.time())
            await self.worker.kill()
        elif (code := await self.worker.stop()) != 0:
            self.problems.append(f"life {life.number} was told to stop, and ended with exit code {code}")
        self.vast.life_over()

    def _look(self, status: dict[str, Any]) -> None:
        """One sample, and a line for who waits."""
        memory = self._process.memory_full_info()
        db = self.worker.db
        now = Sample(
            at=time.time(),
            rss=memory.rss / 1e6,
            uss=memory.uss / 1e6,
            fds=self._process.num_fds(),
            threads=self._process.num_threads(),
            wal=os.stat(f"{db}-wal").st_size / 1e6,
            log=db.stat().st_size / 1e6,
            backlog=status["autoscaler"]["backlog"],
            queued=status["queue"]["length"],
        )
        self.lives[-1].samples.append(now)
        if time.monotonic() - self._said > SAID_SECONDS:
            self._said = time.monotonic()
            left = self._seconds - (self._said - self._began)
            print(
                f"{left / 60:6.1f} min left, life {len(self.lives)}: {len(self.ledger.claims)} claims, "
                f"{now.rss:.1f} MB, {now.fds} descriptors, log {now.log:.1f} + {now.wal:.1f} MB, {now.backlog} owed",
                file=sys.stderr,
                flush=True,
            )

    # -- what is waited for --------------------------------------------------------------------------------------

    async def _until(self, true: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            with contextlib.suppress(*LOST):
                if await true():
                    return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"the worker had {seconds:g} s {what}: {self.worker.alarms[-3:]}")

    async def _ready(self) -> bool:
        return bool((await self._status())["state"] == "ready")

    async def _delivered(self) -> bool:
        """Nothing is live or owed, and the reader of /events who stays has read everything."""
        status = await self._status()
        return (
            status["held"] is None
            and status["queue"]["length"] == status["autoscaler"]["backlog"] == 0
            and not audit.callbacks_owed(self.worker.db)
            and self.guests.seq == status["log"]["last_seq"]
        )

    async def _settled(self) -> bool:
        self.last_fds = float(self._process.num_fds())
        return self.last_fds <= self.idle_fds + soak_figures.SPARE_FDS

    async def _status(self) -> dict[str, Any]:
        async with self._http.get(self.worker.control + "/status", headers={"Connection": "close"}) as answer:
            status: dict[str, Any] = await answer.json()
            return status

    # -- the verdict ---------------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        """Everything that is wrong."""
        history = audit.read(self.worker.db)
        ends = {r.request_idx: r for r in history.ends}
        for claim in self.ledger.claims:
            self.counts[f"{claim.kind} {claim.fate} {claim.status or ''}".rstrip()] += 1
            found = ends.get(claim.idx)
            if claim.kind != "request" or claim.fate != "answered" or found is None or found.ended_at is None:
                continue
            life = next((life for life in self.lives if life.begun <= claim.sent <= life.over), self.lives[-1])
            life.latencies.setdefault("claim -> in the log", []).append(found.queued_at - claim.sent)
            life.latencies.setdefault("end -> answer", []).append(claim.answered - found.ended_at)
        for end in history.ends:
            self.counts[f"in the log: {end.kind} {end.state}, {end.reason}"] += 1
        self.counts["callbacks"] = len(self.ledger.callbacks)
        self.counts["outcomes"] = len(self.vast.outcomes)
        self.counts["reports"] = len(self.vast.statuses)
        self.counts["releases by the consumer and by command"] = len(self.ledger.releases)
        return [
            *self.problems,
            *self.guests.problems,
            *soak_figures.unexplained([*self.load.lost, *self.guests.lost], self.lives),
            *(f"not explained: {line}" for line in self.worker.alarms),
            *soak_figures.judge(self.lives, self.idle_fds, self.last_fds),
            *audit.check(history, self.ledger, self.vast, self.vast.sure()),
        ]


def plan(seconds: float, rng: random.Random) -> list[tuple[str, float]]:
    """How the lives end, and when, in seconds of the whole run: one of each kind at least, and a last long one."""
    count = max(2, round(seconds / 2 / LIFE_SECONDS))
    each = seconds / 2 / count
    ends = [(number + 1 + rng.uniform(-0.2, 0.2)) * each for number in range(count)]
    kinds = ["SIGTERM", "kill -9"] if rng.random() < 0.5 else ["kill -9", "SIGTERM"]
    return [*((kinds[number % 2], end) for number, end in enumerate(ends)), ("the end", seconds)]


async def main(minutes: float, seed: int, *, json_wanted: bool) -> int:
    """Run, judge, print. The exit code."""
    folder = Path(tempfile.mkdtemp(prefix="nullworker-soak-"))
    print(f"seed {seed}, {minutes:g} min, {folder}", file=sys.stderr, flush=True)
    rng = random.Random(seed)
    seconds = minutes * 60
    vast = Ear(mtoken="crash")
    async with vast:
        weather_pause = min(max(seconds / 8, 2.0), 60.0)
        counts: Counter[str] = Counter()
        async with Weather(vast, random.Random(rng.random()), weather_pause, counts) as weather:
            soak = Soak(folder, vast, weather, rng, seconds)
            wrong = []
            try:
                await soak.go()
            except (RuntimeError, TimeoutError, asyncio.TimeoutError) as error:
                wrong.append(f"the soak did not come to its end: {error!r}")
        soak.counts += counts
        wrong += soak.verdict()
    result = Result(soak.lives, (soak.idle_fds, soak.last_fds), soak.counts, soak.worker.explained, wrong)
    if json_wanted:
        print(soak_report.as_json(result))
    else:
        print(soak_report.as_text(result))
    for problem in wrong[:50]:
        print(f"WRONG: {problem}", file=sys.stderr)
    if wrong:
        print(f"seed {seed}; the log is kept in {folder}", file=sys.stderr, flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m stress.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the rest on stderr")
    args = parser.parse_args()
    sys.exit(asyncio.run(main(args.minutes, args.seed, json_wanted=args.json)))
