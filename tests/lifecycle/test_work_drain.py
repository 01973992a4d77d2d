"""`nullworker work --until`, `--idle` and `--run-timeout`, and that it is attached all the while."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import WorkerProcess
from programs import Program, answered, caller, free_port, nullworker, nullworker_work, session, until

FOREVER = "while :; do sleep 1; done"
#: Takes one file of the folder `jobs`; 3 when there is none, and the number in the file as its exit code.
TAKE = """
job=$(ls jobs 2>/dev/null | head -n 1)
[ "$job" ] || exit 3
code=$(cat "jobs/$job"); rm "jobs/$job"
echo "$job"
exit "$code"
"""


def shell(script: str) -> tuple[str, ...]:
    """CMD as a shell script."""
    return ("--", "sh", "-c", script)


def put(folder: Path, *codes: int) -> None:
    """Jobs, each with the exit code that it will have."""
    (folder / "jobs").mkdir(exist_ok=True)
    for number, code in enumerate(codes):
        (folder / "jobs" / f"job{number:02}").write_text(str(code))


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(tmp_path) as process:
        yield process


async def test_one_reservation_drains_the_queue(worker: WorkerProcess) -> None:
    put(worker.folder, 0, 0, 0)
    async with nullworker_work(worker, "--until", "3", *shell(TAKE)) as work, caller(worker) as asked:
        answer = await answered(asked)
        assert (answer["released"], answer["result"]) == ("consumer_exit", {"exit_code": 0, "runs": 3, "failed": 0})
        assert work.out.read_text().split() == ["job00", "job01", "job02"]


async def test_an_empty_queue_is_no_run(worker: WorkerProcess) -> None:
    async with nullworker_work(worker, "--until", "3", *shell(TAKE)), caller(worker) as asked:
        assert (await answered(asked))["result"] == {"exit_code": 0, "runs": 0, "failed": 0}


async def test_a_job_that_fails_is_counted_and_the_next_one_done(worker: WorkerProcess) -> None:
    put(worker.folder, 0, 7, 0, 8, 0)
    async with nullworker_work(worker, "--until", "3", *shell(TAKE)), caller(worker) as asked:
        assert (await answered(asked))["result"] == {"exit_code": 8, "runs": 5, "failed": 2}


async def test_two_failures_at_once_in_a_row_release_and_the_pause_is_spent_released(worker: WorkerProcess) -> None:
    put(worker.folder, 0, 7, 8, 0)
    async with nullworker_work(worker, "--until", "3", *shell(TAKE)) as work:
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 8, "runs": 3, "failed": 2}
        assert (await work.line("work_fails"))["pause_seconds"] == 1
        assert (await worker.get("/status"))["held"] is None
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 0, "runs": 1, "failed": 0}


async def test_ten_slow_failures_in_a_row_release_too(worker: WorkerProcess) -> None:
    put(worker.folder, *[7] * 12)
    # no failure counts as one at once: it is only the number of them
    patch = "import nullworker.consumer.work as w; w.AT_ONCE_SECONDS = 0"
    start = "from nullworker.cli.commands import main; main()"
    command = (sys.executable, "-c", f"{patch}; {start}", "work", "--until", "3", *shell(TAKE))
    env = {"NULL_CONTROL_PORT": str(worker.control_port), "NULL_LOG_FORMAT": "json"}
    async with Program(worker.folder, *command, **env), caller(worker) as asked:
        assert (await answered(asked))["result"] == {"exit_code": 7, "runs": 10, "failed": 10}


async def test_an_empty_queue_is_asked_again_while_idle_lasts(worker: WorkerProcess) -> None:
    async with nullworker_work(worker, "--until", "3", "--idle", "3", *shell(TAKE)) as work, caller(worker) as asked:
        await work.line("work_started", nth=2)
        put(worker.folder, 0)
        answer = await answered(asked)
        assert answer["result"] == {"exit_code": 0, "runs": 1, "failed": 0}
        assert answer["held_seconds"] >= 3
        runs = [line for line in work.lines if line["event"] == "work_started"]
        assert len(runs) <= 6  # after 1 s, then 2 s, ...


async def test_no_run_begins_after_half_of_the_longest_hold(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, NULL_MAX_HOLD_SECONDS="5") as worker,
        nullworker_work(worker, "--until", "3", *shell("sleep 0.5; exit 0")),
        caller(worker) as asked,
    ):
        answer = await answered(asked)
        assert answer["released"] == "consumer_exit"
        assert 2.5 <= answer["held_seconds"] < 5
        assert answer["result"]["failed"] == 0


@pytest.mark.parametrize("until_code", [(), ("--until", "3")])
async def test_a_run_that_hangs_is_ended(worker: WorkerProcess, until_code: tuple[str, ...]) -> None:
    arguments = ("--run-timeout", "0.5", *until_code, *shell(f"[ -e again ] && exit 3; touch again; {FOREVER}"))
    async with nullworker_work(worker, *arguments) as work, caller(worker) as asked:
        result = (await answered(asked))["result"]
        assert result == ({"exit_code": 124, "runs": 1, "failed": 1} if until_code else {"exit_code": 124})
        stops = await work.line("work_stops")
        assert (stops["why"], "ends_at" in stops) == ("it ran for 0.5 s", True)


async def test_a_session_is_extended_while_a_command_runs_and_a_request_is_not(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, MAX_RESERVATION_SECONDS="2") as worker,
        nullworker_work(worker, "--health-port", "0", *shell(FOREVER)) as work,
    ):
        await work.line("health_endpoint")
        async with caller(worker, duration=2) as asked:
            await work.line("work_started")
            assert (await answered(asked))["released"] == "duration_elapsed"
        await work.line("work_ended_late")
        await session(worker, lifetime=1)
        await worker.line("reservation_extended", nth=4)
        assert await work.terminate() == 0


async def test_sigterm_in_a_drain_releases_with_what_was_done(worker: WorkerProcess) -> None:
    put(worker.folder, 0)
    script = f"[ -e jobs/job00 ] && rm jobs/job00 && exit 0; echo ready; {FOREVER}"
    async with nullworker_work(worker, "--until", "3", *shell(script)) as work, caller(worker) as asked:
        await until(lambda: "ready" in work.out.read_text())
        assert await work.terminate() == 0
        assert (await answered(asked))["result"] == {"exit_code": 143, "runs": 2, "failed": 1}


async def test_a_command_that_was_ended_at_once_has_not_failed(worker: WorkerProcess) -> None:
    """It ended because its reservation did: no pause follows, and the health endpoint says nothing."""
    async with nullworker_work(worker, *shell(FOREVER)) as work:
        for number in range(1, 5):
            async with caller(worker):
                await work.line("work_started", nth=number)
            await work.line("work_ended_late", nth=number)
        assert not [line for line in work.lines if line["event"] == "work_fails"]


async def test_a_stopped_command_hears_sigterm(tmp_path: Path) -> None:
    """SIGTERM waits for a stopped process until it is continued: without SIGCONT only SIGKILL would end it."""
    script = "trap 'echo told; exit 5' TERM; echo ready; kill -STOP $$; exit 1"
    async with (
        WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port())) as worker,
        nullworker_work(worker, "--kill-after", "15", *shell(script)) as work,
    ):
        async with caller(worker):
            await until(lambda: "ready" in work.out.read_text())
        assert (await work.line("work_ended_late"))["exit_code"] == 5
        assert "told" in work.out.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--until", "0", "true"), "--until"),
        (("--idle", "5", "true"), "--idle needs --until"),
        (("--run-timeout", "-1", "true"), "--run-timeout"),
    ],
)
async def test_wrong_use_of_the_drain_is_said(arguments: tuple[str, ...], says: str) -> None:
    assert says in await nullworker("work", *arguments, code=2)


async def test_a_killed_work_ends_its_hold(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, NULL_CONSUMER_GRACE_SECONDS="0.2") as worker,
        nullworker_work(worker, *shell(FOREVER)) as work,
    ):
        await session(worker)
        await work.line("work_started")
        work.process.kill()
        assert (await worker.line("reservation_cancelled"))["reason"] == "consumer_lost"
        await asyncio.wait_for(work.process.wait(), 20)
