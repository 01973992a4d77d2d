"""The crash harness: kills a worker with SIGKILL hundreds of times under load, then checks its log for lost events.

A real process (signed grants, a fake autoscaler that is down, slow, late and failing at random) is killed at random
moments, also during its start, and started again at once, while clients reserve, stream, hang up, open, renew and end
sessions, and a consumer releases. Afterwards every answer that a client got is compared with the log.

    python -m stress.crash --kills 300 --seed 1

The seed decides what is done and when, as far as the machine's timing allows. Exit code 1 means that a check failed;
the folder with the log is then kept and named.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

from nullworker.testing import FakeAutoscaler
from nullworker.testing.faults import Call, How
from stress import audit
from stress.crash_load import Ledger, Load
from stress.crash_worker import Worker

#: Seconds that the last worker has to deliver all that is owed.
DELIVERY = 30.0


class Run:
    """One run in a folder. `sure` are the reports that are known to have been acknowledged."""

    def __init__(self, folder: Path, vast: FakeAutoscaler, seed: int) -> None:
        self.rng = random.Random(seed)
        self.vast = vast
        self.ledger = Ledger()
        self.worker = Worker(folder, self.rng, vast.url)
        self.sure: list[dict[str, Any]] = []
        self._reported = 0

    async def go(self, kills: int, seconds: float) -> None:
        """Kill it so many times, or for so long; then let the last one finish and stop it.

        Raises:
            RuntimeError, TimeoutError, asyncio.TimeoutError: it does not start, or does not finish.
        """
        load = Load(self.worker, self.vast, self.ledger, random.Random(self.rng.random()))
        users = asyncio.ensure_future(load.run())
        faults = asyncio.ensure_future(self._faults(random.Random(self.rng.random())))
        try:
            await self._kill(kills, seconds, users)
            faults.cancel()
            self.vast.clear()
            await self.worker.spawn()
            await self.worker.started()
            load.over.set()
            await asyncio.wait_for(users, DELIVERY)
            await asyncio.wait_for(self._delivered(), DELIVERY)
            code = await self.worker.stop()
            if code != 0:
                self.worker.alarms.append(f"the last worker ended with exit code {code}")
            self.sure += self.vast.statuses[self._reported :]
        finally:
            faults.cancel()
            users.cancel()
            await self.worker.kill()

    async def _delivered(self) -> None:
        """All that the log owes has reached the other side, also for claims whose answer was lost."""
        owed = {r.request_idx for r in audit.read(self.worker.db).reservations.values()}
        await self.vast.wait_for(lambda: owed <= {each["request_idx"] for each in self.vast.outcomes}, DELIVERY)
        while audit.callbacks_owed(self.worker.db):  # another process settles them
            await asyncio.sleep(0.1)

    async def _kill(self, kills: int, seconds: float, users: asyncio.Future[None]) -> None:
        begun = said = time.monotonic()
        for number in range(1, kills + 1):
            await self.worker.spawn()
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.uniform(0.0, 0.5))  # perhaps before it listens
            else:
                await self.worker.started()
                await asyncio.sleep(min(self.rng.expovariate(3.0), 1.5))
            self.ledger.kills.append(time.time())
            await self.worker.kill()
            # all but the last report of a life were acknowledged: the next is sent only then
            self.sure += self.vast.statuses[self._reported : -1]
            self._reported = len(self.vast.statuses)
            if users.done():
                users.result()
            if time.monotonic() - begun > seconds:
                break
            if time.monotonic() - said > 5:
                said = time.monotonic()
                answers = sum(claim.fate == "answered" for claim in self.ledger.claims)
                print(f"{number}/{kills} kills, {answers} answers, {said - begun:.0f} s", flush=True)

    async def _faults(self, rng: random.Random) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.1, 0.8))
            call = cast(Call, rng.choices(["worker_status", "delete_requests", "pubkey"], [10, 10, 1])[0])
            how = cast(How, rng.choice(["down", "slow", 500, "late"]) if call != "pubkey" else "down")
            self.vast.fail(call, how, times=rng.randrange(1, 4), seconds=0.3 if how == "slow" else 0.0)


def report(run: Run, seconds: float) -> list[str]:
    """Print the figures; the problems."""
    history = audit.read(run.worker.db)
    problems = list(audit.check(history, run.ledger, run.vast, run.sure))
    problems += [f"log line: {line}" for line in run.worker.alarms]
    claims, releases = run.ledger.claims, run.ledger.releases
    fates = Counter(claim.fate for claim in claims)
    kinds = Counter(f"{r.kind} {r.state}/{r.reason}" for r in history.ends)
    repeats = len(run.vast.outcomes) - len({each["request_idx"] for each in run.vast.outcomes})
    print(f"kills            {len(run.ledger.kills)} in {seconds:.0f} s, {run.worker.lives} starts")
    print(f"claims           {len(claims)}: " + ", ".join(f"{n} {fate}" for fate, n in fates.most_common()))
    print(f"reservations     {len(history.reservations)}, {history.events} events")
    for name, number in kinds.most_common():
        print(f"  {number:<6} {name}")
    ended = sum(bool(r.answer and r.answer.get("released")) for r in releases)
    print(
        f"releases         {len(releases)}, {ended} answered with true; {len(run.ledger.holds)} holds seen by clients"
    )
    print(
        f"outcomes         {len(run.vast.outcomes)} arrived, {repeats} of them again; {len(run.vast.statuses)} reports"
    )
    print(f"callbacks        {len(run.ledger.callbacks)}; {len(run.ledger.waits)} answers to who waited for a session")
    print(f"wrong            {len(problems)}")
    return problems


async def main(kills: int, seed: int, seconds_max: float) -> int:
    """Run, judge, print. The exit code."""
    folder = Path(tempfile.mkdtemp(prefix="nullworker-crash-"))
    print(f"seed {seed}, {folder}", flush=True)
    begun = time.monotonic()
    async with FakeAutoscaler(mtoken="crash") as vast:
        run = Run(folder, vast, seed)
        problems = []
        try:
            await run.go(kills, seconds_max)
        except (RuntimeError, TimeoutError, asyncio.TimeoutError) as error:
            problems.append(f"the run did not come to its end: {error!r}")
        problems += report(run, time.monotonic() - begun)
    for problem in problems[:20]:
        print(f"WRONG: {problem}")
    if problems:
        print(f"seed {seed}; the log is kept in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="kill -9 a worker under load, and audit its log")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--seconds-max", type=float, default=1e9, help="stop killing after so long")
    args = parser.parse_args()
    sys.exit(asyncio.run(main(args.kills, args.seed, args.seconds_max)))
