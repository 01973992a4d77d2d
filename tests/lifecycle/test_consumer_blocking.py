"""Code that blocks in a consumer: a process that ends with the reservation, a thread that no other job overtakes."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import aiohttp
import blocking_jobs
import psutil
import pytest
from harness import PATIENCE, WorkerProcess
from programs import answered, caller, until

from nullworker.consumer import ChildDied, Reservation, blocking, current, health_endpoint, reservations
from nullworker.processes import OrphanGuard


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(tmp_path) as process:
        yield process


async def first(found: AsyncGenerator[Reservation, None]) -> Reservation:
    return await asyncio.wait_for(found.__anext__(), PATIENCE)


async def test_what_a_process_returns_or_raises_comes_back(worker: WorkerProcess) -> None:
    async with caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            assert await reservation.run_process(blocking_jobs.double, 21) == 42
            with pytest.raises(ValueError, match="no such page"):
                await reservation.run_process(blocking_jobs.raise_value_error)
            with pytest.raises(ChildDied, match="die has ended: killed by SIGSEGV"):
                await reservation.run_process(blocking_jobs.die, int(signal.SIGSEGV))
            with pytest.raises(TypeError, match="cannot be pickled"):
                await reservation.run_process(blocking_jobs.unpicklable)
        assert reservation.released
        await found.aclose()


async def test_a_function_that_cannot_be_sent_to_a_process_is_refused_with_its_own_error() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        await blocking.run_process(lambda: None, (), kill_after=1.0)


async def test_a_process_is_in_the_care_of_a_guard_for_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer: afterwards its number may be another's."""
    calls: list[str] = []

    class Guard(OrphanGuard):
        def hold(self, group: int) -> None:
            calls.append("hold")
            super().hold(group)

        def forget(self, group: int) -> None:
            calls.append("forget")
            assert not psutil.pid_exists(group)
            super().forget(group)

        def close(self) -> None:
            calls.append("close")
            super().close()

    monkeypatch.setattr(blocking, "OrphanGuard", Guard)
    assert await blocking.run_process(blocking_jobs.double, (21,), kill_after=1.0) == 42
    with pytest.raises(ValueError, match="no such page"):
        await blocking.run_process(blocking_jobs.raise_value_error, (), kill_after=1.0)
    assert calls == ["hold", "forget", "close"] * 2


@pytest.mark.parametrize("stubborn", [False, True], ids=["at_sigterm", "at_sigkill"])
async def test_a_process_and_its_children_end_with_the_reservation(worker: WorkerProcess, stubborn: bool) -> None:
    file = worker.folder / "pids"
    function = blocking_jobs.ignore_sigterm if stubborn else blocking_jobs.hang
    found = reservations(worker.control)
    hang_up = contextlib.AsyncExitStack()
    await hang_up.enter_async_context(caller(worker))
    async with await first(found) as reservation:
        job = asyncio.ensure_future(reservation.run_process(function, file, kill_after=0.5))
        await until(lambda: file.exists() and len(file.read_text().split()) == 2)
        await hang_up.aclose()
        await job
    assert reservation.gone_because == "cancelled, client_disconnect"
    assert job.cancelled()
    assert not [pid for pid in map(int, file.read_text().split()) if psutil.pid_exists(pid)]
    await found.aclose()


async def test_a_process_is_killed_at_once_when_its_body_is_cancelled_again(worker: WorkerProcess) -> None:
    file = worker.folder / "pids"
    async with caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            job = asyncio.ensure_future(reservation.run_process(blocking_jobs.ignore_sigterm, file, kill_after=1000))
            await until(lambda: file.exists() and len(file.read_text().split()) == 2)
            job.cancel()
            await asyncio.sleep(0.1)
            assert not job.done()
            job.cancel()
            await asyncio.wait([job], timeout=PATIENCE)
            assert job.cancelled()
        assert not [pid for pid in map(int, file.read_text().split()) if psutil.pid_exists(pid)]
        await found.aclose()


async def test_a_process_that_has_only_just_been_started_hears_sigterm_too() -> None:
    """It has no group of its own yet."""
    job = asyncio.ensure_future(blocking.run_process(time.sleep, (1000,), kill_after=1000.0))
    await asyncio.sleep(0)
    job.cancel()
    await asyncio.wait([job], timeout=PATIENCE)
    assert job.cancelled()


async def test_a_cancellation_after_the_result_while_a_child_is_ended_is_heard(worker: WorkerProcess) -> None:
    file = worker.folder / "ready"
    async with caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            job = asyncio.ensure_future(reservation.run_process(blocking_jobs.leave_a_child, file, kill_after=1000))
            await until(file.exists)
            await asyncio.sleep(0.5)
            assert not job.done(), "the child still runs"
            job.cancel()
            await asyncio.wait([job], timeout=PATIENCE)
            assert job.cancelled()
        await found.aclose()


async def test_a_stopped_process_hears_sigterm(worker: WorkerProcess) -> None:
    file = worker.folder / "said"
    found = reservations(worker.control)
    hang_up = contextlib.AsyncExitStack()
    await hang_up.enter_async_context(caller(worker))
    async with await first(found) as reservation:
        job = asyncio.ensure_future(reservation.run_process(blocking_jobs.stand_still, file, kill_after=PATIENCE))
        await until(lambda: file.exists() and file.read_text() == "stopped")
        await hang_up.aclose()
        await job
    assert job.cancelled()
    assert file.read_text() == "told"
    await found.aclose()


async def test_the_loop_is_free_while_a_process_works(worker: WorkerProcess) -> None:
    gate = worker.folder / "gate"
    async with caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            job = asyncio.ensure_future(reservation.run_process(blocking_jobs.until_file, gate))
            async with aiohttp.ClientSession() as http, http.get(worker.control + "/status") as answer:
                assert answer.status == 200
            assert "_receive" not in {thread.name for thread in threading.enumerate()}, "no thread waits for the result"
            gate.touch()
            await job
        await found.aclose()


async def test_no_other_reservation_is_taken_while_a_thread_of_the_last_one_runs(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current, "PATIENCE_SECONDS", 0.1)
    gate, taken = worker.folder / "gate", list[str]()

    async def consumer() -> None:
        async for reservation in reservations(worker.control):
            async with reservation:
                taken.append(reservation.id)
                if len(taken) == 1:
                    await reservation.run_thread(blocking_jobs.until_file, gate)

    async with health_endpoint(0) as port:
        task = asyncio.ensure_future(consumer())
        async with caller(worker):
            await until(lambda: len(taken) == 1)
            await worker.line("consumer_attached")
        await worker.line("reservation_cancelled")
        async with caller(worker) as asked:
            await worker.line("reservation_held", nth=2)

            async def health() -> int:
                async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/health") as answer:
                    return answer.status

            while await health() == 200:  # noqa: ASYNC110  # what another thread says rings no bell
                await asyncio.sleep(0.05)
            assert len(taken) == 1
            gate.touch()
            assert (await answered(asked))["released"] == "explicit"
            assert await health() == 200
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(taken) == 2


async def test_a_release_waits_for_a_thread_that_the_body_has_left(worker: WorkerProcess) -> None:
    gate = worker.folder / "gate"
    async with caller(worker) as asked:
        found = reservations(worker.control)
        opened = asyncio.get_running_loop().call_later(0.5, gate.touch)
        async with await first(found) as reservation:
            asyncio.ensure_future(reservation.run_thread(blocking_jobs.until_file, gate)).add_done_callback(print)
            await asyncio.sleep(0)
        assert gate.exists()
        opened.cancel()
        assert (await answered(asked))["released"] == "explicit"
        await found.aclose()


async def test_a_consumer_that_is_stopped_does_not_wait_for_its_threads(worker: WorkerProcess) -> None:
    gate = worker.folder / "gate"
    inside = asyncio.Event()

    async def consumer() -> None:
        async for reservation in reservations(worker.control):
            async with reservation:
                inside.set()
                await reservation.run_thread(blocking_jobs.until_file, gate)

    async with caller(worker) as asked:
        task = asyncio.ensure_future(consumer())
        await asyncio.wait_for(inside.wait(), PATIENCE)
        task.cancel()
        assert (await answered(asked))["result"] == {"error": "the consumer was stopped"}
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "until_file")
        assert thread.daemon, "the exit of the process waits for all others"
        gate.touch()
        await asyncio.wait({task}, timeout=PATIENCE)
        assert task.cancelled()
