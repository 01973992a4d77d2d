"""How nullworker.consumer.reservations stops: what the body has finished is released with its result."""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, WorkerProcess
from programs import Program, answered, caller, session

from nullworker.consumer import reservations
from nullworker.consumer.control_port import AsyncControlClient

#: The module: `nullworker.consumer.reservations` itself is the function of that name.
loop_module = importlib.import_module("nullworker.consumer.reservations")


class SlowRelease:
    """Holds each POST /release back until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.may_go_on = asyncio.Event(), asyncio.Event()
        post = AsyncControlClient.post

        async def slow(control: AsyncControlClient, path: str, body: dict[str, Any]) -> tuple[int, Any]:
            if path == "/release":
                self.asked.set()
                await self.may_go_on.wait()
            return await post(control, path, body)

        monkeypatch.setattr(AsyncControlClient, "post", slow)


async def consumer(worker: WorkerProcess, at_the_end: Callable[[], object] = lambda: None) -> None:
    """Does each job at once, and calls `at_the_end` as the last thing of each body."""
    async for reservation in reservations(worker.control):
        async with reservation:
            reservation.result = "done"
            at_the_end()


async def is_cancelled(task: asyncio.Task[None]) -> bool:
    """Wait for its end."""
    await asyncio.wait({task}, timeout=PATIENCE)
    return task.cancelled()


async def test_a_body_that_is_done_is_released_with_its_result_when_it_is_stopped_at_that_moment(
    tmp_path: Path,
) -> None:
    async with WorkerProcess(tmp_path) as worker:
        task = asyncio.ensure_future(consumer(worker, lambda: task.cancel()))
        async with caller(worker) as asked:
            assert (await answered(asked))["result"] == "done"
        assert await is_cancelled(task)


async def test_a_release_under_way_is_made_to_its_end_however_often_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = SlowRelease(monkeypatch)
    async with WorkerProcess(tmp_path) as worker:
        task = asyncio.ensure_future(consumer(worker))
        async with caller(worker) as asked:
            await asyncio.wait_for(release.asked.wait(), PATIENCE)
            for _ in range(2):
                task.cancel()
                await asyncio.wait({task}, timeout=0)  # so that it hears of each
            release.may_go_on.set()
            assert (await answered(asked))["result"] == "done"
        assert await is_cancelled(task)


async def test_a_release_that_is_made_again_is_made_to_its_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = SlowRelease(monkeypatch)
    monkeypatch.setattr(loop_module, "RELEASE_SECONDS", 0)  # as if nobody had answered the first

    async def stubborn() -> None:
        async for reservation in reservations(worker.control):
            async with reservation:
                reservation.result = "done"
            monkeypatch.setattr(loop_module, "RELEASE_SECONDS", PATIENCE)

    async with WorkerProcess(tmp_path) as worker:
        await session(worker)
        task = asyncio.ensure_future(stubborn())
        await asyncio.wait_for(release.asked.wait(), PATIENCE)
        task.cancel()
        release.may_go_on.set()
        assert await is_cancelled(task)
        (row,) = (await worker.get("/reservations"))["reservations"]
        assert (row["state"], row["result"]) == ("released", "done")


async def test_a_worker_that_answers_nothing_does_not_hold_up_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowRelease(monkeypatch)
    monkeypatch.setattr(loop_module, "RELEASE_SECONDS", 0.1)
    async with WorkerProcess(tmp_path) as worker, caller(worker):
        task = asyncio.ensure_future(consumer(worker, lambda: task.cancel()))
        assert await is_cancelled(task)


async def test_a_stop_goes_on_also_when_the_result_is_refused(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker) as asked:
        found = reservations(worker.control)

        async def one() -> None:
            async with await found.__anext__() as reservation:
                reservation.result = {1, 2}
                task.cancel()

        task = asyncio.ensure_future(one())
        assert "the result is not JSON" in (await answered(asked))["result"]["error"]
        assert await is_cancelled(task)
        await found.aclose()


async def test_a_body_that_is_done_is_not_cancelled_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, may_be_told = asyncio.Event(), asyncio.Event()

    async def fate(*_: object) -> str:
        gone.set()
        await may_be_told.wait()
        return "gone"

    monkeypatch.setattr(AsyncControlClient, "fate", fate)
    async with WorkerProcess(tmp_path) as worker:
        found = reservations(worker.control)
        async with caller(worker):
            reservation = await asyncio.wait_for(found.__anext__(), PATIENCE)
        async with reservation:
            await asyncio.wait_for(gone.wait(), PATIENCE)
            may_be_told.set()
        assert reservation.gone_because == "the reservation has ended: cancelled, client_disconnect"
        await found.aclose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("rest_of_the_body", "result"),
    [
        ('print(\'{"event": "inside"}\', file=sys.stderr, flush=True); await asyncio.sleep(1000)', None),
        ("reservation.result = 'done'; os.kill(os.getpid(), int(sys.argv[1]))", "done"),
    ],
    ids=["in_the_body", "at_its_end"],
)
async def test_a_consumer_that_is_told_to_stop_releases_and_exits_0(
    tmp_path: Path, number: signal.Signals, rest_of_the_body: str, result: str | None
) -> None:
    script = tmp_path / "consumer.py"
    script.write_text(f"""
import asyncio, os, sys
from nullworker.consumer import reservations, run
async def main():
    async for reservation in reservations():
        async with reservation:
            {rest_of_the_body}
run(main())
""")
    async with WorkerProcess(tmp_path) as worker:
        port, command = str(worker.control_port), (sys.executable, str(script), str(int(number)))
        async with Program(tmp_path, *command, NULL_CONTROL_PORT=port) as program, caller(worker) as asked:
            if result is None:
                await program.line("inside")
                program.process.send_signal(number)
            assert await program.exit_code() == 0
            assert (await answered(asked))["result"] == (result or {"error": "the consumer was stopped"})


async def test_a_stop_whose_cancellation_is_swallowed_is_a_stop_all_the_same(tmp_path: Path) -> None:
    """Clients of queues have swallowed cancellations: then the body ends by itself, and no other one begins."""
    script = tmp_path / "consumer.py"
    script.write_text("""
import asyncio, sys
from nullworker.consumer import reservations, run
async def main():
    async for reservation in reservations():
        async with reservation:
            print('{"event": "inside"}', file=sys.stderr, flush=True)
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                reservation.result = reservation.may_begin()
run(main())
""")
    async with WorkerProcess(tmp_path) as worker:
        port = str(worker.control_port)
        command = (sys.executable, str(script))
        async with Program(tmp_path, *command, NULL_CONTROL_PORT=port) as program, caller(worker) as asked:
            await program.line("inside")
            async with caller(worker):
                await worker.line("reservation_queued", nth=2)
                assert await program.terminate() == 0
                assert (await answered(asked))["result"] is False
