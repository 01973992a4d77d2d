"""nullworker.consumer and the liveness connection: attached by default, again after restarts, by one consumer alone."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from harness import PATIENCE, WorkerProcess
from programs import Program, answered, caller, free_port, listens, session, until

from nullworker.consumer import Reservation, liveness, reservations
from nullworker.consumer.reservations import MOVES


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    port = str(free_port())
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=port, NULL_CONSUMER_GRACE_SECONDS="0.5") as process:
        yield process


async def first(found: AsyncGenerator[Reservation, None]) -> Reservation:
    return await asyncio.wait_for(found.__anext__(), PATIENCE)


def script(worker: WorkerProcess, body: str, **env: str) -> Program:
    """A consumer whose body is this; it prints the event `inside` in a line when told to."""
    text = f"""
import asyncio, json, os, subprocess, sys, time
from nullworker.consumer import health_endpoint, reservations, run
def say(event): print(json.dumps({{"event": event}}), file=sys.stderr, flush=True)
async def main():
    async with health_endpoint(int(os.environ.get("HEALTH_PORT", 0))):
        async for reservation in reservations():
            async with reservation:
                {body}
            say("left")
if __name__ == "__main__":
    run(main())
"""
    path = worker.folder / f"consumer{len(list(worker.folder.glob('consumer*.py')))}.py"
    path.write_text(text)
    return Program(worker.folder, sys.executable, str(path), NULL_CONTROL_PORT=str(worker.control_port), **env)


async def test_a_session_is_attached_to_and_extended_while_the_body_runs(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, MAX_RESERVATION_SECONDS="2") as worker:
        await session(worker, lifetime=1)
        found = reservations(worker.control)
        async with await first(found) as reservation:
            await worker.line("reservation_extended", nth=3)
            assert (await worker.get("/status"))["consumer"]["attached"] is True
            before = reservation.ends_at
            await until(lambda: reservation.ends_at > before)
        assert reservation.released
        await found.aclose()


async def test_requests_are_extended_no_more_by_themselves(worker: WorkerProcess) -> None:
    async with caller(worker, duration=1) as asked:
        found = reservations(worker.control)
        async with await first(found):
            await asyncio.Event().wait()
        assert (await answered(asked))["released"] == "duration_elapsed"
        await found.aclose()


async def test_a_consumer_that_is_killed_ends_its_hold(worker: WorkerProcess) -> None:
    await session(worker)
    async with script(worker, "say('inside'); await asyncio.sleep(1000)") as consumer:
        await consumer.line("inside")
        await consumer.kill()
        assert (await worker.line("reservation_cancelled"))["reason"] == "consumer_lost"


@pytest.mark.parametrize(
    "child",
    [
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])",
        "pid = os.fork(); pid or time.sleep(1000)",
        "__import__('multiprocessing').get_context('fork').Process(target=time.sleep, args=(1000,)).start()",
    ],
    ids=["executed", "forked", "multiprocessing"],
)
async def test_no_child_keeps_the_connection_of_a_dead_consumer(worker: WorkerProcess, child: str) -> None:
    await session(worker)
    body, port = f"{child}; say('inside'); await asyncio.sleep(1000)", free_port()
    async with script(worker, body, TEST_MARK="kept", HEALTH_PORT=str(port)) as consumer:
        await consumer.line("inside")
        children = psutil.Process(consumer.process.pid).children()
        try:
            assert listens(port)
            consumer.process.kill()
            assert (await worker.line("reservation_cancelled"))["reason"] == "consumer_lost"
            assert not listens(port), "nor that of the health endpoint"
            assert any(each.is_running() for each in children)
        finally:
            for each in children:
                with contextlib.suppress(psutil.Error):
                    each.kill()


async def test_a_second_consumer_is_told_so_and_waits_until_the_first_is_gone(worker: WorkerProcess) -> None:
    known_as = await session(worker)
    body = "say('inside'); await asyncio.sleep(1000)"
    async with script(worker, body) as one:
        await one.line("inside")
        async with script(worker, body) as two:
            text = f"another consumer is attached to reservation {known_as}"
            await two.line("", where=lambda line: text in line["text"])
            assert not [line for line in two.lines if line.get("event") == "inside"]
            assert await one.terminate() == 0
            async with caller(worker):
                await two.line("inside")


async def test_after_its_own_restart_a_consumer_attaches_again_in_time(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, NULL_CONSUMER_GRACE_SECONDS="60") as worker:
        known_as = await session(worker)
        async with script(worker, "say('inside'); await asyncio.sleep(1000)") as consumer:
            await consumer.line("inside")
            await consumer.kill()
            await consumer.start()
            await consumer.line("inside")
            assert (await worker.get("/reservation"))["id"] == known_as
        attached = [line for line in worker.lines if line["event"] == "consumer_attached"]
        assert [line["first"] for line in attached] == [True, False]


async def test_after_a_restart_of_the_worker_it_attaches_again(worker: WorkerProcess) -> None:
    known_as = await session(worker)
    found = reservations(worker.control)
    async with await first(found) as reservation:
        await worker.kill()
        await worker.start()
        await worker.line("consumer_attached")
        assert (await worker.get("/status"))["consumer"]["attached"] is True
        assert not reservation.gone.is_set()
    assert (reservation.id, reservation.released) == (known_as, True)
    await found.aclose()


async def test_one_whose_place_another_has_taken_stops(worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    await session(worker)
    found = reservations(worker.control)
    async with await first(found) as reservation:
        reservation._connection.close()
        await worker.line("consumer_detached")
        url = f"{worker.control}/attach?reservation_id={reservation.id}"
        async with aiohttp.ClientSession() as http, http.post(url):
            again = liveness.LivenessConnection(worker.control, reservation.id, extend="1", changed=lambda: None)
            again.start()
            reservation._connection = again
            await asyncio.wait_for(asyncio.Event().wait(), PATIENCE)
    assert reservation.gone_because == "another consumer has attached to it"
    again.close()
    await found.aclose()


async def test_a_body_that_blocks_the_loop_is_held_and_healthy_and_ends_at_sigterm(tmp_path: Path) -> None:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}/health"
    health = {"NULL_HEALTH_INTERVAL": "0.1", "NULL_UNHEALTHY_ACTION": "cancel", "NULL_HEALTH_TIMEOUT": "1"}
    module = ("-m", "nullworker", "serve")
    body = "say('inside'); time.sleep(3); say('awake'); time.sleep(1000)"
    async with (
        WorkerProcess(tmp_path, module=module, MAX_RESERVATION_SECONDS="1", BACKEND_HEALTH_URL=url, **health) as worker,
        script(worker, body, HEALTH_PORT=port) as consumer,
    ):
        await worker.line("consumer_healthy")
        known_as = await session(worker, lifetime=1)
        await consumer.line("inside")
        await consumer.line("awake")  # three times the hold
        assert (await worker.get("/reservation"))["id"] == known_as
        assert (await worker.get("/status"))["consumer"]["healthy"] is True
        before = asyncio.get_running_loop().time()
        assert await consumer.terminate() == 1
        assert asyncio.get_running_loop().time() - before < 5
        (row,) = (await worker.get("/reservations"))["reservations"]
        assert (row["state"], row["result"]) == (
            "released",
            {"error": "the consumer was stopped in the middle of a job"},
        )


async def test_a_signal_to_a_forked_child_is_no_signal_to_the_consumer(worker: WorkerProcess) -> None:
    await session(worker)
    fork = "pid = os.fork(); pid or time.sleep(1000); os.kill(pid, 15); say(str(os.waitpid(pid, 0)[1]))"
    body = f"{fork}; await asyncio.sleep(1000)"
    async with script(worker, body) as consumer:
        await consumer.line(str(int(signal.SIGTERM)))
        await asyncio.sleep(0.3)
        assert consumer.process.returncode is None
        assert (await worker.get("/reservation")) is not None


# -- the deadline, and whose cancellation it is --------------------------------------------------------------------


async def test_a_deadline_that_others_have_moved_is_noted(worker: WorkerProcess) -> None:
    async with caller(worker, duration=30):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            async with aiohttp.ClientSession() as http:
                body = {"reservation_id": reservation.id, "seconds": 500}
                async with http.post(worker.control + "/extend", json=body) as answer:
                    told = await answer.json()
            await until(lambda: reservation.ends_at == told["ends_at"])
            assert 450 < reservation.seconds_left() <= 500
        await found.aclose()


async def test_a_silent_worker_is_waited_for_no_longer_than_to_the_deadline_of_a_request(worker: WorkerProcess) -> None:
    async with caller(worker, duration=2):
        found = reservations(worker.control, patience=1000)
        async with await first(found) as reservation:
            await worker.kill()
            await asyncio.wait_for(asyncio.Event().wait(), PATIENCE)
        assert str(reservation.gone_because).startswith("the worker is gone")
        await found.aclose()


async def test_a_silent_worker_is_waited_for_no_longer_than_the_patience(worker: WorkerProcess) -> None:
    async with caller(worker, duration=1000):
        found = reservations(worker.control, patience=0.5)
        async with await first(found) as reservation:
            await worker.kill()
            await asyncio.wait_for(asyncio.Event().wait(), PATIENCE)
        assert str(reservation.gone_because).startswith("the worker is gone")
        await found.aclose()


async def test_what_a_cancelled_body_raises_is_heard(worker: WorkerProcess) -> None:
    found = reservations(worker.control)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(caller(worker))
        reservation = await first(found)
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with reservation:
                await stack.aclose()
                try:
                    await asyncio.Event().wait()
                finally:
                    _ = 1 / 0
    await found.aclose()


async def test_a_cancellation_from_outside_that_comes_with_ours_goes_on(worker: WorkerProcess) -> None:
    found = reservations(worker.control)
    hang_up = contextlib.AsyncExitStack()
    await hang_up.enter_async_context(caller(worker))
    reservation = await first(found)

    async def body() -> None:
        async with reservation:
            await hang_up.aclose()
            await asyncio.Event().wait()

    async def cancel_too() -> None:
        await reservation.gone.wait()
        task.cancel()  # in the same turn of the loop: the body sees one CancelledError for both

    task, other = asyncio.ensure_future(body()), asyncio.ensure_future(cancel_too())
    await asyncio.wait({task}, timeout=PATIENCE)
    await other
    assert task.cancelled() is (sys.version_info >= (3, 11))  # 3.10 does not count cancellations
    await found.aclose()


def test_the_picture_of_the_states_is_the_table() -> None:
    source = Path(sys.modules["nullworker.consumer.reservations"].__file__ or "").read_text()
    drawn = re.findall(r"^\s*(\w+) --> (\w+): (\w+)$", source, re.MULTILINE)
    assert {(before, move): after for before, after, move in drawn} == MOVES
