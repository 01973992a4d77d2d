"""A simulated world for the worker in one thread: time, disk, network, autoscaler and session owners, from one seed.

As in the simulations of FoundationDB and TigerBeetle, the code under test is real (service, log, reporter and callbacks
on a real SQLite file) and everything it touches is simulated, except HTTP. Time jumps to the next timer, so an hour
takes milliseconds, and the same seed gives the same history.
"""

from __future__ import annotations

import asyncio
import selectors
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from nullworker.autoscaler.connection import AutoscalerClient, Delivery
from nullworker.autoscaler.messages import OUTCOMES_PATH, STATUS_PATH
from nullworker.clock import Anchor
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log

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
        return None if self._wall == self._offset else Anchor("simulated", self._wall)

    def follow(self, anchor: Anchor) -> None:
        self._offset = anchor.offset

    @property
    def anchor(self) -> Anchor:
        return Anchor("simulated", self._offset)

    def restarted(self, stored: Anchor | None) -> None:
        """A new process: it goes on with the stored anchor, or takes the wall clock."""
        self._offset = self._wall if stored is None else stored.offset


class Disk:
    """Where the log is. It can fail any write while `broken`, and forget what was not synced when the power is cut.

    With sync "full" each commit is synced. With "normal" a commit is safe only once `sync` has come by.
    """

    def __init__(self, folder: Path, random: Random, *, sync: str) -> None:
        self.folder = folder
        self.sync_mode = sync
        self.broken = 0.0  # the probability that a write fails
        self._random = random
        self._path = folder / "log.db"
        self._safe = folder / "safe"
        self.log: EventLog

    def open(self) -> EventLog:
        self.log = open_log(self._path, sync=self.sync_mode)
        self.log.conn = _FaultyConnection(self.log.conn, self)  # type: ignore[assignment]
        if self.sync_mode == "normal" and not self._safe.exists():
            self.sync()
        return self.log

    def crash(self, *, power_cut: bool) -> int:
        """The process is gone. Returns how many events are gone with the power; they were committed."""
        before = self.log.last_seq
        if not (power_cut and self.sync_mode == "normal"):
            self.log.close()
            return 0
        self.log.close()
        for suffix in ("", "-wal", "-shm", ".lock"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        shutil.copy(self._safe, self._path)
        conn = sqlite3.connect(self._path)
        left: int = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        conn.close()
        return before - left

    def sync(self) -> None:
        """What was written so far survives a power cut."""
        if self.sync_mode == "normal":
            safe = sqlite3.connect(self._safe)
            with safe:
                self.log.conn.backup(safe)
            safe.close()

    def fails(self) -> bool:
        return self.broken > 0 and self._random.random() < self.broken


class _FaultyConnection:
    """A SQLite connection whose writes and commits may fail, before anything is done."""

    def __init__(self, conn: sqlite3.Connection, disk: Disk) -> None:
        self._conn = conn
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self._disk.fails():
            raise sqlite3.OperationalError("database or disk is full")
        return self._conn.execute(statement, *values)

    def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
        if self._disk.fails():
            raise sqlite3.OperationalError("disk I/O error")
        return self._conn.executemany(statement, rows)


class Autoscaler(AutoscalerClient):
    """The autoscaler behind a network: down, slow, refusing, or taking a message without its answer arriving.

    Attributes:
        heard: request_idx of the outcomes that arrived, in order of first arrival, and how each ended.
        served, rejected: sums of the figures in all reports that arrived.
        contradicted: request_idx that arrived with two different ends.
        doubled: the part of those sums that the worker cannot know to have arrived, so may send again.
    """

    def __init__(self, random: Random, *, perf: float) -> None:
        super().__init__(["simulated"])
        self.heard: dict[int, str] = {}
        self.served = self.rejected = 0.0
        self.doubled: Counter[str] = Counter()
        self.contradicted: set[int] = set()
        self.trouble_rate = 0.0
        self.poison: set[int] = set()
        self._perf = perf
        self._random = random

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = 10.0) -> Delivery:
        fate = self._random.random() / self.trouble_rate if self.trouble_rate else 2.0
        self.trouble = None
        if fate < 0.4:  # down at once, or after the time-out
            await asyncio.sleep(seconds if fate < 0.1 else 0.01)
            self.trouble = "down"
            return "failed"
        await asyncio.sleep(self._random.uniform(0.001, 3.0 if fate < 0.7 else 0.02))
        if path == OUTCOMES_PATH and any(each["request_idx"] in self.poison for each in body["requests"]):
            self.trouble = "it answered 400"
            return "refused"
        lost = 0.7 <= fate < 1.0
        self._take(path, body)  # until the worker knows: a crash in between sends it again
        if lost:
            await asyncio.sleep(seconds)
            self.trouble = "no answer"
            return "failed"
        self._settle(path, body)
        return "ok"

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
