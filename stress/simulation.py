"""The simulation: whole histories of a worker from one seed, with users, crashes and faults, and an audit at the end.

    python -m stress.simulation --seed 7 --steps 100000

A failing seed is printed and replays exactly. simulated_world.py has the world.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

from nullworker.autoscaler.messages import Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Limits
from nullworker.readiness import Readiness
from nullworker.service import DeadlineTimer, Service
from nullworker.session_callbacks import Callbacks
from stress import audit
from stress.simulated_users import Users
from stress.simulated_world import Autoscaler, Disk, Owners, SimulatedClock, SimulatedLoop

PERF = 100.0
LIMITS = Limits(max_reservation_seconds=120.0, max_queue_seconds=20.0, max_queued=8)


class World(NamedTuple):
    """Which faults this seed has."""

    sync: str
    power_cuts: bool
    disk_trouble: bool
    network_trouble: bool
    harm: bool  # to the -wal, by somebody

    @classmethod
    def of(cls, random: Random) -> World:
        return cls(
            random.choice(("normal", "full", "full")),
            power_cuts=random.random() < 0.5,
            disk_trouble=random.random() < 0.5,
            network_trouble=random.random() < 0.8,
            harm=random.random() < 0.1,
        )


class Incarnation:
    """One process of the worker, from its start to its death."""

    def __init__(self, simulation: Simulation) -> None:
        self.log = simulation.disk.open()
        simulation.clock.restarted(self.log.anchor(), not_before=self.log.latest())
        with contextlib.suppress(LogUnavailable):
            self.log.store_anchor(simulation.clock.anchor)
        readiness = Readiness()
        self.service = Service(self.log, simulation.clock, LIMITS, readiness, simulation.new_id)
        me = Identity(1, "token", "http://here", PERF)
        self.reporter = Reporter(me, self.service, self.log, simulation.autoscaler, lambda *_: None)
        self.callbacks = Callbacks(self.service, self.log, simulation.owners, lambda _: None)
        self.alarm = DeadlineTimer(self.service)
        self.service.observers += [self.reporter.observe, self.callbacks.observe, simulation.hear]
        readiness.listeners.append(self.reporter.changed)
        simulation.found(self.service)
        self.service.resume()
        self.alarm.set()
        self.service.listening()
        simulation.restarted(self.service)
        self.tasks = [asyncio.ensure_future(self.reporter.run()), asyncio.ensure_future(self.callbacks.run())]
        self.connections: dict[asyncio.Task[None], None] = {}

    async def end(self) -> None:
        """All that ran in the process is gone."""
        self.alarm.stop()
        tasks = [*self.tasks, *self.connections]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


class Simulation(Users):
    """One history."""

    def __init__(self, seed: int, steps: int, folder: Path, loop: SimulatedLoop) -> None:
        self.random = Random(seed)
        self.world = World.of(self.random)
        self.steps = steps
        self.clock = SimulatedClock(loop)
        self.disk = Disk(folder, self.random, sync=self.world.sync)
        self.autoscaler = Autoscaler(self.random, perf=PERF)
        self.owners = Owners(self.random)
        self.loop = loop
        self.answers: dict[str, tuple[str, str | None]] = {}
        self.attached: str | None = None  # to which a consumer was attached when the worker went
        self.before: tuple[str, float | None] | None = None  # what was held when the worker went, and until when
        self.excused: set[str] = set()  # their last events went with the memory or the power
        self.figures: Counter[str] = Counter()
        self.problems: list[str] = []
        self.numbers = 0
        self.previous = "nobody"
        self.up: Incarnation | None = None
        self.over = False

    @property
    def process(self) -> Incarnation | None:
        return self.up

    def new_id(self) -> str:
        self.numbers += 1
        return f"r{self.numbers}"

    async def run(self) -> Counter[str]:
        """Live through it, then check the accounts."""
        self.up = Incarnation(self)
        chaos = asyncio.ensure_future(self.chaos())
        for number in range(1, self.steps + 1):
            await asyncio.sleep(self.random.expovariate(1 / 2.0))
            if self.up is not None:
                self.nothing_is_late(self.up.service)
                task = asyncio.ensure_future(self.client(self.up, number))
                self.up.connections[task] = None
                task.add_done_callback(self.up.connections.pop)
            if chaos.done():
                chaos.result()
        self.over = True
        await chaos  # a stop or a kill that is under way comes to its end
        await self.calm_down()
        self.check()
        self.figures["reservations"] = len(self.logged)
        return self.figures

    def found(self, service: Service) -> None:
        """A start has read the log: what was held when the worker went is held, with the deadline that it had."""
        held, before, self.before = service.book.held, self.before, None
        if before is not None:
            found = None if held is None else (held.id, held.ends_at)
            assert found == before, "what was refused stays refused, what was granted is there"

    def restarted(self, service: Service) -> None:
        """A start has found a session: its deadline is no further away than it was, and its consumer may be dead."""
        held = service.book.held
        if held is None:
            self.attached = None
            return
        ((at, ends_at),) = self.disk.ask(
            "SELECT at, data ->> 'ends_at' FROM events WHERE kind IN ('held', 'extended') ORDER BY seq DESC LIMIT 1"
        )
        assert held.ends_at is not None
        assert held.ends_at - service.now() <= ends_at - at + 0.002, "no deadline is further away than when it was set"
        self.figures["sessions_resumed"] += 1
        if held.id == self.attached:
            if self.random.random() < 0.5:
                self.loop.call_later(self.random.uniform(0.0, 20.0), self.consumer_attaches, service, held.id)
            else:
                self.loop.call_later(31.0, self.dead_consumer_is_noticed, service, held)

    def nothing_is_late(self, service: Service) -> None:
        deadline = service.next_deadline()
        assert deadline is None or self.clock.now() < deadline + 0.01, "the alarm has rung for what is over"

    # -- what befalls it -----------------------------------------------------------------------------------------

    async def chaos(self) -> None:
        """One trouble after the other."""
        troubles = [self.kill, self.kill, self.stop, self.step_wall_clock, self.consumer_dies, self.network]
        if self.world.disk_trouble:
            troubles += [self.disk_breaks, self.disk_mends, self.disk_is_full_while_others_wait]
        if self.world.power_cuts:
            troubles += [self.power_cut]
        if self.world.harm:
            troubles += [self.harm]
        while True:
            await asyncio.sleep(self.random.uniform(1.0, 60.0))
            if self.over:
                return
            await self.random.choice(troubles)()

    async def kill(self, *, power_cut: bool = False, harm: bool = False) -> None:
        """kill -9, and a start some time later."""
        if self.random.random() < 0.6:
            await self.until_a_session_is_held()
        assert self.up is not None
        if self.world.disk_trouble and self.random.random() < 0.4:
            self.sync_fails(self.up)
        down, self.up = self.up, None
        self.figures["power_cuts" if power_cut else "kills"] += 1
        self.excused |= {each.reservation.id for each in down.service.unwritten}
        unsure, held = down.service.log_is_down, down.service.book.held
        await down.end()
        rows = self.rows() if power_cut or harm else []
        lost = self.disk.crash(power_cut=power_cut)
        assert not lost or self.disk.sync_mode == "normal", "what was synced is not lost"
        self.figures["events_lost_with_the_power"] += lost
        if lost:
            self.excused |= {name for _, name, *_ in rows[-lost:]}
        if power_cut and unsure:  # stress/power_cut.py says why nothing can be said of what was refused
            self.excused |= {name for _, name, *_ in self.rows()[-10:]}
        if power_cut:
            self.clock.step_wall(self.random.choice((0.0, 0.0, -28_800.0, 7_200.0)))
        await asyncio.sleep(self.random.choice((0.1, 1.0, 30.0)))
        harmed = harm and self.disk.harm()
        if held is not None and not (lost or harmed or (power_cut and unsure) or down.service.unwritten):
            self.before = held.id, held.ends_at
        self.up = Incarnation(self)
        if self.disk.set_aside():
            assert harmed, "nothing is set aside that is whole"
            self.figures["logs_set_aside"] += 1
            self.excused |= {name for _, name, *_ in rows}
        elif harmed:
            assert len(self.rows()) >= len(rows), "a loss is said"

    async def until_a_session_is_held(self) -> None:
        """What goes on over a restart."""
        for _ in range(100):
            assert self.up is not None
            held = self.up.service.book.held
            if held is not None and held.terms.kind == "session":
                return
            await asyncio.sleep(0.2)

    def sync_fails(self, up: Incarnation) -> None:
        """The last that the worker does before it goes is refused, and whole in the -wal."""
        self.disk.breaks("deaf", 1.0)
        held = up.service.book.held
        if held is not None:
            with contextlib.suppress(LogUnavailable):
                up.service.extend(held.id, self.random.uniform(50.0, 100.0))
            self.figures["refused_at_the_end"] += up.service.log_is_down

    async def disk_is_full_while_others_wait(self) -> None:
        """The held one ends, and nobody is held until there is space again."""
        assert self.up is not None
        self.disk.breaks("full", 1.0)
        held = self.up.service.book.held
        if held is not None and self.up.service.book.queue:
            self.up.service.release(held.id)
            self.figures["waited_for_space"] += 1
        await asyncio.sleep(self.random.uniform(0.5, 5.0))
        self.disk.mends()

    async def harm(self) -> None:
        """Somebody removes or damages the -wal of a worker that was killed."""
        await self.kill(harm=True)

    async def power_cut(self) -> None:
        """Everything that was not synced is gone."""
        await self.kill(power_cut=True)

    async def stop(self) -> None:
        """SIGTERM, as app.py does it."""
        assert self.up is not None
        stopping = self.up
        self.figures["stops"] += 1
        stopping.service.drain("told to")
        held = stopping.service.book.held
        if held is not None and held.terms.kind == "request":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.service.ended(held), 5.0)
        stopping.service.end_drain()
        await asyncio.sleep(0)  # the answers go out
        await asyncio.sleep(0)
        self.up = None
        self.excused |= {each.reservation.id for each in stopping.service.unwritten}
        await stopping.end()
        with contextlib.suppress(sqlite3.Error):
            await stopping.reporter.flush(2.0)
        self.disk.mends()
        stopping.log.close()
        await asyncio.sleep(1.0)
        self.up = Incarnation(self)

    async def step_wall_clock(self) -> None:
        self.clock.step_wall(self.random.choice((-3600.0, -30.0, 30.0, 3600.0)))

    async def consumer_dies(self) -> None:
        assert self.up is not None
        service = self.up.service
        service.consumer_unhealthy("it does not answer", cancel_held=self.random.random() < 0.5)
        await asyncio.sleep(self.random.uniform(0.0, 20.0))
        service.readiness.consumer_is_healthy()

    async def network(self) -> None:
        if self.world.network_trouble:
            self.autoscaler.modes = {"http://a": self.random.choice(("up", "up", "down", "hangs", "refuses"))}
            if self.random.random() < (0.6 if self.autoscaler.modes["http://a"] == "refuses" else 0.3):
                self.autoscaler.modes["http://b"] = self.random.choice(("down", "hangs"))
            self.autoscaler.trouble_rate = self.random.choice((0.0, 0.0, 0.3, 1.0))
            self.owners.trouble_rate = self.random.choice((0.0, 0.5, 1.0))

    async def disk_breaks(self) -> None:
        self.disk.breaks()
        self.figures["disk_failures"] += 1

    async def disk_mends(self) -> None:
        self.disk.mends()

    # -- the accounts --------------------------------------------------------------------------------------------

    async def calm_down(self) -> None:
        """No more trouble: everything that is owed must arrive now."""
        self.disk.mends()
        self.autoscaler.trouble_rate = self.owners.trouble_rate = 0.0
        self.autoscaler.modes.clear()
        if self.up is None:
            self.up = Incarnation(self)
        self.up.service.readiness.consumer_is_healthy()
        for _ in range(1000):
            await asyncio.sleep(10.0)
            live = list(self.up.service.book.live())
            owed = self.up.log.conn.execute("SELECT count(*) FROM callbacks").fetchone()[0]
            if not (live or self.up.reporter.backlog or owed or self.up.service.unwritten):
                break
        else:
            raise AssertionError(
                f"still owed after hours of calm: {self.up.reporter.backlog} outcomes, {owed} callbacks"
            )
        await asyncio.sleep(20.0)  # the last status
        await self.up.end()
        self.events = self.rows()
        self.settled = {seq for (seq,) in self.up.log.conn.execute("SELECT seq FROM settled WHERE outcome = 'refused'")}
        assert self.up.log.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        self.up.log.close()

    def rows(self) -> list[audit.Row]:
        return self.disk.ask("SELECT at, reservation_id, kind, reason, data FROM events ORDER BY seq")

    def check(self) -> None:
        """The log is a legal history, and everybody was told what is in it."""
        history = audit.replay(self.events)
        problems = self.problems + history.problems
        assert not problems, problems[0]
        self.logged = history.reservations
        assert not any(past.open for past in self.logged.values())
        self.check_answers()
        self.check_outcomes(history.ends)
        self.check_figures(history.ends)
        for past in history.ends:
            if past.owner_is_told and past.id not in self.excused:
                assert self.owners.told[past.id] >= 1, f"the owner of {past.id} was not told"

    def check_answers(self) -> None:
        for reservation_id, answer in self.answers.items():
            if reservation_id in self.excused:
                continue
            logged = self.logged[reservation_id]
            assert (logged.state, logged.reason) == answer, f"{reservation_id}: the caller heard {answer}"
        self.figures["answers"] = len(self.answers)

    def check_outcomes(self, ends: list[audit.Past]) -> None:
        owed = dict(audit.outcomes_owed(past for past in ends if past.id not in self.excused))
        poison = self.autoscaler.poison
        assert self.autoscaler.contradicted.isdisjoint(owed), "nobody is told two different ends"
        owed = {index: outcome for index, outcome in owed.items() if index not in poison}
        heard = {index: outcome for index, outcome in self.autoscaler.heard.items() if index in owed}
        assert heard == owed, "every outcome arrives, as it was"
        assert list(heard) == list(owed), "and in order"
        for index in poison & {past.request_idx for past in ends if past.id not in self.excused}:
            assert index not in self.autoscaler.heard
            self.figures["refused_outcomes"] += 1
        assert len(self.settled) >= self.figures["refused_outcomes"], "what is refused for good is kept"

    def check_figures(self, ends: list[audit.Past]) -> None:
        happened = Counter(past.outcome for past in ends)
        for name, outcome, told in (
            ("served", "Success", self.autoscaler.served),
            ("rejected", "Rejected", self.autoscaler.rejected),
        ):
            least = happened[outcome]
            assert told >= least, f"{name}: {told} were reported and {least} happened"
            if not (
                self.world.disk_trouble or self.world.power_cuts or self.world.harm
            ):  # else a cursor may stand behind what arrived
                most = least + self.autoscaler.doubled[name]
                assert told <= most, f"{name}: {told} were reported, and at most {most} are to be explained"
            self.figures[name] = least


def simulate(seed: int, steps: int) -> Counter[str]:
    """One history. Raises AssertionError when a promise is broken."""
    logging.disable(logging.CRITICAL)
    loop = SimulatedLoop()
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            simulation = Simulation(seed, steps, Path(folder), loop)
            simulation.disk.install()
            try:
                return loop.run_until_complete(simulation.run())
            finally:
                simulation.disk.log.close()
                simulation.disk.remove()
    finally:
        loop.close()
        logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--steps", type=int, default=100_000, help="reservations in all")
    parser.add_argument("--each", type=int, default=2_000, help="reservations of one seed")
    options = parser.parse_args()
    started, total = time.monotonic(), Counter[str]()
    seed = options.seed
    while total["reservations"] < options.steps:
        try:
            total += simulate(seed, min(options.each, options.steps))
        except BaseException:
            print(
                f"\nseed {seed} breaks a promise: --seed {seed} --steps {options.each} --each {options.each}",
                flush=True,
            )
            raise
        seconds = time.monotonic() - started
        line = f"seed {seed}: {total['reservations']} reservations in {seconds:.0f} s, {total['kills']} kills"
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
        seed += 1
    seconds = time.monotonic() - started
    print(f"\n{total['reservations'] / seconds * 60:.0f} reservations a minute")
    for name, count in sorted(total.items()):
        print(f"  {name.replace('_', ' '):<28}{count:>9}")


if __name__ == "__main__":
    main()
