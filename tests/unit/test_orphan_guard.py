"""OrphanGuard: which process groups it kills. Tests of work, dev and demo use it with real kills."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from nullworker.processes import OrphanGuard

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
