"""`nullworker work` under signals and kills, and over drains and restarts of its worker."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from harness import WorkerProcess
from programs import Program, answered, caller, free_port, inherited, nullworker_work, session, until

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


async def _said(out: Path, text: str) -> None:
    """Wait until a command has written something."""
    await until(lambda: text in out.read_text())


async def test_the_drain_of_the_worker_ends_the_command(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, NULL_DRAIN_SECONDS="0.2") as worker,
        nullworker_work(worker, "--patience", "0.2", *shell(FOREVER)) as work,
        caller(worker),
    ):
        await work.line("work_started")
        assert await worker.terminate() == 0
        late = await work.line("work_ended_late")
        assert late["exit_code"] == 143


async def test_sigterm_ends_the_command_and_releases(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(FOREVER)) as work:
        async with caller(worker) as asked:
            group = (await work.line("work_started"))["pid"]
            assert await work.terminate() == 0
            answer = await answered(asked)
            assert (answer["released"], answer["result"]) == ("consumer_exit", {"exit_code": 143})
        assert not runs(group)


async def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    script = f"trap 'echo no' TERM; echo ready; {FOREVER}"
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--kill-after", "9999", *shell(script)) as work,
        caller(worker) as asked,
    ):
        await work.line("work_started")
        await _said(work.out, "ready")
        work.process.terminate()
        await work.line("work_stops")
        assert await work.terminate() == 0
        assert (await answered(asked))["result"] == {"exit_code": 137}


async def test_a_closed_terminal_ends_the_command_unless_it_runs_under_nohup(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    async with WorkerProcess(tmp_path) as worker:
        with inherited(signal.SIG_DFL):
            async with nullworker_work(worker, *shell(FOREVER)) as work, caller(worker) as asked:
                await work.line("work_started")
                assert await work.terminate(signal.SIGHUP) == 0
                assert (await answered(asked))["result"] == {"exit_code": 143}
        with inherited(signal.SIG_IGN):
            async with nullworker_work(worker, *shell("read _ < gate; exit 5")) as work, caller(worker) as asked:
                await work.line("work_started")
                work.process.send_signal(signal.SIGHUP)
                (tmp_path / "gate").write_text("\n")
                assert (await answered(asked))["result"] == {"exit_code": 5}
                assert await work.terminate() == 0


async def test_sigterm_while_nothing_is_held_exits_at_once(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, "--health-port", "0", "true") as work:
        await work.line("health_endpoint")
        assert await work.terminate() == 0
        assert worker.story() == []


async def test_a_killed_consumer_takes_its_command_with_it(tmp_path: Path) -> None:
    script = f"sh -c '{FOREVER}' & {FOREVER}"
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(script)) as work, caller(worker):
        group = (await work.line("work_started"))["pid"]
        await work.kill()
        await until(lambda: not runs(group))


async def test_a_session_and_its_command_go_on_when_the_worker_is_killed_and_restarted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    async with (
        WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port())) as worker,
        nullworker_work(worker, *shell("read _ < gate; exit 5")) as work,
    ):
        session_id = await session(worker)
        await work.line("work_started")
        await worker.kill()
        await worker.start()
        (tmp_path / "gate").write_text("\n")
        assert (await work.line("work_done"))["exit_code"] == 5
        (row,) = (await worker.get("/reservations"))["reservations"]
        assert (row["id"], row["reason"], row["result"]) == (session_id, "consumer_exit", {"exit_code": 5})


async def test_a_request_whose_worker_was_restarted_is_over_for_its_command_too(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port())) as worker,
        nullworker_work(worker, *shell(FOREVER)) as work,
    ):
        async with caller(worker):
            await work.line("work_started")
            await worker.kill()
        await worker.start()
        late = await work.line("work_ended_late")
        assert (late["why"], late["exit_code"]) == ("cancelled, worker_restart", 143)
        async with caller(worker):
            await work.line("work_started", nth=2)


async def test_a_worker_that_stays_dead_ends_the_command(tmp_path: Path) -> None:
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--patience", "0.3", *shell(FOREVER)) as work,
    ):
        await session(worker)
        await work.line("work_started")
        await worker.kill()
        late = await work.line("work_ended_late")
        assert late["why"].startswith("the worker is gone")


def children(pid: int) -> list[int]:
    """Of a process, the zombies too."""
    return [child.pid for child in psutil.Process(pid).children()]


@pytest.mark.parametrize("own", ["setsid", ""], ids=["in_a_session_of_its_own", "in_the_group_of_the_command"])
async def test_an_orphan_that_dies_while_the_command_runs_is_no_zombie(tmp_path: Path, own: str) -> None:
    for fifo in ("orphan", "command"):
        os.mkfifo(tmp_path / fifo)
    script = f"({own} sh -c 'read _ < orphan' & echo $!); read _ < command; exit 5"
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, *shell(script)) as work,
        caller(worker) as asked,
    ):
        await _said(work.out, "\n")
        orphan = int(work.out.read_text())
        await until(lambda: orphan in children(work.process.pid))
        (tmp_path / "orphan").write_text("\n")
        await until(lambda: orphan not in children(work.process.pid))
        (tmp_path / "command").write_text("\n")
        assert (await answered(asked))["result"] == {"exit_code": 5}


async def test_what_has_left_the_group_lives_on_and_is_no_zombie_when_it_dies(tmp_path: Path) -> None:
    for fifo in ("gone", "gate"):
        os.mkfifo(tmp_path / fifo)
    script = "setsid sh -c 'echo $$; echo > gone; read _ < gate' & read _ < gone; exit 3"
    async with WorkerProcess(tmp_path) as worker, nullworker_work(worker, *shell(script)) as work:
        for _ in range(2):
            async with caller(worker) as asked:
                assert (await answered(asked))["result"] == {"exit_code": 3}
        orphans = {int(pid) for pid in work.out.read_text().split()}
        assert orphans <= set(children(work.process.pid))
        with (tmp_path / "gate").open("r+b", buffering=0) as fifo_end:
            fifo_end.write(b"\n\n")
            await until(lambda: not orphans & set(children(work.process.pid)))


async def test_whoever_dies_together_is_reaped_together_and_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    for fifo in ("orphan", "command"):
        os.mkfifo(tmp_path / fifo)
    script = "(setsid sh -c 'echo $$; read _ < orphan' &); read _ < command; exit 7"
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, *shell(script)) as work,
        caller(worker) as asked,
    ):
        command = (await work.line("work_started"))["pid"]
        await _said(work.out, "\n")
        orphan = int(work.out.read_text())
        await until(lambda: orphan in children(work.process.pid))
        work.process.send_signal(signal.SIGSTOP)
        (tmp_path / "command").write_text("\n")
        await until(lambda: psutil.Process(command).status() == psutil.STATUS_ZOMBIE)
        (tmp_path / "orphan").write_text("\n")
        await until(lambda: psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE)
        work.process.send_signal(signal.SIGCONT)
        assert (await answered(asked))["result"] == {"exit_code": 7}
        assert not {command, orphan} & set(children(work.process.pid))


async def test_a_killed_orphan_guard_is_reaped_and_the_command_still_releases(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, *shell("read _ < gate; exit 4")) as work,
    ):
        async with caller(worker) as asked:
            command = (await work.line("work_started"))["pid"]
            (guard,) = set(children(work.process.pid)) - {command}
            os.kill(guard, signal.SIGKILL)
            await until(lambda: children(work.process.pid) == [command])
            (tmp_path / "gate").write_text("\n")
            assert (await answered(asked))["result"] == {"exit_code": 4}
        assert await work.terminate() == 0


async def test_the_end_of_the_command_is_seen_also_when_sigchld_was_blocked(tmp_path: Path) -> None:
    blocked = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD]); "
        "os.execv(sys.executable, [sys.executable, '-m', 'nullworker', 'work', '--', 'true'])"
    )
    async with WorkerProcess(tmp_path) as worker:
        port = str(worker.control_port)
        async with Program(tmp_path, sys.executable, "-c", blocked, NULL_CONTROL_PORT=port), caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 0}
