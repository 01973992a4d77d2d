"""A simulated world for the worker in one thread: time, disk, network, autoscaler and session owners, from one seed.

As in the simulations of FoundationDB and TigerBeetle, the code under test is real (service, log, reporter and callbacks
on a real SQLite file) and everything it touches is simulated, except HTTP. Time jumps to the next timer, so an hour
takes milliseconds, and the same seed gives the same history.
"""

from __future__ import annotations

import asyncio
import selectors
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from nullworker import clock
from nullworker.autoscaler.connection import AutoscalerClient, Delivery
from nullworker.autoscaler.messages import OUTCOMES_PATH, STATUS_PATH
from nullworker.clock import Anchor, boot_id
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from stress.faulty_disk import FaultyDisk

#: Epoch seconds at which every simulation begins.
BEGINNING = 1_800_000_000.0


class _NeverWaits(selectors.SelectSelector):
    """Instead of waiting, time moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.skip: Callable[[float], None] = lambda seconds: None

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everybody waits and no timer is set: the simulation is stuck")
        self.skip(timeout)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when nobody has anything to do."""

    def __init__(self) -> None:
        self._now = 0.0
        selector = _NeverWaits()
        super().__init__(selector)
        selector.skip = self.skip
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def skip(self, seconds: float) -> None:
        """Let time pass."""
        self._now += max(seconds, 0.0)


class SimulatedClock:
    """The worker's clock over the loop's time; `step_wall` sets the wall clock, as nullworker.clock knows it."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._wall = self._offset = BEGINNING

    def now(self) -> float:
        return self._offset + self._loop.time()

    def step_wall(self, seconds: float) -> None:
        self._wall += seconds

    def moved(self) -> Anchor | None:
        return None if self._wall == self._offset else Anchor(boot_id(), self._wall)

    def follow(self, anchor: Anchor) -> None:
        self._offset = anchor.offset

    @property
    def anchor(self) -> Anchor:
        return Anchor(boot_id(), self._offset)

    def restarted(self, stored: Anchor | None, *, not_before: float) -> None:
        """A new process: it goes on with the stored anchor, or takes the wall clock, as SystemClock does."""
        same_boot = stored is not None and stored.boot_id == boot_id()
        self._offset = stored.offset if stored is not None and same_boot else self._wall
        self._offset = max(self._offset, not_before - self._loop.time())


class Disk:
    """Where the log is: a disk that fails while `broken`, and that has only what was synced when the power is cut.

    With sync "full" each commit is synced. With "normal" a commit is safe only once SQLite has come by.
    """

    def __init__(self, folder: Path, random: Random, *, sync: str) -> None:
        self.sync_mode = sync
        self.path = folder / "log.db"
        self.log: EventLog
        self._random = random
        self._boots = 0
        self._boot_id = folder / "boot_id"
        self._faulty = FaultyDisk(folder, random)
        self._real_boot_id = clock._BOOT_ID

    def install(self) -> None:
        """This is the machine from now on, until `remove`."""
        self._faulty.install()
        clock._BOOT_ID = self._boot_id
        self._boot()

    def remove(self) -> None:
        """The real machine again."""
        self._faulty.remove()
        clock._BOOT_ID = self._real_boot_id

    def breaks(self, kind: str | None = None, rate: float | None = None) -> None:
        """From now on writes ("full") or syncs ("deaf") fail, some or all."""
        rate = rate or self._random.choice((0.2, 1.0))
        kind = kind or self._random.choice(("full", "deaf", "both"))
        self._faulty.full = rate if kind != "deaf" else 0.0
        self._faulty.deaf = rate if kind != "full" else 0.0

    def mends(self) -> None:
        """All is well again."""
        self._faulty.full = self._faulty.deaf = 0.0

    def open(self) -> EventLog:
        self.log = open_log(self.path, sync=self.sync_mode)
        return self.log

    def crash(self, *, power_cut: bool) -> int:
        """The process is gone. Returns how many events are gone with the power; they were committed."""
        before = self.log.last_seq
        self._faulty.kill()
        self.log.close()
        if power_cut:
            self._faulty.cut()
            self._boot()
        self._faulty.start()
        self.mends()
        left = max((seq for (seq,) in self.ask("SELECT seq FROM events")), default=0)
        return max(before - left, 0)

    def harm(self) -> bool:
        """What no kill does to a -wal: it is removed, cut, or a bit of it is flipped. Whether there was one."""
        wal = Path(f"{self.path}-wal")
        content = bytearray(wal.read_bytes() if wal.exists() else b"")
        if not content:
            return False
        self._faulty.forget()
        kind = self._random.choice(("removed", "cut", "flipped"))
        if kind == "removed":
            wal.unlink()
        elif kind == "cut":
            wal.write_bytes(content[: self._random.randrange(len(content))])
        else:
            content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            wal.write_bytes(content)
        return True

    def set_aside(self) -> bool:
        """Whether a start has set the log aside since this was asked."""
        found = list(self.path.parent.glob("log.db.damaged-*"))
        for file in found:
            file.unlink()
        return bool(found)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log, as a shell would that may not write."""
        conn = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        try:
            return conn.execute(query).fetchall()
        finally:
            conn.close()

    def _boot(self) -> None:
        self._boots += 1
        self._boot_id.write_text(f"boot-{self._boots}")


class Autoscaler(AutoscalerClient):
    """The autoscaler at two addresses, behind a network: down, slow, or taking a message without its answer arriving.

    Attributes:
        heard: request_idx of the outcomes that arrived, in order of first arrival, and how each ended.
        served, rejected: sums of the figures in all reports that arrived.
        modes: by address: up, down, hangs, refuses (whatever comes).
        contradicted: request_idx that arrived with two different ends.
        doubled: the part of those sums that the worker cannot know to have arrived, so may send again.
    """

    def __init__(self, random: Random, *, perf: float) -> None:
        super().__init__(["http://a", "http://b"])
        self.modes: dict[str, str] = {}
        self.heard: dict[int, str] = {}
        self.served = self.rejected = 0.0
        self.doubled: Counter[str] = Counter()
        self.contradicted: set[int] = set()
        self.trouble_rate = 0.0
        self.poison: set[int] = set()
        self._perf = perf
        self._random = random

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = 10.0) -> Delivery:
        async def post(address: str) -> tuple[Delivery | None, str | None]:
            return await asyncio.wait_for(self._arrive(address, path, body), seconds)

        deliveries, self.trouble = await self._ask(post, path)
        if self.trouble is None:
            self._settle(path, body)
            return "ok"
        return "refused" if all(delivery == "refused" for delivery in deliveries) else "failed"

    async def _arrive(self, address: str, path: str, body: dict[str, Any]) -> tuple[Delivery, str | None]:
        mode = self.modes.get(address, "up")
        if mode == "hangs":
            await asyncio.sleep(1e6)
        if mode == "refuses":
            return "refused", "answered 400"
        fate = self._random.random() / self.trouble_rate if self.trouble_rate else 2.0
        if mode == "down" or fate < 0.4:  # down at once, or after the time-out
            await asyncio.sleep(20.0 if fate < 0.1 else 0.01)
            return "failed", "is down"
        await asyncio.sleep(self._random.uniform(0.001, 3.0 if fate < 0.7 else 0.02))
        if path == OUTCOMES_PATH and any(each["request_idx"] in self.poison for each in body["requests"]):
            return "refused", "answered 400"
        self._take(path, body)  # until the worker knows: a crash in between sends it again
        if 0.7 <= fate < 1.0:
            await asyncio.sleep(1e6)
        return "ok", None

    def _take(self, path: str, body: dict[str, Any]) -> None:
        if path == STATUS_PATH:
            served, rejected = body["cur_perf"] / self._perf, body["rej_load"] / self._perf
            self.served += served
            self.rejected += rejected
            self.doubled.update(served=int(served), rejected=int(rejected))
            return
        for each in body["requests"]:
            index, status = each["request_idx"], each["status"]
            if self.heard.setdefault(index, status) != status:
                self.contradicted.add(index)

    def _settle(self, path: str, body: dict[str, Any]) -> None:
        if path == STATUS_PATH:
            self.doubled["served"] -= int(body["cur_perf"] / self._perf)
            self.doubled["rejected"] -= int(body["rej_load"] / self._perf)


class Owners:
    """Those to whom the ends of sessions are posted. Attributes: `told`, session ids and how often."""

    def __init__(self, random: Random) -> None:
        self.told: Counter[str] = Counter()
        self.trouble_rate = 0.0
        self._random = random

    async def __call__(self, route: str, body: dict[str, Any]) -> str | None:
        await asyncio.sleep(self._random.uniform(0.001, 0.2))
        if self._random.random() < self.trouble_rate:
            if self._random.random() < 0.3:
                self.told[body["session_id"]] += 1  # taken, but the answer is lost
            return "down"
        self.told[body["session_id"]] += 1
        return None
