"""Simulates days of a queue against the dispatcher's decision: how many workers are held for each job.

    python -m stress.dispatch_simulation --patterns 1000

Prints the table of docs/dispatch.md: the same arrivals with this project's decision and with the two formulae of KEDA's
ScaledJob (pkg/scaling/executor/scale_jobs.go, commit 023bc3a).
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

from nullworker.dispatch.claims import Claim, Ended, Event
from nullworker.dispatch.core import Core
from nullworker.dispatch.decision import Counts, Open, Policy
from nullworker.dispatch.ledger import Credential, HeldTime, open_ledger
from nullworker.errors import NullworkerError

BEGINNING = 1_800_000_000.0


class Pattern(NamedTuple):
    """One day's work, from a seed."""

    arrivals: tuple[float, ...]
    work: tuple[float, ...]  # seconds of each job
    start: float  # seconds of a cold machine
    grab: float  # seconds until a consumer has looked at the queue
    most: int
    dies: float  # probability that a job's consumer is killed in the middle of it
    known: bool  # whether the queue tells what is in flight

    @classmethod
    def of(cls, seed: int, *, dies: float = 0.0, known: bool = True) -> Pattern:
        random = Random(seed)
        jobs = random.randint(20, 120)
        typical = random.choice([2.0, 10.0, 60.0, 300.0])
        shape = random.choice(["burst", "poisson", "bursts", "growing"])
        rate = random.uniform(0.3, 4.0) / typical
        if shape == "burst":
            arrivals = [0.0] * jobs
        elif shape == "bursts":
            starts = [random.uniform(0, jobs / rate / 3) for _ in range(max(1, jobs // 10))]
            arrivals = [random.choice(starts) + random.random() for _ in range(jobs)]
        else:
            gaps = [random.expovariate(rate * (1 + 3 * n / jobs if shape == "growing" else 1)) for n in range(jobs)]
            arrivals = list(itertools.accumulate(gaps))
        return cls(
            tuple(sorted(arrivals)),
            tuple(random.lognormvariate(math.log(typical), 0.6) for _ in range(jobs)),
            random.choice([0.5, 30.0, 180.0]),
            random.choice([0.05, 0.5, 3.0]),
            random.choice([1, 3, 8, 16]),
            dies,
            known,
        )


class MemoryLedger:
    """For the runs that do not crash."""

    def append(self, events: list[Event], credentials: dict[str, Credential] | None = None) -> None:
        """It is not kept."""

    def probe(self, size: int = 0) -> None:
        """It can be written."""

    def open_claims(self) -> dict[str, Claim]:
        return {}

    def ended_since(self, at: float) -> list[Claim]:
        return []

    def held_time(self, since: float) -> list[HeldTime]:
        return []


class Hold:
    """A worker that is held, and its consumer."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.final: dict[str, Any] | None = None


class World:
    """A queue, machines, consumers, and somebody who decides; time jumps to the next thing that happens."""

    interval = 5.0

    def __init__(self, pattern: Pattern, seed: int, folder: Path | None = None, crashes: float = 0.0) -> None:
        self.pattern, self.random, self.crashes = pattern, Random(seed), crashes
        self.time, self._order = 0.0, itertools.count()
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.waiting: list[int] = []
        self.working: set[int] = set()
        self.dropped: list[int] = []
        self.done: dict[int, float] = {}
        self.warm: list[float] = []  # until when each idle machine is there
        self.holds: dict[str, Hold] = {}  # at workers, or their last words
        self.created: set[str] = set()
        self.opened = self.empty = self.lost = self.most = self.kills = 0
        self.folder = folder
        self.core: Core | None = None
        for number, at in enumerate(pattern.arrivals):
            self.at(at, functools.partial(self.waiting.append, number))

    def at(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (max(time, self.time), next(self._order), do))

    def now(self) -> float:
        return BEGINNING + self.time

    def run(self) -> World:
        self.start()
        while len(self.done) < len(self.pattern.arrivals) or self.holds:
            time, _, do = heapq.heappop(self.agenda)
            assert time < 40 * 86_400, "it is stuck"
            self.time = time
            do()
        return self

    # The machines and their consumers

    def ask(self, key: str) -> None:
        """A worker is asked for; when one is there, it is granted and held, unless the claim has been given up."""
        self.warm = [until for until in self.warm if until > self.time]
        seconds = 0.3 if self.warm else self.pattern.start * self.random.uniform(0.8, 1.5)
        if self.warm:
            self.warm.pop()
        self.at(self.time + seconds, lambda: self.ready(key))

    def ready(self, key: str) -> None:
        if not self.grant(key):
            self.warm.append(self.time + 10.0)
            return
        self.at(self.time + 0.05, lambda: self.hold(key))

    def hold(self, key: str) -> None:
        if key not in self.created:
            self.created.add(key)
            self.holds[key] = Hold(key)
            self.opened += 1
            self.most = max(self.most, sum(hold.final is None for hold in self.holds.values()))
            self.at(self.time + self.pattern.grab, lambda: self.grab(key))
        self.answer(key)

    def grab(self, key: str) -> None:
        if self.dropped or self.waiting:
            job = self.dropped.pop() if self.dropped else self.waiting.pop(0)
        else:
            self.empty += 1
            self.over(key, {"state": "released", "result": {"exit_code": 0}})
            return
        self.working.add(job)
        seconds = self.pattern.work[job]
        if self.random.random() < self.pattern.dies:
            self.lost += 1
            seconds *= self.random.random()
            self.at(self.time + seconds, lambda: self.drop(job))
            self.at(self.time + seconds + 5.0, lambda: self.over(key, {"state": "cancelled"}))
        else:
            self.at(self.time + seconds, lambda: self.finish(job, key))

    def drop(self, job: int) -> None:
        self.working.discard(job)
        self.dropped.append(job)

    def finish(self, job: int, key: str) -> None:
        self.working.discard(job)
        assert job not in self.done, "a job was done twice"
        self.done[job] = self.time
        self.over(key, {"state": "released", "result": {"exit_code": 0}})

    def over(self, key: str, final: dict[str, Any]) -> None:
        self.holds[key].final = final
        self.warm.append(self.time + 10.0)
        self.hear(key)

    # The dispatcher; KEDA's formulae take its place below

    def start(self) -> None:
        ledger: Any = MemoryLedger() if self.folder is None else open_ledger(self.folder / "ledger.db")
        self.ledger = ledger
        if self.folder is not None:
            ledger._conn.execute("PRAGMA synchronous = OFF")  # processes die here, the power stays
        self.core = core = Core(ledger, self, Policy(self.pattern.most, interval=self.interval))
        for claim in list(core.book.claims.values()):
            if self.core is not core:
                return
            if claim.state == "pending":
                core.book.ended(claim.id, "dispatcher_restart")
            elif claim.state == "granted":
                self.at(self.time, functools.partial(self.hold, claim.id))
            else:
                self.hear(claim.id)
        self.at(self.time, self.look)

    def may_crash(self) -> bool:
        """A crash between two steps: the process is gone, and another one starts some seconds later."""
        if self.core is None or self.random.random() >= self.crashes:
            return False
        self.core = None
        self.kills += 1
        self.ledger.close()
        self.at(self.time + self.random.uniform(0, 20), self.start)
        return True

    def counts(self) -> Counts:
        in_flight = len(self.working) + len(self.dropped)
        return Counts(len(self.waiting), in_flight if self.pattern.known else None)

    def look(self) -> None:
        core = self.core
        if core is None:
            return
        open_ = core.snapshot()
        self.at(self.time + self.random.uniform(0.001, 0.5), lambda: self.decide(core, open_))

    def decide(self, core: Core, open_: Open) -> None:
        if core is not self.core:
            return
        step = core.step(self.counts(), open_)
        assert step.trouble is None
        for claim in step.opened:
            if self.may_crash():
                return
            self.ask(claim.id)
        if not self.may_crash():
            self.at(self.time + self.interval, self.look)

    def grant(self, key: str) -> bool:
        if self.core is None or self.core.book.claims.get(key) is None:
            return False
        if self.may_crash():
            return False
        assert self.core is not None
        self.core.book.granted(key, "http://worker", "{}")
        return not self.may_crash()

    def answer(self, key: str) -> None:
        if self.may_crash() or self.core is None or key not in self.core.book.claims:
            return
        self.core.book.held(key, key, 300.0, self.core.counts)
        self.hear(key)

    def hear(self, key: str) -> None:
        """The dispatcher hears of an end a moment later, or after its restart."""
        final = self.holds[key].final if key in self.holds else None
        if final is None or self.core is None or self.may_crash() or self.core is None:
            return
        claim = self.core.book.claims.get(key)
        if claim is not None and claim.state == "held":
            self.core.book.ended(key, "consumer_exit", Ended(final))
            del self.holds[key]


class Keda(World):
    """KEDA's ScaledJob in the dispatcher's place: each Kubernetes Job is one hold, and is never given up.

    `all_of_it`: the queue's length has what is in flight in it, as with RabbitMQ's and SQS's scalers; else only what
    waits, as with the Redis list's.
    """

    interval = 5.0

    def __init__(self, pattern: Pattern, seed: int, *, accurate: bool, all_of_it: bool) -> None:
        super().__init__(pattern, seed)
        self.accurate, self.all_of_it = accurate, all_of_it
        self.jobs: dict[str, bool] = {}  # unfinished ones, and whether each runs

    def start(self) -> None:
        self.at(0.0, self.look)

    def look(self) -> None:
        length = len(self.waiting) + (len(self.working) + len(self.dropped) if self.all_of_it else 0)
        most = self.pattern.most
        scale, running = min(most, length), len(self.jobs)
        pending = sum(not runs for runs in self.jobs.values())
        if not self.accurate:
            new = scale - running
        elif scale + running > most:
            new = most - running
        else:
            new = scale - pending
        for _ in range(max(0, min(new, scale))):
            key = str(next(self._order))
            self.jobs[key] = False
            self.ask(key)
        self.at(self.time + self.interval, self.look)

    def grant(self, key: str) -> bool:
        self.jobs[key] = True
        return True

    def answer(self, key: str) -> None:
        """Nothing is written down."""

    def hear(self, key: str) -> None:
        del self.holds[key], self.jobs[key]


def holds_per_job(world: World) -> float:
    """Holds for each run of a job; a job whose consumer died is run again."""
    return world.opened / (len(world.done) + world.lost)


def waits(world: World) -> list[float]:
    pairs = zip(world.pattern.arrivals, world.pattern.work, strict=True)
    return [world.done[n] - arrival - work for n, (arrival, work) in enumerate(pairs)]


#: Holds for each job that the dispatcher may open at most, as in tests/stress/test_dispatch_simulation.py.
MOST_HOLDS: Final = {"nullworker dispatch, in flight known": 1.02, "nullworker dispatch, in flight unknown": 1.2}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=1000)
    patterns = parser.parse_args().patterns
    kinds: dict[str, Callable[[int], World]] = {
        "nullworker dispatch, in flight known": lambda seed: World(Pattern.of(seed), seed),
        "nullworker dispatch, in flight unknown": lambda seed: World(Pattern.of(seed, known=False), seed),
        "KEDA default, length = waiting": lambda s: Keda(Pattern.of(s), s, accurate=False, all_of_it=False),
        "KEDA default, length = waiting + in flight": lambda s: Keda(Pattern.of(s), s, accurate=False, all_of_it=True),
        "KEDA accurate, length = waiting": lambda s: Keda(Pattern.of(s), s, accurate=True, all_of_it=False),
        "KEDA accurate, length = waiting + in flight": lambda s: Keda(Pattern.of(s), s, accurate=True, all_of_it=True),
    }
    wrong: list[str] = []
    print(f"{patterns} patterns".ljust(46), "holds/job  worst  mean wait s")
    for name, make in kinds.items():
        worlds = []
        for seed in range(patterns):
            try:
                worlds.append(make(seed).run())
            except (NullworkerError, AssertionError) as error:
                wrong.append(f"{name}, seed {seed}: {error}")
        ratio = sum(world.opened for world in worlds) / sum(len(world.done) for world in worlds)
        worst = max(holds_per_job(world) for world in worlds)
        wait = statistics.mean(itertools.chain.from_iterable(waits(world) for world in worlds))
        print(f"{name:<46} {ratio:9.3f} {worst:6.2f} {wait:12.1f}")
        if ratio > MOST_HOLDS.get(name, math.inf):
            wrong.append(f"{name}: {ratio:.3f} holds for a job")
    with tempfile.TemporaryDirectory() as folder:
        opened = runs = kills = 0
        for seed in range(min(patterns, 200)):
            path = Path(folder, str(seed))
            path.mkdir()
            world = World(Pattern.of(seed, dies=0.05), seed, path, crashes=0.03).run()
            world.ledger.close()
            opened, runs, kills = opened + world.opened, runs + len(world.done) + world.lost, kills + world.kills
        print(f"with {kills} crashes and dying consumers: {opened / runs:.3f} holds for each run of a job")
        if opened > 1.10 * runs:
            wrong.append("with crashes: more than 1.10 holds for each run of a job")
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
