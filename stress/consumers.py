"""Consumers under faults: the whole matrix of examples and faults, and how long a killed consumer costs.

python -m stress.consumers matrix              each queue with each fault; cuts of 3 s and of 60 s
python -m stress.consumers kills --kills 200   kill -9 of an attached consumer at random: seconds until its hold ended
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random

from nullworker.clock import stopwatch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import fault_matrix  # noqa: E402  # found by the line above
from harness import WorkerProcess  # noqa: E402
from programs import Program, session  # noqa: E402
from queues import QUEUES  # noqa: E402

#: Seconds for which a connection is cut, or a server is down.
CUTS = (3.0, 60.0)
#: Faults that have a length.
LONG = ("cut", "restart", "idle")
#: A consumer that does nothing but hold.
HOLD = """
import asyncio, sys
from nullworker.consumer import reservations, run
async def main():
    async for reservation in reservations():
        async with reservation:
            print('{"event": "inside"}', file=sys.stderr, flush=True)
            await asyncio.sleep(1000)
run(main())
"""


async def matrix() -> int:
    """Every run, one after another. The number of those that failed."""
    failed = 0
    for name, faults in fault_matrix.FAULTS.items():
        for fault in faults:
            for seconds in CUTS if fault in LONG else CUTS[:1]:
                begun = stopwatch()
                with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as queue_folder:
                    try:
                        with QUEUES[name](Path(queue_folder)) as queue:
                            await fault_matrix.run(queue, fault, Path(folder), seconds=seconds)
                        word = "ok"
                    except Exception:
                        traceback.print_exc()
                        word, failed = "FAILED", failed + 1
                length = f" for {seconds:g} s" if fault in LONG else ""
                print(f"{name:10} {fault + length:20} {word:7} {stopwatch() - begun:6.1f} s", flush=True)
    return failed


async def kills(times: int, seed: int, grace: float) -> int:
    """Kill an attached consumer again and again, and print how long each hold went on."""
    random, seconds = Random(seed), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        async with WorkerProcess(Path(folder), NULL_CONSUMER_GRACE_SECONDS=f"{grace:g}") as worker:
            command = (sys.executable, "-c", HOLD)
            for number in range(1, times + 1):
                async with contextlib.AsyncExitStack() as stack:
                    env = {"NULL_CONTROL_PORT": str(worker.control_port)}
                    consumer = await stack.enter_async_context(Program(Path(folder), *command, **env))
                    await session(worker, lifetime=3600)
                    try:
                        await consumer.line("inside")
                    except AssertionError:
                        print(f"kill {number}: the consumer does not attach; the worker's last lines:")
                        print(*worker.lines[-10:], worker.process.returncode, sep="\n", flush=True)
                        raise
                    await asyncio.sleep(random.uniform(0, 0.5))
                    killed = stopwatch()
                    consumer.process.kill()
                    end = await worker.line("reservation_cancelled", nth=number)
                    seconds.append(stopwatch() - killed)
                    if end["reason"] != "consumer_lost":
                        print(f"kill {number}: ended as {end['reason']}")
                        return 1
    ordered = sorted(seconds)
    print(
        f"{times} kills, grace {grace:g} s: seconds until the hold ended: median {statistics.median(ordered):.3f}, "
        f"95 % {ordered[int(0.95 * len(ordered))]:.3f}, worst {ordered[-1]:.3f}"
    )
    return 0 if ordered[-1] < grace + 1 else 1


def main() -> int:
    """Run what the arguments say. The exit code: 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m stress.consumers")
    parser.add_argument("what", choices=["matrix", "kills"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grace", type=float, default=5.0)
    told = parser.parse_args()
    if told.what == "matrix":
        return 1 if asyncio.run(matrix()) else 0
    return asyncio.run(kills(told.kills, told.seed, told.grace))


if __name__ == "__main__":
    sys.exit(main())
