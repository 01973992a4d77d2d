"""`nullworker demo` as a process: its output, its exit code, and that it leaves no process and no file behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from harness import ROOT
from marks import MARK, marked
from programs import until

pytestmark = pytest.mark.slow


class Demo:
    """`nullworker demo`, whose temporary files go into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.process: asyncio.subprocess.Process

    async def start(self, *arguments: str, **env: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nullworker", "demo", *arguments),
            env={
                **{"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
                **{"TMPDIR": str(self.folder), MARK: self.mark, **env},
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def until_held(self) -> None:
        """Once it has said that something is held."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if b"held on" in line:
                return

    async def end(self) -> tuple[int | None, str, str]:
        out, err = await asyncio.wait_for(self.process.communicate(), 90)
        return self.process.returncode, out.decode(), err.decode()

    def running(self) -> list[int]:
        return marked(self.mark)


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    if demo.process.returncode is None:
        demo.process.kill()
        await demo.process.wait()


def in_order(out: str, who: str, *what: str) -> None:
    """Each said once of somebody, in this order."""
    said = [line.partition(who)[2].strip() for line in out.splitlines() if f" s  {who} " in line]
    moments = [[number for number, line in enumerate(said) if line.startswith(words)] for words in what]
    assert all(len(each) == 1 for each in moments), (who, said)
    assert moments == sorted(moments)


async def test_it_runs_through_and_leaves_no_files(demo: Demo) -> None:
    # settings that somebody has set for a worker of their own must not get into it
    await demo.start(NULL_MAX_PERF="7", BACKEND_HEALTH_URL="http://127.0.0.1:9/", CONTAINER_ID="4")
    code, out, err = await demo.end()
    assert (code, err) == (0, "")
    assert demo.running() == []
    assert os.listdir(demo.folder) == []
    for number in range(1, 11):  # which worker gets which job is the stand-in's choice
        in_order(out, f"render-{number}", "is done")
        assert re.search(rf"^render-{number} +\d +[\d.]+ +2\.\d+ +0\.0002\d+ +consumer_exit +0$", out, re.MULTILINE)
    for number in (1, 2, 3):
        in_order(out, f"worker {number}", "starts", "is ready", "stops: idle for", "is gone")
        assert re.search(rf"^worker {number} +·+[░█]*░+$", out, re.MULTILINE), "the chart"
    assert "10 wait, 0 in flight, 0 held: asks for 3 more" in out
    assert len(re.findall("dispatch  held on http://127.0.0.1:", out)) == 10
    assert "█" in out
    assert out.index("no workers, no costs") < out.index("worker 1") < out.rindex("no workers, no costs")
    assert "was told: 10 sessions, 10 times Success" in out
    assert re.search(r"^20\d\d-\d\d-\d\d +10 +10 +0 +0\.00\d+ +0\.00\d+", out, re.MULTILINE), "one hold for each job"
    steps = re.findall(r"^\d +\d\d:\d\d:[\d.]+ +(queued|held|released) ", out, re.MULTILINE)
    assert steps == ["queued", "held", "released"]
    assert "Error: events are append-only: no DELETE" in out
    assert max(map(len, out.splitlines())) <= 120


async def test_the_logs_can_be_kept_also_when_it_is_stopped(demo: Demo) -> None:
    await demo.start("--keep")
    await demo.until_held()
    demo.process.send_signal(signal.SIGINT)
    code, out, _ = await demo.end()
    assert code == 130
    assert demo.running() == []
    (folder,) = os.listdir(demo.folder)
    assert f"sqlite3 {demo.folder}/{folder}/nullworker-dispatch.db" in out
    with closing(sqlite3.connect(demo.folder / folder / "nullworker-dispatch.db")) as conn:
        assert conn.execute("SELECT count(*) FROM claims").fetchone()[0] >= 1


async def test_a_signal_ends_it_and_leaves_nothing(demo: Demo) -> None:
    await demo.start()
    await demo.until_held()
    demo.process.send_signal(signal.SIGTERM)
    demo.process.send_signal(signal.SIGTERM)  # impatience must not make it forget its workers
    assert (await demo.end())[0] == 143
    assert demo.running() == []
    assert os.listdir(demo.folder) == []


async def test_nothing_outlives_it_when_it_is_killed(demo: Demo) -> None:
    await demo.start()
    await demo.until_held()
    demo.process.kill()
    await demo.process.wait()
    await until(lambda: not demo.running())
