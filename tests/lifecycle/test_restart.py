"""Restarts after a kill and after a stop: what callers, the autoscaler and the log get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import Answer, WorkerProcess, changed, leave_session, post, secured, signed
from programs import until

from nullworker.clock import SystemClock, stopwatch
from nullworker.testing import FakeAutoscaler


@pytest.fixture
async def worker(vast: FakeAutoscaler, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with secured(tmp_path, vast, NULL_DRAIN_SECONDS="1") as worker:
        await worker.line("key_loaded")
        yield worker


async def start(worker: WorkerProcess) -> None:
    await worker.start()
    await worker.line("key_loaded")


class Claims:
    """Requests under way at one worker, in the order in which it took them."""

    def __init__(self, vast: FakeAutoscaler) -> None:
        self.vast = vast
        self.idxs: list[int] = []
        self.tasks: list[asyncio.Task[Answer]] = []

    async def add(self, worker: WorkerProcess, **payload: Any) -> asyncio.Task[Answer]:
        body = signed(self.vast, worker.url, payload)
        self.idxs.append(body["auth_data"]["request_idx"])
        self.tasks.append(asyncio.ensure_future(post(worker.url + "/reserve", body)))
        await worker.line("reservation_queued", where=lambda line: line["request_idx"] == self.idxs[-1])
        return self.tasks[-1]

    async def are_cut(self) -> None:
        """Their connections have died without an answer."""
        for result in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert isinstance(result, aiohttp.ClientError)
        self.tasks = []


async def create(vast: FakeAutoscaler, worker: WorkerProcess, lifetime: float = 60) -> tuple[str, dict[str, Any]]:
    """A session: its id and its auth."""
    body = signed(vast, worker.url, {"lifetime": lifetime})
    answer = await post(worker.url + "/session/create", body)
    assert answer.status == 201
    return answer.body["session_id"], body["auth_data"]


async def reserve_and_release(claims: Claims, worker: WorkerProcess) -> None:
    task = await claims.add(worker)
    assert (await worker.release())["released"] is True
    assert (await task).status == 200


# -- killed ----------------------------------------------------------------------------------------------------------


async def test_after_a_kill_open_requests_are_cancelled_and_reported(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    for _ in range(3):
        await claims.add(worker)
    await worker.kill()
    await claims.are_cut()
    await worker.start()
    assert worker.story() == [("queued", None), ("held", None)] + 2 * [("queued", None)] + 3 * [
        ("cancelled", "worker_restart")
    ]
    await vast.wait_for(lambda: len(vast.outcomes) == 3)
    assert [(each["request_idx"], each["status"]) for each in vast.outcomes] == [(i, "Cancelled") for i in claims.idxs]
    assert (await worker.get("/status"))["held"] is None


async def test_after_a_kill_a_session_goes_on_with_its_deadline(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    session_id, auth = await create(vast, worker)
    claims = Claims(vast)
    await claims.add(worker)
    before = await worker.get("/reservation")
    await worker.kill()
    await claims.are_cut()
    await start(worker)
    after = await worker.get("/reservation")
    assert {**after, "held_seconds": 0} == {**before, "held_seconds": 0}
    ping = signed(vast, worker.url, session_id=session_id)
    assert (await post(worker.url + "/ping", ping)).status == 200
    ended = await post(worker.url + "/session/end", {"session_id": session_id, "session_auth": auth})
    assert ended.status == 200
    assert worker.story()[2:] == [
        ("queued", None),
        ("cancelled", "worker_restart"),  # and no event of a ping that moves the deadline by less than a second
        ("released", "session_end"),
    ]


async def test_a_session_whose_time_ran_out_meanwhile_expires_at_the_start(
    vast: FakeAutoscaler, tmp_path: Path
) -> None:
    worker = secured(tmp_path, vast)
    leave_session(worker.db, begun=SystemClock().now() - 120, request_idx=12)
    async with worker:
        assert worker.story() == [("queued", None), ("held", None), ("expired", "duration_elapsed")]
        assert (await worker.get("/status"))["held"] is None
        (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(12))
        assert outcome["status"] == "Success"


async def test_the_first_report_after_a_start_tells_the_truth(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    _, auth = await create(vast, worker)
    await worker.kill()
    reports = len(vast.statuses)
    await worker.start()
    await vast.wait_for(lambda: len(vast.statuses) > reports)
    first = vast.statuses[reports]
    assert (first["cur_load"], first["num_requests_working"]) == (100, 1)
    assert first["working_request_idxs"] == [auth["request_idx"]]


async def test_a_release_of_an_old_reservation_does_not_end_a_new_one(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    await claims.add(worker)
    old = (await worker.get("/reservation"))["id"]
    await worker.kill()
    await claims.are_cut()
    await start(worker)
    await claims.add(worker)
    answer = await worker.release(reservation_id=old)
    assert (answer["released"], answer["state"]) == (False, "cancelled")
    held = await worker.get("/reservation")
    assert held["state"] == "held"
    assert (await worker.release(reservation_id=held["id"]))["released"] is True
    assert (await claims.tasks[0]).body["reservation_id"] == held["id"]


async def test_one_log_has_one_worker_and_its_lock_dies_with_it(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    second = secured(worker.folder, vast)
    await second.spawn()
    assert await second.exit_code() == 1
    assert str(worker.process.pid) in json.dumps(second.lines)
    assert (await worker.get("/readyz"))["ready"] is True
    await worker.kill()
    await second.start()
    await second.kill()


# -- what the autoscaler is owed -------------------------------------------------------------------------------------


async def test_outcomes_of_an_outage_arrive_in_order_over_a_restart(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    vast.fail("delete_requests", "down")
    for _ in range(3):
        await reserve_and_release(claims, worker)
    await claims.add(worker)
    await worker.kill()
    claims.tasks = claims.tasks[3:]
    await claims.are_cut()
    await start(worker)
    await reserve_and_release(claims, worker)
    assert await worker.metric("nullworker_autoscaler_backlog") == 5
    vast.clear()
    await vast.wait_for(lambda: len(vast.outcomes) >= 5, 20)
    arrived = list(dict.fromkeys(each["request_idx"] for each in vast.outcomes))
    assert arrived == claims.idxs
    statuses = [vast.outcomes_of(idx)[0]["status"] for idx in claims.idxs]
    assert statuses == ["Success", "Success", "Success", "Cancelled", "Success"]


async def test_an_outcome_whose_answer_was_lost_is_sent_again_after_a_kill(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    vast.fail("delete_requests", "late", times=1)
    await reserve_and_release(claims, worker)
    await vast.wait_for(lambda: vast.outcomes)
    await worker.kill()
    await worker.start()
    await vast.wait_for(lambda: len(vast.outcomes) == 2)
    assert [each["request_idx"] for each in vast.outcomes] == claims.idxs * 2


async def test_a_batch_that_is_refused_for_good_is_set_aside_and_the_rest_goes_on(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    vast.fail("delete_requests", 400, times=1)
    await reserve_and_release(claims, worker)
    line = await worker.line("outcome_refused")
    assert line["level"] == "error"
    await reserve_and_release(claims, worker)
    while await worker.metric("nullworker_autoscaler_backlog"):
        pass
    assert [each["request_idx"] for each in vast.outcomes] == claims.idxs[1:]
    assert worker.sql("SELECT seq, outcome FROM settled") == [(line["seq"], "refused")]
    await worker.kill()
    reports = len(vast.statuses)
    await worker.start()
    await vast.wait_for(lambda: len(vast.statuses) > reports)
    assert len(vast.outcomes) == 1


async def test_the_figures_of_worker_status_add_up_over_a_kill(vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with secured(tmp_path, vast, NULL_MAX_QUEUE_SECONDS="0") as worker:
        await worker.line("key_loaded")
        await vast.wait_for(lambda: vast.statuses and vast.statuses[-1]["max_perf"])
        vast.fail("worker_status", "down")
        claims = Claims(vast)
        for _ in range(3):
            await reserve_and_release(claims, worker)
        held = await claims.add(worker)
        assert (await (await claims.add(worker))).status == 429
        await worker.kill()
        with pytest.raises(aiohttp.ClientError):
            await held
        vast.clear()
        await start(worker)
        await reserve_and_release(claims, worker)
        assert await worker.terminate() == 0
        # four served, one refused; one taken and cancelled, which is no new load
        assert vast.totals() == (400, 100, 400)


async def test_a_report_under_way_when_it_is_told_to_stop_is_not_sent_twice(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    await vast.wait_for(lambda: vast.statuses and vast.statuses[-1]["max_perf"])
    vast.fail("worker_status", "slow", times=1, seconds=1)
    claims = Claims(vast)
    await reserve_and_release(claims, worker)
    await vast.wait_for(lambda: vast.statuses[-1]["cur_perf"])  # it is here, and not answered yet
    assert await worker.terminate() == 0
    assert vast.totals() == (100, 0, 100)


# -- told to stop ----------------------------------------------------------------------------------------------------


async def test_a_drain_fits_its_time_with_a_full_queue_and_a_dead_autoscaler(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    claims = Claims(vast)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def reserve() -> int:
            async with http.post(worker.url + "/reserve", json=signed(vast, worker.url)) as answer:
                await answer.read()
                return answer.status

        held = await claims.add(worker)
        queued = [asyncio.ensure_future(reserve()) for _ in range(1000)]
        for nth in (250, 500, 750, 1001):  # each within the patience of a test
            await worker.line("reservation_queued", nth=nth)
        vast.fail("worker_status", "late")
        vast.fail("delete_requests", "late")
        begun = stopwatch()
        assert await worker.terminate() == 0
        assert stopwatch() - begun < 1 + 3  # NULL_DRAIN_SECONDS, and what the contract gives beside it
        assert await asyncio.gather(*queued) == [503] * 1000
    answer = await held
    assert (answer.status, answer.body["reason"]) == (503, "draining")
    assert worker.sql("SELECT state, reason, count(*) FROM reservations GROUP BY 1, 2") == [
        ("cancelled", "draining", 1001)
    ]
    assert worker.sql("SELECT count(*) FROM open_reservations") == [(0,)]


async def test_a_drain_keeps_a_held_session_open_for_the_next_start(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    session_id, auth = await create(vast, worker)
    assert await worker.terminate() == 0
    assert worker.story() == [("queued", None), ("held", None)]
    assert vast.outcomes == []
    await start(worker)
    assert (await worker.get("/reservation"))["id"] == session_id
    ended = await post(worker.url + "/session/end", {"session_id": session_id, "session_auth": auth})
    assert ended.status == 200


async def test_a_standalone_worker_that_is_killed_has_nothing_to_read_at_its_next_start(tmp_path: Path) -> None:
    """It reports to nobody, so nothing is owed; not even what has ended since its start."""
    worker = WorkerProcess(tmp_path, module=changed(nullworker__worker__PROBE_SECONDS=0.1))
    async with worker:
        for _ in range(3):
            await post(worker.url + "/reserve", {"duration": 0})
        await until(lambda: worker.sql("SELECT min(seq) FROM cursors") == [(9,)])
        await worker.kill()
        assert worker.sql("SELECT name, seq FROM cursors ORDER BY name") == [
            ("delete_requests", 9),
            ("worker_status", 9),
        ]
