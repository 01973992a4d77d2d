"""nullworker.consumer.reservations with real workers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import PATIENCE, WorkerProcess, post
from programs import answered, caller, free_port, session, until

from nullworker.clock import SystemClock
from nullworker.consumer import Reservation, ResultRefused, health_endpoint, reservations
from nullworker.consumer.control_port import AsyncControlClient
from nullworker.errors import WorkerUnreachable

#: The module: `nullworker.consumer.reservations` itself is the function of that name.
loop_module = importlib.import_module("nullworker.consumer.reservations")


async def first(found: AsyncGenerator[Reservation, None]) -> Reservation:
    """The next reservation."""
    return await asyncio.wait_for(found.__anext__(), PATIENCE)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port())) as process:
        yield process


async def test_the_result_of_the_body_reaches_the_caller(worker: WorkerProcess) -> None:
    async with caller(worker, metadata={"job": 7}) as asked:
        async for reservation in reservations(worker.control):
            async with reservation:
                assert (reservation.metadata, reservation.kind) == ({"job": 7}, "request")
                reservation.result = {"pages": 3}
            assert (reservation.released, reservation.gone_because) == (True, None)
            break
        assert (await answered(asked))["result"] == {"pages": 3}
    assert worker.story()[-1] == ("released", "explicit")


async def test_a_body_without_a_result_releases_without_one_and_knows_its_time_from_the_beginning(
    worker: WorkerProcess,
) -> None:
    async with caller(worker, duration=60) as asked:
        await worker.line("reservation_held")
        await asyncio.sleep(0.5)
        found = reservations(worker.control)
        reservation = await first(found)
        ends_at = datetime.fromisoformat(reservation.ends_at.replace("Z", "+00:00")).timestamp()
        assert reservation.seconds_left() == pytest.approx(ends_at - SystemClock().now(), abs=0.4)
        assert reservation.metadata == {}
        async with reservation:
            assert reservation.may_begin()
        assert reservation.released
        assert (await answered(asked)).get("result") is None
        await found.aclose()


async def test_one_after_another_also_when_they_wait_already(worker: WorkerProcess) -> None:
    async with caller(worker) as one, caller(worker) as two, caller(worker) as three:
        count = 0
        async for reservation in reservations(worker.control):
            async with reservation:
                count += 1
                reservation.result = count
            if count == 3:
                break
        assert sorted([(await answered(asked))["result"] for asked in (one, two, three)]) == [1, 2, 3]


async def test_a_body_that_raises_releases_with_the_error_and_is_heard(worker: WorkerProcess) -> None:
    async with caller(worker) as asked:
        found = reservations(worker.control)
        reservation = await first(found)
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with reservation:
                reservation.result = "half of it"
                _ = 1 / 0
        assert (await answered(asked))["result"] == {"error": "ZeroDivisionError: division by zero"}
        await found.aclose()


async def test_a_body_that_is_stopped_from_outside_releases_too(worker: WorkerProcess) -> None:
    inside = asyncio.Event()

    async def consumer() -> None:
        async for reservation in reservations(worker.control):
            try:
                async with reservation:
                    inside.set()
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                # from Python 3.11 on cancellations are counted: this one is not over
                assert getattr(asyncio.current_task(), "cancelling", lambda: 1)() == 1
                raise

    async with caller(worker) as asked:
        task = asyncio.ensure_future(consumer())
        await asyncio.wait_for(inside.wait(), PATIENCE)
        task.cancel()
        assert (await answered(asked))["result"] == {"error": "the consumer was stopped"}
        with pytest.raises(asyncio.CancelledError):
            await task


def nested(levels: int) -> list[Any]:
    """As many lists in one another."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (float("nan"), "the result is not JSON"),
        ({1, 2}, "the result is not JSON"),
        ("x" * 70_000, "must be at most 65536"),
        ("x" * 3_000_000, "at most 1048576 bytes"),
        (nested(600), "nests more than 512 deep"),
        (nested(100_000), "the result is not JSON"),
    ],
    ids=["no number", "no JSON", "too large", "larger than a body", "too deep", "deeper than Python goes"],
)
async def test_a_result_that_cannot_be_sent_still_releases(worker: WorkerProcess, result: Any, why: str) -> None:
    async with caller(worker) as asked:
        found = reservations(worker.control)
        with pytest.raises(ResultRefused, match=why):
            async with await first(found) as reservation:
                reservation.result = result
        assert why in (await answered(asked))["result"]["error"]
        await found.aclose()


async def test_the_body_is_cancelled_when_the_caller_hangs_up_and_the_loop_goes_on(worker: WorkerProcess) -> None:
    inside, seen = asyncio.Event(), list[str | None]()

    async def consumer() -> None:
        async for reservation in reservations(worker.control):
            async with reservation:
                inside.set()
                if not seen:
                    await asyncio.Event().wait()
            seen.append(reservation.gone_because)
            if len(seen) == 2:
                return

    task = asyncio.ensure_future(consumer())
    async with caller(worker):
        await asyncio.wait_for(inside.wait(), PATIENCE)
    async with caller(worker) as asked:
        assert (await answered(asked))["released"] == "explicit"
    await asyncio.wait_for(task, PATIENCE)
    assert seen == ["cancelled, client_disconnect", None]


async def test_the_body_is_cancelled_at_the_deadline_of_a_request(worker: WorkerProcess) -> None:
    async with caller(worker, duration=1) as asked:
        found = reservations(worker.control)
        async with await first(found) as reservation:
            await asyncio.Event().wait()
        assert reservation.gone_because == "expired, duration_elapsed"
        assert (await answered(asked))["released"] == "duration_elapsed"
        await found.aclose()


async def test_a_body_may_take_longer_than_the_caller_asked_for(worker: WorkerProcess) -> None:
    async with caller(worker, duration=1.5) as asked:
        found = reservations(worker.control, extend=True)
        async with await first(found) as reservation:
            before = reservation.ends_at
            await worker.line("reservation_extended")
            await until(lambda: reservation.ends_at > before)
            assert reservation.seconds_left() > 0
        assert (await answered(asked))["released"] == "explicit"
        await found.aclose()


async def test_without_cancel_the_body_looks_for_itself(worker: WorkerProcess) -> None:
    found = reservations(worker.control, cancel=False)
    async with caller(worker):
        reservation = await first(found)
    async with reservation:
        await asyncio.wait_for(reservation.gone.wait(), PATIENCE)
    assert (reservation.gone_because, reservation.released) == ("cancelled, client_disconnect", False)
    await found.aclose()


async def test_a_session_goes_on_when_the_worker_is_killed_and_restarted(worker: WorkerProcess) -> None:
    session_id = await session(worker)
    found = reservations(worker.control)
    async with await first(found) as reservation:
        await worker.kill()
        await worker.start()
        assert (await worker.get("/reservation"))["id"] == session_id
    assert (reservation.id, reservation.released) == (session_id, True)
    assert worker.story()[-1] == ("released", "explicit")
    await found.aclose()


async def test_a_release_that_nobody_heard_is_made_when_the_worker_is_back(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "RELEASE_SECONDS", 1.0)
    await session(worker)
    found = reservations(worker.control)
    async with await first(found) as reservation:
        reservation.result = "done"
        await worker.kill()
    assert not reservation.released
    following = asyncio.ensure_future(first(found))
    await worker.start()
    async with caller(worker):
        assert (await following).id != reservation.id
    assert reservation.released
    assert (await worker.get("/reservations?state=released"))["reservations"][0]["result"] == "done"
    await found.aclose()


async def test_a_release_whose_answer_was_lost_is_known_as_taken(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, lost = AsyncControlClient.post, list[str]()

    async def loses_the_first_answer(control: AsyncControlClient, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answer = await ask(control, path, body)
        if path == "/release" and not lost:
            lost.append(path)
            raise WorkerUnreachable("the connection broke")
        return answer

    monkeypatch.setattr(AsyncControlClient, "post", loses_the_first_answer)
    async with caller(worker) as asked:
        found = reservations(worker.control)
        async with await first(found) as reservation:
            reservation.result = "done"
        assert (lost, reservation.released, reservation.gone_because) == (["/release"], True, None)
        assert (await answered(asked))["result"] == "done"
        await found.aclose()


async def test_a_release_of_somebody_else_is_not_taken_for_ours(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, failed = AsyncControlClient.post, list[str]()

    async def is_late(control: AsyncControlClient, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not failed:
            failed.append(path)
            await ask(control, path, {})  # an operator's
            raise WorkerUnreachable("the connection broke")
        return await ask(control, path, body)

    monkeypatch.setattr(AsyncControlClient, "post", is_late)
    async with caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            reservation.result = "done"
        assert not reservation.released
        assert reservation.gone_because == "the reservation has ended: released, explicit"
        await found.aclose()


async def test_how_one_has_ended_is_known_however_many_came_after_it(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, NULL_MAX_QUEUE_SECONDS="0") as worker:
        async with caller(worker):
            one = (await worker.line("reservation_held"))["reservation_id"]
        await worker.line("reservation_cancelled")
        async with caller(worker):
            await worker.line("reservation_held", nth=2)
            for _ in range(60):
                assert (await post(worker.url + "/reserve", {})).status == 429
            control = AsyncControlClient(worker.control)
            async with control.http:
                assert await control.fate(one) == "cancelled, client_disconnect"
                assert await control.fate("never-was") == "the worker does not hold it any more"


async def test_seconds_left_are_no_more_than_the_worker_allows(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, MAX_RESERVATION_SECONDS="100") as worker, caller(worker):
        found = reservations(worker.control)
        async with await first(found) as reservation:
            assert await reservation.extend(10_000)
            assert 50 < reservation.seconds_left() < 101
        await found.aclose()


async def test_a_worker_that_stays_dead_ends_the_body(worker: WorkerProcess) -> None:
    await session(worker)
    found = reservations(worker.control, patience=0.2)
    async with await first(found) as reservation:
        await worker.kill()
        await asyncio.Event().wait()
    assert str(reservation.gone_because).startswith("the worker is gone: no worker answers on")
    await found.aclose()


async def test_a_consumer_may_be_there_before_its_worker(tmp_path: Path) -> None:
    port = free_port()
    found = reservations(f"http://127.0.0.1:{port}")
    waiting = asyncio.ensure_future(first(found))
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(port)) as worker, caller(worker) as asked:
        async with await waiting:
            pass
        assert (await answered(asked))["released"] == "explicit"
        await found.aclose()


async def test_a_late_consumer_cannot_release_the_reservation_of_another(worker: WorkerProcess) -> None:
    found = reservations(worker.control)
    first_caller = contextlib.AsyncExitStack()
    await first_caller.enter_async_context(caller(worker))
    async with await first(found) as late:
        late._watcher.cancel()  # it hears of nothing any more
        await first_caller.aclose()
        second = await first_caller.enter_async_context(caller(worker))
        held = (await worker.line("reservation_held", nth=2))["reservation_id"]
    assert not late.released
    assert late.gone_because == "the reservation has ended: cancelled, client_disconnect"
    assert (await worker.get("/reservation"))["id"] == held
    assert not second.done()
    await first_caller.aclose()
    await found.aclose()


async def test_a_reservation_that_is_not_held_as_it_should_be_is_a_mistake(worker: WorkerProcess) -> None:
    found = reservations(worker.control)
    async with caller(worker):
        await first(found)
        with pytest.raises(RuntimeError, match="async with reservation"):
            await first(found)


async def test_the_worker_on_this_machine_is_found_by_its_setting_or_at_the_usual_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for port in ("18999", "19000"):
        client = AsyncControlClient(None)
        await client.http.close()
        assert client.url == f"http://127.0.0.1:{port}"
        monkeypatch.setenv("NULL_CONTROL_PORT", "19000")


async def test_the_health_endpoint_says_what_is_wrong() -> None:
    trouble: list[str | None] = [None]
    async with health_endpoint(0, lambda: trouble[0]) as port, aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{port}/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
            assert answer.content_length == len(await answer.read())
        trouble[0] = "the queue is away"
        async with http.get(f"http://127.0.0.1:{port}/health?from=worker") as answer:
            assert (answer.status, await answer.json()) == (503, {"status": "error", "why": "the queue is away"})
        async with http.get(f"http://127.0.0.1:{port}/status") as answer:
            assert answer.status == 404
