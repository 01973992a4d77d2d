"""The simulated machine of a worker, in one thread and from one seed: time and disk.

As in the simulations of FoundationDB and TigerBeetle, the code under test is real (service, log, reporter, callbacks,
clock; on a real SQLite file) and everything it touches is simulated, except HTTP. Time jumps to the next timer, so an
hour takes milliseconds, and the same seed gives the same history.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from nullworker import clock
from nullworker.clock import Anchor
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

    def end(self) -> None:
        """Cancel what is left when a history has broken off."""
        self.set_exception_handler(lambda *_: None)
        if tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks))


class SimulatedClock:
    """A worker's clock over the loop's time, where nobody sets the wall clock and nothing restarts."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return BEGINNING + self._loop.time()

    def moved(self) -> Anchor | None:
        return None

    def follow(self, anchor: Anchor) -> None:
        raise NotImplementedError


class Machine:
    """What nullworker.clock reads, over the loop's time: the module `time`, and the file with the boot id."""

    def __init__(self, folder: Path, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._wall = BEGINNING
        self._booted_at = 0.0
        self._boots = 0
        self._boot_id = folder / "boot_id"
        self._real = vars(clock)["time"], clock._BOOT_ID
        self.boot()

    def time(self) -> float:
        return self._wall + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time() - self._booted_at

    def step_wall(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._wall += seconds

    def boot(self) -> None:
        """The machine begins anew."""
        self._boots += 1
        self._boot_id.write_text(f"boot-{self._boots}")
        self._booted_at = self._loop.time()

    def install(self) -> None:
        """This is the machine from now on, until `remove`."""
        vars(clock)["time"], clock._BOOT_ID = self, self._boot_id

    def remove(self) -> None:
        """The real machine again."""
        vars(clock)["time"], clock._BOOT_ID = self._real


class Disk:
    """Where the log is: a disk that fails while `broken`, and that has only what was synced when the power is cut.

    With sync "full" each commit is synced. With "normal" a commit is safe only once SQLite has come by.

    Attributes:
        whole_since: since when nothing has been in the way of a write, in the loop's time; None: something is.
        only_locked: all that is in the way is somebody's lock, for a moment.
    """

    def __init__(self, folder: Path, random: Random, loop: SimulatedLoop, *, sync: str) -> None:
        self.sync_mode = sync
        self.path = folder / "log.db"
        self.log: EventLog
        self.whole_since: float | None = 0.0
        self.only_locked = False
        self._loop = loop
        self._random = random
        self._faulty = FaultyDisk(folder, random)

    def install(self) -> None:
        """SQLite is on this disk from now on, until `remove`."""
        self._faulty.install()

    def remove(self) -> None:
        """The real disk again."""
        self._faulty.remove()

    def breaks(self, kind: str | None = None, rate: float | None = None) -> None:
        """From now on writes ("full") or syncs ("deaf") fail, some or all."""
        rate = rate or self._random.choice((0.2, 1.0))
        kind = kind or self._random.choice(("full", "deaf", "both"))
        self._faulty.full = rate if kind != "deaf" else 0.0
        self._faulty.deaf = rate if kind != "full" else 0.0
        self.whole_since, self.only_locked = None, False

    def mends(self) -> None:
        """All is well again."""
        self._faulty.full = self._faulty.deaf = 0.0
        if self.whole_since is None:
            self.whole_since = self._loop.time()

    def open(self) -> EventLog:
        self.log = open_log(self.path, sync=self.sync_mode)
        self.log.conn.execute("PRAGMA busy_timeout = 0")  # nobody could end his lock while this thread waits for it
        return self.log

    def crash(self, *, power_cut: bool) -> int:
        """The process is gone. Returns how many events are gone with the power; they were committed."""
        before = self.log.last_seq
        self._faulty.kill()
        self.log.close()
        if power_cut:
            self._faulty.cut()
        self._faulty.start()
        self.mends()
        left = max((seq for (seq,) in self.ask("SELECT seq FROM events")), default=0)
        return max(before - left, 0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Another program has the lock to write."""
        conn = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        try:
            conn.execute("BEGIN IMMEDIATE")
            if self.whole_since is not None and self.whole_since < self._loop.time() - 1.0:
                self.only_locked = True  # else the worker may not know yet that it is whole again
            self.whole_since = None
            yield
        finally:
            conn.close()
            self.only_locked = False
            self.mends()

    def shell(self, *, hold: str) -> None:
        """Somebody tries to hold a second reservation, and to change the first, from a sqlite3 shell."""
        conn = sqlite3.connect(self.path, isolation_level=None, timeout=0)
        (seq,) = conn.execute("SELECT max(seq) FROM events").fetchone()
        insert = "INSERT {} INTO events VALUES ({}, 0.0, ?, 'held', NULL, '{{}}')"
        try:
            conn.execute(f"PRAGMA recursive_triggers = {self._random.randrange(2)}")
            for clause in ("", "OR REPLACE", "OR IGNORE", "OR FAIL", "OR ROLLBACK"):
                for statement in (insert.format(clause, seq + 1), insert.format(clause, seq)):
                    with contextlib.suppress(sqlite3.IntegrityError):
                        conn.execute(statement, (hold,))
                        raise AssertionError(f"a shell may say: {statement}")
        finally:
            conn.close()

    def loses_its_wal(self) -> None:
        """Somebody removes the -wal of a worker that runs."""
        self._faulty.unlink(Path(f"{self.path}-wal"))

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
