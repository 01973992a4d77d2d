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
from harness import PATIENCE, ROOT, WorkerProcess
from marks import MARK, marked
from programs import until

from nullworker.local.demo_clients import Job, NotReserved, plain
from nullworker.testing import FakeAutoscaler

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


async def test_it_tells_the_story_and_leaves_nothing(demo: Demo) -> None:
    # settings that somebody has set for a worker of their own must not get into it
    await demo.start(NULL_MAX_PERF="7", BACKEND_HEALTH_URL="http://127.0.0.1:9/", CONTAINER_ID="4")
    code, out, err = await demo.end()
    assert (code, err) == (0, "")
    assert demo.running() == []
    assert os.listdir(demo.folder) == []
    assert "the official vastai " in out
    for number in (1, 2, 3):  # which worker gets which job is the stand-in's choice
        in_order(out, f"render-{number}", "asks for a worker", "held on http://127.0.0.1:", "is done: its consumer")
        in_order(out, f"worker {number}", "starts", "is ready", "stops: idle for 3 s", "is gone")
        assert re.search(rf"^worker {number} +·+[░█]*░+$", out, re.MULTILINE), "the chart"
        assert re.search(rf"^nullworker-\d.db +render-{number} +released +consumer_exit ", out, re.MULTILINE)
    assert "█" in out
    assert out.index("no workers, no costs") < out.index("worker 1") < out.rindex("no workers, no costs")
    assert "was told: 3 requests, 3 times Success" in out
    steps = re.findall(r"^nullworker-\d.db +\d .* (queued|held|released) ", out, re.MULTILINE)
    assert steps == ["queued", "held", "released"]
    assert "Error: events are append-only: no DELETE" in out
    assert max(map(len, out.splitlines())) <= 120


async def test_the_logs_can_be_kept_also_when_it_is_stopped(demo: Demo) -> None:
    await demo.start("--keep")
    await demo.until_held()
    demo.process.send_signal(signal.SIGINT)
    code, out, _ = await demo.end()
    assert code == 130
    (folder,) = os.listdir(demo.folder)
    assert f"sqlite3 {demo.folder}/{folder}/nullworker-1.db" in out
    with closing(sqlite3.connect(demo.folder / folder / "nullworker-1.db")) as conn:
        assert conn.execute("SELECT count(*) FROM reservations").fetchone()[0] >= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_ends_it_and_leaves_nothing(demo: Demo, number: signal.Signals, code: int) -> None:
    await demo.start()
    await demo.until_held()
    demo.process.send_signal(number)
    demo.process.send_signal(number)  # impatience must not make it forget its workers
    assert (await demo.end())[0] == code
    assert demo.running() == []
    assert os.listdir(demo.folder) == []


async def test_nothing_outlives_it_when_it_is_killed(demo: Demo) -> None:
    await demo.start()
    await demo.until_held()
    demo.process.kill()
    await demo.process.wait()
    await until(lambda: not demo.running())


async def test_without_the_official_client_it_goes_by_hand(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    said: list[str] = []
    job = Job("a", 1.0, 0.0)
    asked = asyncio.ensure_future(plain(vast, job, {}, said.append))
    await worker.line("reservation_held")
    await worker.release(result={"exit_code": 0})
    answer = await asyncio.wait_for(asked, PATIENCE)
    assert (answer["released"], answer["result"]) == ("explicit", {"exit_code": 0})
    assert said[-1] == f"held on {worker.url}, by a plain request"
    assert worker.sql("SELECT metadata ->> 'job' FROM reservations") == [("a",)]


async def test_without_the_official_client_it_waits_for_a_worker_with_one_request(
    vast: FakeAutoscaler, tmp_path: Path
) -> None:
    said: list[str] = []
    asked = asyncio.ensure_future(plain(vast, Job("a", 1.0, 0.0), {}, said.append))
    await vast.wait_for(lambda: sum(seen.call == "route" for seen in vast.seen) >= 2)
    assert vast.waiting == [1]
    assert said == ["waiting for a worker: there is none yet"]
    asked.cancel()


async def test_without_the_official_client_a_refusal_is_an_error(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    tell = {"too": "x" * 5000}  # metadata over 4 KiB
    job = Job(str(tell), 1.0, 0.0)
    with pytest.raises(NotReserved, match=r"answered 422"):
        await asyncio.wait_for(plain(vast, job, {}, lambda line: None), PATIENCE)
