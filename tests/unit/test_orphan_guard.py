"""Which process groups OrphanGuard kills, and the end of a ChildProcess. Tests of work, dev and demo do the rest."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nullworker.processes import ChildProcess, OrphanGuard

pytestmark = pytest.mark.process


@contextlib.contextmanager
def groups(*commands: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Each command in a process group of its own; none is left."""
    processes = [subprocess.Popen(command.split(), start_new_session=True) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_held_at_the_end_gets_the_signal_and_what_was_forgotten_goes_on(number: signal.Signals) -> None:
    with groups("sleep 1000", "sleep 1000", "sleep 1000") as processes:
        first, forgotten, last = processes
        guard = OrphanGuard(number)
        for process in processes:
            guard.hold(process.pid)
        guard.hold(forgotten.pid)
        for _ in range(2):
            guard.forget(forgotten.pid)
        guard.close()
        assert [process.wait(20) for process in (first, last)] == [-number, -number]
        assert forgotten.poll() is None


def test_a_group_that_has_ended_by_itself_does_not_spare_the_others() -> None:
    with groups("true", "sleep 1000") as (gone, left):
        guard = OrphanGuard(signal.SIGTERM)
        guard.hold(gone.pid)
        guard.hold(left.pid)
        gone.wait()
        guard.close()
        assert left.wait(20) == -signal.SIGTERM


def test_a_child_that_is_stopped_hears_sigterm(tmp_path: Path) -> None:
    """SIGTERM waits for a stopped process until it is continued: without SIGCONT only SIGKILL would end it."""
    script = "trap 'exit 5' TERM; kill -STOP $$; exit 1"
    with contextlib.closing(OrphanGuard(signal.SIGKILL)) as guard:
        child = ChildProcess(["/bin/sh", "-c", script], env={}, cwd=tmp_path, out=tmp_path / "out", guard=guard)
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        child.end(kill_at=20.0)
        for now in range(20):
            if (code := child.poll(now)) is not None:
                break
            time.sleep(0.1)
        assert code == 5
