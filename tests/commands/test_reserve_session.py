"""`nullworker reserve --session` and `--state`, as processes, at a real worker: told the truth, and restartable."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, WorkerProcess, secured
from programs import Program

from nullworker.testing import FakeAutoscaler
from stress import caller as stress_caller


@pytest.fixture
async def worker(vast: FakeAutoscaler, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with secured(tmp_path, vast, MAX_RESERVATION_SECONDS="30") as worker:
        await vast.wait_for(lambda: vast.fleet.ready(vast.statuses[-1]["received_at"]) if vast.statuses else None)
        yield worker


def reserving(vast: FakeAutoscaler, folder: Path, *options: str) -> Program:
    """`nullworker reserve --json`, whose answer is in the file `out`."""
    (folder / "out").unlink(missing_ok=True)
    command = (sys.executable, "-W", "ignore", "-m", "nullworker", "reserve", "--endpoint", "null", "--json")
    program = Program(folder, *command, "--autoscaler", vast.url, *options)
    program.env.pop("PYTHONWARNINGS")
    return program


def answer(folder: Path) -> Any:
    return json.loads((folder / "out").read_text())


async def test_a_session_gives_the_same_answer_as_a_request(
    vast: FakeAutoscaler, worker: WorkerProcess, tmp_path: Path
) -> None:
    lines = []
    for number, options in enumerate(((), ("--session", "--lifetime", "4")), 1):
        async with reserving(vast, tmp_path, "--metadata", '{"job": 7}', "--duration", "20", *options) as caller:
            await worker.line("reservation_held", nth=number)
            await worker.release(reason="consumer_exit", result={"exit_code": 7})
            assert await caller.exit_code() == 4, "released, and the job failed"
        lines.append(answer(tmp_path))
    request, session = lines
    for line in lines:
        assert (line["worker"], line["instance"], line["metadata"]) == (worker.url, "7", {"job": 7})
        assert (line["released"], line["state"], line["reason"]) == ("consumer_exit", "released", "consumer_exit")
        assert line["result"] == {"exit_code": 7}
        assert line["asked_at"] <= line["held_at"] <= line["ended_at"]
        assert line["held_seconds"] >= 0
        row = (await worker.get("/reservations?limit=2"))["reservations"]
        assert line["reservation_id"] in [each["id"] for each in row]
    assert request["duration_cap"] == 20
    assert set(session) <= set(request)


@pytest.mark.parametrize(
    ("options", "result", "code"),
    [
        (("--duration", "1"), None, 0),
        (("--session", "--duration", "1"), None, 0),
        (("--duration", "20"), {"ok": True}, 0),
        (("--session", "--duration", "20"), {"error": "no disk"}, 4),
        (("--duration", "40"), "cap", 3),
    ],
)
async def test_the_exit_code_tells_how_it_went(
    vast: FakeAutoscaler, tmp_path: Path, options: tuple[str, ...], result: Any, code: int
) -> None:
    cap = "1.5" if result == "cap" else "30"
    async with secured(tmp_path, vast, MAX_RESERVATION_SECONDS=cap) as worker:
        await vast.wait_for(lambda: vast.fleet.ready(vast.statuses[-1]["received_at"]) if vast.statuses else None)
        async with reserving(vast, tmp_path, *options) as caller:
            await worker.line("reservation_held")
            if isinstance(result, dict):
                await worker.release(result=result)
            assert await caller.exit_code() == code
        if not isinstance(result, dict):
            told = answer(tmp_path)
            assert (told["released"], told["state"], told["reason"]) == (
                "duration_elapsed",
                "expired",
                "duration_elapsed",
            )


async def test_a_cap_is_said_at_once(vast: FakeAutoscaler, worker: WorkerProcess, tmp_path: Path) -> None:
    command = (sys.executable, "-W", "ignore", "-m", "nullworker", "reserve", "--endpoint", "null")
    caller = Program(tmp_path, *command, "--autoscaler", vast.url, "--duration", "6h")
    caller.env.pop("PYTHONWARNINGS")
    async with caller:
        said = "asked for 21600 s, and this worker allows 30 s: set MAX_RESERVATION_SECONDS in its template"
        await caller.line("", where=lambda line: line["text"] == said)
        assert (await worker.line("duration_capped"))["cap_seconds"] == 30
        await worker.release()
        assert await caller.exit_code() == 0


async def test_nobody_at_the_autoscaler_is_said_at_once(tmp_path: Path) -> None:
    command = (sys.executable, "-W", "ignore", "-m", "nullworker", "reserve", "--endpoint", "null")
    caller = Program(tmp_path, *command, "--autoscaler", "http://127.0.0.1:9", "--duration", "9")
    caller.env.pop("PYTHONWARNINGS")
    async with caller:
        await caller.line("", where=lambda line: "nothing answers at http://127.0.0.1:9" in line["text"])
        assert await caller.exit_code() == 1


# -- state -----------------------------------------------------------------------------------------------------------


def text(path: Path) -> str:
    return path.read_text()


async def has(state: Path, words: str) -> None:
    """Wait until the state says so."""
    for _ in range(int(PATIENCE * 50)):
        if words in text(state):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{words} is not in {text(state)}")


async def test_sigterm_leaves_the_session_and_the_next_run_goes_on_with_it(
    vast: FakeAutoscaler, worker: WorkerProcess, tmp_path: Path
) -> None:
    state = tmp_path / "job.state"
    options = ("--state", str(state), "--lifetime", "20", "--metadata", '{"job": 1}')
    async with reserving(vast, tmp_path, *options) as caller:
        held = await worker.line("reservation_held")
        await worker.line("reservation_held")
        await has(state, held["reservation_id"])
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        async with reserving(vast, tmp_path, *options) as second:
            assert await second.exit_code() == 1, "one process at a time"
        async with reserving(vast, tmp_path, *options, "--duration", "5") as other:
            assert await other.exit_code() in (1, 2)
        assert await caller.terminate() == 143
    assert (await worker.get("/reservation"))["id"] == held["reservation_id"]
    async with reserving(vast, tmp_path, *options, "--duration", "5") as other:
        assert await other.exit_code() == 2, "made with other arguments"
    await worker.release(result={"exit_code": 0})  # while nobody listens
    async with reserving(vast, tmp_path, *options) as caller:
        assert await caller.exit_code() == 0
    line = answer(tmp_path)
    assert (line["reservation_id"], line["result"]) == (held["reservation_id"], {"exit_code": 0})
    assert not state.exists()
    assert worker.sql("SELECT count(*) FROM reservations") == [(1,)]


async def test_ctrl_c_ends_the_session_and_removes_the_state(
    vast: FakeAutoscaler, worker: WorkerProcess, tmp_path: Path
) -> None:
    state = tmp_path / "job.state"
    async with reserving(vast, tmp_path, "--state", str(state)) as caller:
        held = await worker.line("reservation_held")
        await has(state, held["reservation_id"])
        assert await caller.terminate(signal.SIGINT) == 130
    assert not state.exists()
    assert worker.story()[-1] == ("released", "session_end")


async def test_kill_9_of_the_caller_at_random_moments_disturbs_nothing(tmp_path: Path) -> None:
    await stress_caller.run(tmp_path, kills=4, seed=1)
