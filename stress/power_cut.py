"""Kills and power cuts during the life of a log, on a disk that loses unsynced writes.

    python -m stress.power_cut --cuts 500

The service, on its real log, is used until the machine stops, and started again on what a cut could have left of the
file: any unsynced sector may or may not be there. Then these must hold:

    nothing acknowledged is lost    each committed event is there, unchanged
    nothing refused is true         each event in the log had become true before the cut
    a loss is reported              after the -wal was removed, cut or damaged, all is there or the log is set aside

Between a failed sync and the next successful one, a refused event may or may not be on the disk, whatever is written
over it. No file can avoid that; a kill does not have this problem.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from nullworker.errors import IllegalMove, LogUnavailable
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms, to_row
from nullworker.readiness import Readiness
from nullworker.service import Commit, Service
from nullworker.testing.fakes import FakeClock
from stress.faulty_disk import FaultyDisk

LIMITS = Limits(max_reservation_seconds=60.0, max_queue_seconds=20.0, max_queued=4)
#: Commands between two cuts, at most.
COMMANDS = 40

Row = tuple[object, ...]


class Machine:
    """One worker's log over many cuts.

    Attributes:
        figures: what was done, and what was found.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.figures = Random(seed), Counter[str]()
        self.disk = FaultyDisk(folder, self.random)
        self.clock = FakeClock()
        self._path = folder / "log.db"
        self._lock = Path(f"{self._path}.lock")
        self._log: EventLog
        self._service: Service
        self._committed: list[Row] = []  # these must be there
        self._true: set[Row] = set()  # these may be
        self._unsure = False  # the last sync has failed
        self._numbers = 0

    def run(self, cuts: int) -> Counter[str]:
        """Live through so many cuts.

        Raises:
            AssertionError: a promise is broken.
        """
        self.disk.install()
        try:
            self._start()
            for _ in range(cuts):
                self._live()
                self._cut()
                self._start()
                self._check()
        finally:
            self._log.close()
            self.disk.remove()
        return self.figures

    def _live(self) -> None:
        note = self._lock.read_bytes()
        trouble = self.random.random()
        commands = self.random.randrange(1, COMMANDS)
        for number in range(commands):
            if trouble < 0.6 and number == commands * 2 // 3:
                self.disk.deaf, self.disk.full = (1.0, 0.0) if trouble < 0.3 else (0.5, 0.3)
            if self.random.random() < 0.3:
                note = self._lock.read_bytes()  # the machine writes its cache back now and then
            self._command()
            self._unsure = self._service.log_is_down
            self.figures["commands without a log"] += self._unsure
        self.figures["commands"] += commands
        self._old_note = note

    def _command(self) -> None:
        service, random = self._service, self.random
        self.clock.advance(random.choice((0.0, 0.3, 5.0, 30.0)))
        held = service.book.held
        with contextlib.suppress(LogUnavailable, IllegalMove):
            fate = random.random()
            if fate < 0.4 or held is None:
                session = SessionTerms(30.0, "http://owner/") if random.random() < 0.4 else None
                service.claim(Claim("session" if session else "request", random.choice((0.0, 30.0)), session=session))
            elif fate < 0.6:
                service.extend(held.id, random.uniform(1.0, 60.0))
            elif fate < 0.8:
                service.release(held.id, result="x" * random.choice((1, 5_000)))
            elif fate < 0.9:
                service.tick()
            else:
                self._log.move_cursor("worker_status", self._log.last_seq)

    def _heard(self, commit: Commit) -> None:
        row = (commit.seq, *to_row(commit.event))
        self._true.add(row)
        self._committed.append(row)

    def _cut(self) -> None:
        waiting = {commit.seq for commit in self._service.unwritten}
        self._committed = [row for row in self._committed if row[0] not in waiting]
        self.power = self.random.random() < 0.5
        self.disk.kill()
        self._log.close()
        if self.power:
            self.disk.cut()
            if self.random.random() < 0.5:
                self._lock.write_bytes(self._old_note)  # which is not synced either
        self.disk.full = self.disk.deaf = 0.0
        self.disk.start()
        self.figures["power cuts" if self.power else "kills"] += 1
        self.harmed = self.random.random() < 0.1 and self._harm()

    def _harm(self) -> bool:
        """Something that no kill does to a -wal."""
        wal = Path(f"{self._path}-wal")
        if self.power or not wal.exists() or wal.stat().st_size == 0:
            return False
        self.disk.forget()
        kind = self.random.choice(("removed", "cut", "flipped"))
        self.figures[f"-wal {kind}"] += 1
        content = bytearray(wal.read_bytes())
        if kind == "removed":
            wal.unlink()
        elif kind == "cut":
            wal.write_bytes(content[: self.random.randrange(len(content))])
        else:
            at = self.random.randrange(len(content))
            content[at] ^= 1 << self.random.randrange(8)
            wal.write_bytes(content)
        return True

    def _start(self) -> None:
        self._log = open_log(self._path)
        query = "SELECT seq, at, reservation_id, kind, reason, data FROM events ORDER BY seq"
        self._before = dict.fromkeys(map(tuple, self._log.conn.execute(query)))
        self._service = Service(self._log, self.clock, LIMITS, Readiness(), self._new_id)
        self._service.observers.append(self._heard)

    def _new_id(self) -> str:
        self._numbers += 1
        return f"r{self._numbers}"

    def _check(self) -> None:
        there = self._before
        aside = list(self._path.parent.glob("log.db.damaged-*"))
        if self.harmed and aside:
            self.figures["losses said"] += 1
            assert not there, "a new log begins"
            for path in aside:
                path.unlink()
            self._committed, self._true = [], set()
        assert not list(self._path.parent.glob("log.db.damaged-*")), "nothing is set aside that is whole"
        lost = [row for row in self._committed if row not in there]
        assert not lost, f"{len(lost)} that were committed are lost and nobody says so, such as {lost[0]}"
        if not (self.power and self._unsure):
            refused = [row for row in there if row not in self._true]
            assert not refused, f"{len(refused)} that were refused are true, such as {refused[0]}"
        assert self._log.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        self._committed, self._true = list(there), set(there)
        self._service.resume()
        self.figures["cuts"] += 1
        self.figures["events"] = len(there)


def run(seed: int, cuts: int) -> Counter[str]:
    """One machine. Raises AssertionError when a promise is broken."""
    logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            return Machine(Path(folder), seed).run(cuts)
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--cuts", type=int, default=500, help="in all")
    parser.add_argument("--each", type=int, default=50, help="of one seed")
    options = parser.parse_args()
    total, started = Counter[str](), time.monotonic()
    for seed in range(options.seed, options.seed + max(options.cuts // options.each, 1)):
        try:
            total += run(seed, options.each)
        except BaseException:
            print(f"seed {seed} breaks a promise: --seed {seed} --cuts {options.each}", file=sys.stderr)
            raise
    print(f"{total['cuts']} cuts in {time.monotonic() - started:.0f} s")
    for name, count in sorted(total.items()):
        print(f"  {name:<20}{count:>9}")


if __name__ == "__main__":
    main()
