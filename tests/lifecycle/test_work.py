"""`nullworker work` with real workers and real commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import WorkerProcess
from programs import answered, caller, free_port, nullworker, nullworker_work, until

#: For as long as it takes, so that only a signal ends it.
FOREVER = "while :; do sleep 1; done"


def shell(script: str) -> tuple[str, ...]:
    """CMD as a shell script."""
    return ("--", "sh", "-c", script)


def runs(group: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def health(port: int) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/health") as answer:
        return answer.status, await answer.json()


async def test_the_exit_code_reaches_the_caller_and_the_command_knows_its_reservation(tmp_path: Path) -> None:
    script = (
        'echo "$NULLWORKER_RESERVATION_ID $NULLWORKER_RESERVATION_DEADLINE $NULLWORKER_RESERVATION_METADATA"; exit 7'
    )
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(script)) as work:
        async with caller(worker, metadata={"job": "of 7"}) as asked:
            answer = await answered(asked)
        assert (answer["released"], answer["result"]) == ("consumer_exit", {"exit_code": 7})
        await work.line("work_done")
        (held,) = (await worker.get("/reservations"))["reservations"]
        assert work.out.read_text() == f'{held["id"]} {held["ends_at"]} {{"job": "of 7"}}\n'
        assert worker.story()[-1] == ("released", "consumer_exit")


async def test_each_reservation_gets_a_command_of_its_own(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell("echo $$")) as work:
        async with caller(worker) as first, caller(worker) as second, caller(worker) as third:
            for asked in (first, second, third):
                assert (await answered(asked))["result"] == {"exit_code": 0}
        await work.line("work_done", nth=3)
        assert len(set(work.out.read_text().split())) == 3


async def test_a_caller_that_hangs_up_ends_the_command(tmp_path: Path) -> None:
    script = f"trap 'echo told; exit 3' TERM; echo ready; {FOREVER}"
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(script)) as work:
        async with caller(worker):
            started = await work.line("work_started")
            await _said(work.out, "ready")
        late = await work.line("work_ended_late")
        assert (late["why"], late["exit_code"]) == ("cancelled, client_disconnect", 3)
        assert not runs(started["pid"])
        assert work.out.read_text() == "ready\ntold\n"


async def test_the_deadline_ends_the_command(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(FOREVER)) as work:
        async with caller(worker, duration=3) as asked:
            await work.line("work_started")
            assert (await answered(asked))["released"] == "duration_elapsed"
            late = await work.line("work_ended_late")
        assert (late["why"], late["exit_code"]) == ("expired, duration_elapsed", 143)


async def test_a_command_that_ignores_sigterm_is_killed_and_the_next_reservation_is_served(tmp_path: Path) -> None:
    script = f"trap '' TERM; echo ready; {FOREVER}"
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--kill-after", "0.2", *shell(script)) as work,
    ):
        async with caller(worker):
            first = await work.line("work_started")
            await _said(work.out, "ready")
        assert (await work.line("work_ended_late"))["exit_code"] == 137
        assert not runs(first["pid"])
        async with caller(worker):
            second = await work.line("work_started", nth=2)
            assert second["pid"] != first["pid"]


async def test_children_that_a_command_leaves_behind_end_with_it(tmp_path: Path) -> None:
    script = "sh -c 'trap \"\" TERM; echo $$; sleep 1000; sleep 1000' & sleep 1000 & read _ < ready; exit 0"
    os.mkfifo(tmp_path / "ready")
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--kill-after", "0.2", *shell(script)) as work,
        caller(worker) as asked,
    ):
        group = (await work.line("work_started"))["pid"]
        await _said(work.out, "\n")
        (tmp_path / "ready").write_text("\n")
        assert (await answered(asked))["result"] == {"exit_code": 0}
        assert not runs(group)


async def test_a_flood_of_output_is_passed_through(tmp_path: Path) -> None:
    script = "yes | head -c 30000000; exit 4"
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(script)) as work:
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 4}
        assert work.out.stat().st_size == 30_000_000


async def test_a_command_that_fails_at_once_is_held_back_and_its_health_says_so(tmp_path: Path) -> None:
    port = free_port()
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--health-port", str(port), *shell("exit 1")) as work,
    ):
        await work.line("health_endpoint")
        assert await health(port) == (200, {"status": "ok"})
        for _ in range(3):
            async with caller(worker) as asked:
                assert (await answered(asked))["result"] == {"exit_code": 1}
        fails = await work.line("work_fails")
        assert fails["pause_seconds"] == 1
        status, body = await health(port)
        assert (status, body["why"]) == (503, "sh failed at once 3 times in a row")
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 1}
        assert (await work.line("work_fails", nth=2))["pause_seconds"] == 2


async def test_a_command_that_vanishes_fails_with_the_shells_code(tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, str(command)) as work:
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 0}
        command.unlink()
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 127}
        await work.line("work_cannot_start")


async def test_extend_keeps_the_reservation_for_as_long_as_the_command_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--extend", *shell("read _ < gate")) as work,
    ):
        for number, duration in enumerate((60, 2), 1):  # the first only to know that `work` is there
            async with caller(worker, duration=duration) as asked:
                await work.line("work_started", nth=number)
                if duration == 2:
                    await worker.line("reservation_extended")
                (tmp_path / "gate").write_text("\n")
                assert (await answered(asked))["released"] == "consumer_exit"
            await work.line("work_done", nth=number)


async def test_the_command_itself_extends_and_releases_by_the_id_in_its_environment(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    script = "python3 -m nullworker extend 600 && read _ < gate && python3 -m nullworker release --result '[1]'; exit 0"
    async with WorkerProcess(tmp_path) as worker:
        # the tests' own interpreter as python3, whose nullworker the command is to find
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        async with nullworker_work(worker, *shell(script), PATH=path) as work:
            async with caller(worker, duration=30) as asked:
                await worker.line("reservation_extended")
                (tmp_path / "gate").write_text("\n")
                answer = await answered(asked)
                assert (answer["released"], answer["result"]) == ("explicit", [1])
            assert (await work.line("work_ended_late"))["why"].endswith("released, explicit")


async def test_a_dead_consumer_is_seen_by_the_worker(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/health"
    async with (
        WorkerProcess(tmp_path, BACKEND_HEALTH_URL=url, NULL_HEALTH_INTERVAL="0.05") as worker,
        nullworker_work(worker, "--health-port", str(port), "true") as work,
    ):
        await worker.line("consumer_healthy")
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 0}
        await work.kill()
        await worker.line("consumer_unhealthy")
        async with caller(worker) as asked:
            assert (await answered(asked))["reason"] == "errored"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--", "no-such-command-here"), "there is no command 'no-such-command-here'"),
        ((), "Missing argument"),
        (("--kill-after", "-1", "true"), "--kill-after"),
    ],
)
async def test_wrong_use_is_said_before_anything_is_taken(arguments: tuple[str, ...], says: str) -> None:
    assert says in await nullworker("work", *arguments, code=2)


async def test_a_health_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        said = await nullworker("work", "--health-port", str(worker.control_port), "true", code=1)
        assert f"--health-port {worker.control_port} cannot be opened" in said.splitlines()[-1]


async def test_metadata_are_json_also_when_there_are_none(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, *shell("printenv NULLWORKER_RESERVATION_METADATA")) as work,
    ):
        async with caller(worker) as asked:
            await answered(asked)
        assert json.loads(work.out.read_text()) == {}


async def _said(out: Path, text: str) -> None:
    """Wait until a command has written something."""
    await until(lambda: text in out.read_text())
