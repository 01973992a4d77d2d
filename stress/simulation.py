"""The simulation: whole histories of a worker from one seed, with users, crashes and faults, and an audit at the end.

    python -m stress.simulation --seed 7 --steps 100000

A failing seed is printed and replays exactly. simulated_process.py has the worker and what must be so at any moment,
simulated_troubles.py what befalls it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from stress import audit
from stress.simulated_troubles import Troubles, World
from stress.simulated_world import Disk, Machine, SimulatedLoop

#: Seconds between two lines about the progress.
PROGRESS_SECONDS = 10.0


class Simulation(Troubles):
    """One history."""

    def __init__(self, seed: int, steps: int, folder: Path, loop: SimulatedLoop) -> None:
        random = Random(seed)
        self.world = World.of(random)
        disk = Disk(folder, random, loop, sync=self.world.sync)
        super().__init__(random, Machine(folder, loop), disk, loop)
        self.sessions, self.hanging = self.world.sessions, self.world.hanging
        self.steps = steps

    async def run(self) -> Counter[str]:
        """Live through it, then check the accounts."""
        self.loop.set_exception_handler(self.heard_of)
        self.start()
        chaos = asyncio.ensure_future(self.chaos())
        for number in range(1, self.steps + 1):
            await asyncio.sleep(self.random.expovariate(1 / self.world.pace))
            if chaos.done():
                chaos.result()
            assert not self.problems, self.problems[0]
            if self.up is not None:
                self.nothing_is_late(self.up)
                self.up.connect(asyncio.ensure_future(self.client(self.up, number)))
        self.over = True
        await chaos  # a stop or a kill that is under way comes to its end
        await self.calm_down()
        self.check()
        self.figures["reservations"] = len(self.logged)
        return self.figures

    def heard_of(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What fails in a timer, or in a task that nobody waits for, fails here."""
        self.problems.append(str(context.get("exception") or context["message"]))

    # -- the accounts --------------------------------------------------------------------------------------------

    async def calm_down(self) -> None:
        """No more trouble: everything that is owed must arrive now."""
        self.disk.mends()
        self.autoscaler.weather()
        self.owners.trouble_rate, self.owners.patient = 0.0, True
        if self.up is None:
            self.start()
        assert self.up is not None
        self.up.service.readiness.consumer_is_healthy()
        for _ in range(1000):
            await asyncio.sleep(10.0)
            live = list(self.up.service.book.live())
            owed = self.up.log.conn.execute("SELECT count(*) FROM callbacks").fetchone()[0]
            if not (live or self.up.reporter.backlog or owed or self.up.service.unwritten):
                break
        else:
            raise AssertionError(
                f"still owed after hours of calm: {live}, {self.up.reporter.backlog} outcomes, {owed} callbacks"
            )
        await asyncio.sleep(20.0)  # the last status
        await self.up.end()
        self.events = self.rows()
        self.settled = {seq for (seq,) in self.up.log.conn.execute("SELECT seq FROM settled WHERE outcome = 'refused'")}
        assert self.up.log.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        self.up.log.close()

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
            # else a cursor may stand behind what arrived
            if not (self.world.harm or (self.world.power_cuts and self.world.sync == "normal")):
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
            simulation.machine.install()
            try:
                return loop.run_until_complete(simulation.run())
            finally:
                loop.end()
                simulation.disk.log.close()
                simulation.machine.remove()
                simulation.disk.remove()
    finally:
        loop.close()
        logging.disable(logging.NOTSET)


def play(options: argparse.Namespace, total: Counter[str]) -> None:
    """One history after the other; `total` gets the figures of each that has kept all promises."""
    started = told_at = time.monotonic()
    while total["claims"] < options.steps:
        seed, each = options.seed + total["seeds"], min(options.each, options.steps - total["claims"])
        try:
            total += simulate(seed, each)
        except AssertionError:
            print(f"\nseed {seed} breaks a promise: --seed {seed} --steps {each} --each {each}", file=sys.stderr)
            raise
        gc.collect()
        total["claims"] += each
        total["seeds"] += 1
        now = time.monotonic()
        if options.seconds is not None and now - started > options.seconds:
            break
        if now - told_at >= PROGRESS_SECONDS and not options.json:
            told_at = now
            rate = total["claims"] / (now - started)
            left = (options.steps - total["claims"]) / rate / 60
            line = f"{total['seeds']} seeds, {total['claims']} claims, {rate:.0f} a second, {left:.0f} minutes to go"
            print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def tell(figures: dict[str, int], *, as_json: bool) -> None:
    """Print the figures of these seeds."""
    if as_json:
        print(json.dumps(figures), flush=True)
        return
    rate = figures.get("reservations", 0) / max(figures["cpu_seconds"], 1)
    print(f"\nseeds {figures['first_seed']} to {figures['last_seed']}: {rate:.0f} reservations a second of CPU")
    for name, count in sorted(figures.items()):
        print(f"  {name.replace('_', ' '):<28}{count:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--steps", type=int, default=100_000, help="claims in all")
    parser.add_argument("--each", type=int, default=1_000, help="claims of one seed")
    parser.add_argument("--seconds", type=float, help="end after this time, whatever is left")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end, and no progress")
    options = parser.parse_args()
    gc.disable()  # a fifth of the time: a history leaves its garbage in one piece, at its end
    started, cpu, total = time.monotonic(), time.process_time(), Counter[str]()
    try:
        play(options, total)
    finally:  # also of what came before a seed that fails, or Ctrl-C
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        seeds = {"first_seed": options.seed, "last_seed": options.seed + total["seeds"] - 1}
        tell({**seeds, "seconds": round(seconds), "cpu_seconds": round(cpu), **total}, as_json=options.json)


if __name__ == "__main__":
    main()
