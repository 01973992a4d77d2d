"""Kills the caller of one job at random moments, and starts it again: one session, one result, one undisturbed job.

`nullworker reserve --state` is killed -9 before, while and after it asks a real worker for a session; the job runs
under `nullworker work`. Run: python -m stress.caller --kills 100
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from nullworker.testing import FakeAutoscaler

ROOT = Path(__file__).parents[1]
#: What the job does: it notes that it was begun, works until it is told to end, and then fails in its own way.
JOB = "echo begun >>runs; while [ ! -e finish ]; do sleep 0.1; done; exit 7"
#: Seconds for which each caller lives: it takes most of a second to start.
LEAST, MOST = 0.2, 4.0
PATIENCE_SECONDS = 60.0


@contextlib.asynccontextmanager
async def process(folder: Path, name: str, *command: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`nullworker ...` in a folder, killed at the end; stdout and stderr go to `<name>.out` and `<name>.err` there."""
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), **env}
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("ab") as err:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "nullworker", *command), cwd=folder, env=own, stdout=out, stderr=err
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def logged(folder: Path, event: str) -> dict[str, Any]:
    """The worker's first log line of that kind, once it is there."""
    for _ in range(int(PATIENCE_SECONDS * 20)):
        for line in (folder / "worker.err").read_text().splitlines():
            with contextlib.suppress(ValueError):
                if (fields := json.loads(line)).get("event") == event:
                    return dict(fields)
        await asyncio.sleep(0.05)
    raise AssertionError(f"the worker has not said {event}")


def has_granted(state: Path) -> bool:
    """Whether the caller is about to ask a worker, or has asked it."""
    return state.exists() and b"auth_data" in state.read_bytes()


async def run(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """One job. Its last caller's answer, `kills`, and how many of them came while the job ran.

    Raises:
        AssertionError: there was another session, another result, or a second run of the job.
    """
    rng = random.Random(seed)
    async with FakeAutoscaler() as vast, contextlib.AsyncExitStack() as stack:
        env = {"CONTAINER_ID": "7", "MASTER_TOKEN": "t", "REPORT_ADDR": vast.url, "WORKER_PORT": "0"}
        env |= {"NULL_CONTROL_PORT": "0", "NULL_LOG_FORMAT": "json", "NULL_EVENT_LOG": str(folder / "worker.db")}
        await stack.enter_async_context(process(folder, "worker", "serve", **env))
        port = str((await logged(folder, "worker_started"))["control_port"])
        await stack.enter_async_context(
            process(folder, "work", "work", "--", "/bin/sh", "-c", JOB, NULL_CONTROL_PORT=port)
        )
        command: tuple[str, ...] = (
            "reserve",
            "--endpoint",
            "null",
            "--autoscaler",
            vast.url,
            "--json",
            "--state",
            "job.state",
        )
        command += ("--lifetime", "25", "--metadata", '{"job": 17}')
        while_held = 0
        for number in range(kills):
            async with process(folder, "caller", *command):
                if number and not has_granted(folder / "job.state"):  # the moment in which a session may be lost
                    for _ in range(int(PATIENCE_SECONDS * 200)):
                        if has_granted(folder / "job.state"):
                            break
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(rng.uniform(0, 0.1))
                else:
                    await asyncio.sleep(rng.uniform(LEAST, MOST))
            while_held += (folder / "runs").exists()
        async with process(folder, "caller", *command) as last:
            while not (folder / "runs").exists():
                await asyncio.sleep(0.05)
            (folder / "finish").touch()
            code = await asyncio.wait_for(last.wait(), PATIENCE_SECONDS)
        answer: dict[str, Any] = json.loads((folder / "caller.out").read_text())
    with contextlib.closing(sqlite3.connect(folder / "worker.db")) as db:
        holds = db.execute("SELECT id, reason, result ->> 'exit_code' FROM reservations").fetchall()
    assert holds == [(answer["reservation_id"], "consumer_exit", 7)], holds
    assert (code, answer["result"]["exit_code"]) == (4, 7), (code, answer)
    assert (folder / "runs").read_text().split() == ["begun"], "the job was begun once"
    assert not (folder / "job.state").exists(), "the state is removed once the end was told"
    assert while_held or kills < 3, "no caller was killed while the job ran"
    return {**answer, "kills": kills, "kills_while_held": while_held}


def main() -> None:
    """Run it in a temporary folder, and print the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(run(Path(folder), kills=options.kills, seed=options.seed)), indent=2))


if __name__ == "__main__":
    main()
