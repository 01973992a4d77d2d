"""The reports of a real worker: figures and outcomes, in order, through outages."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from claims import reserve
from harness import WorkerProcess, changed, post, secured, signed
from programs import dead_address

from nullworker.testing import FakeAutoscaler
from nullworker.testing.keys import load_or_make

#: All of vastai 1.9.1's WorkerStatusData (server/lib/data_types.py), and nothing else; the spelling is theirs.
FIELDS = {
    *("id", "mtoken", "version", "loadtime", "cur_load", "rej_load", "new_load", "error_msg", "max_perf", "cur_perf"),
    *("cur_capacity", "max_capacity", "num_requests_working", "num_requests_recieved", "additional_disk_usage"),
    *("disk_usage", "working_request_idxs", "url"),
}
OUTCOME_FIELDS = {"request_idx", "success", "status", "entered_queue_at", "work_started_at", "work_completed_at"}


async def status_where(vast: FakeAutoscaler, **fields: Any) -> dict[str, Any]:
    """The first accepted report with these figures."""

    def found() -> list[dict[str, Any]]:
        return [s for s in vast.statuses if all(s[name] == value for name, value in fields.items())]

    return (await vast.wait_for(found))[0]


async def test_ready_is_told_at_once_with_all_fields(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    status = await status_where(vast, max_perf=100)
    del status["received_at"]
    assert set(status) == FIELDS
    disk, loaded = status.pop("disk_usage"), status.pop("loadtime")
    assert disk == pytest.approx(shutil.disk_usage("/").used / 2**30, rel=0.1)
    assert 0 < loaded < 20
    assert abs(status.pop("additional_disk_usage")) < 1
    assert status == {
        **{"id": 7, "mtoken": "master-secret", "version": "1.1.0", "error_msg": "", "max_perf": 100.0},
        **{"cur_load": 0, "rej_load": 0, "new_load": 0, "cur_perf": 0, "cur_capacity": 0, "max_capacity": 0},
        **{"num_requests_working": 0, "num_requests_recieved": 0, "working_request_idxs": [], "url": worker.url},
    }
    ready = [status["max_perf"] for status in vast.statuses].index(100)
    assert len(vast.statuses[:ready]) <= 1  # the one at the start, before the key was there


async def test_load_is_what_is_queued_and_held_each_with_its_index(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, NULL_MAX_PERF="40", NULL_MAX_QUEUED="1") as worker:
        await worker.line("key_loaded")
        held, queued, refused = [await reserve(worker, vast) for _ in range(3)]
        busy = await status_where(vast, cur_load=80)
        assert (busy["num_requests_working"], busy["working_request_idxs"]) == (2, [held.idx, queued.idx])
        assert busy["max_perf"] == 40
        await worker.release(reservation_id=held.id)
        await queued.hang_up()
        idle = await status_where(vast, cur_load=0, num_requests_recieved=3)
        assert idle["working_request_idxs"] == []
        assert [await claim.outcome() for claim in (held, queued, refused)] == ["Success", "Cancelled", "Rejected"]
        # the refused one is in rej_load alone; a later hang-up takes nothing back of what was reported, as with the
        # SDK's worker (server/lib/data_types.py, workload_processing)
        assert vast.totals() == (80, 40, 40)


async def test_an_outcome_has_its_times_and_zero_for_one_that_never_came(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, NULL_MAX_QUEUE_SECONDS="0.05") as worker:
        await worker.line("key_loaded")
        held, refused = [await reserve(worker, vast) for _ in range(2)]
        await refused.answer()
        await worker.release()
        await held.outcome()
        (served,), (sent_away,) = vast.outcomes_of(held.idx), vast.outcomes_of(refused.idx)
        for outcome in (served, sent_away):
            assert set(outcome) - {"worker_id", "received_at"} == OUTCOME_FIELDS
            assert outcome["worker_id"] == 7
        assert (served["success"], sent_away["success"]) == (True, False)
        query = "SELECT kind, at FROM events WHERE reservation_id = ?"
        at = dict(worker.sql(query, held.id))
        assert served["entered_queue_at"] == pytest.approx(at["queued"], abs=0.001)
        assert served["work_started_at"] == pytest.approx(at["held"], abs=0.001)
        assert served["work_completed_at"] == pytest.approx(at["released"], abs=0.001)
        assert (sent_away["work_started_at"], sent_away["work_completed_at"]) == (0, 0)
        assert vast.batches[0]["mtoken"] == "master-secret"


async def test_a_key_that_cannot_be_had_is_asked_for_until_it_can(tmp_path: Path, vast: FakeAutoscaler) -> None:
    vast.fail("pubkey", 503, times=1)
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_not_loaded")
        ready = await worker.get("/readyz")
        assert (ready["ready"], ready["state"], ready["checks"]["key"]["ok"]) == (False, "starting", False)
        assert "/pubkey/ answered 503" in ready["checks"]["key"]["why"]
        answer = await post(worker.url + "/reserve", signed(vast, worker.url))
        assert (answer.status, answer.body["reason"], answer.headers["Retry-After"]) == (503, "not_ready", "1")
        assert worker.story() == []
        await worker.line("key_loaded")
        await status_where(vast, max_perf=100)
        assert (await (await reserve(worker, vast, duration=0)).answer()).status == 200


async def test_a_worker_that_is_there_before_its_autoscaler_becomes_ready(tmp_path: Path) -> None:
    address = dead_address()
    async with WorkerProcess(tmp_path, CONTAINER_ID="7", MASTER_TOKEN="x", REPORT_ADDR=address) as worker:
        await worker.line("key_not_loaded")
        async with FakeAutoscaler(int(address.rpartition(":")[2])) as vast:
            await worker.line("key_loaded")
            await status_where(vast, max_perf=100)


async def test_a_changed_key_is_fetched_when_a_signature_fails(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, module=changed(nullworker__autoscaler__keys__REFETCH_SECONDS=0)) as worker:
        await worker.line("key_loaded")
        async with FakeAutoscaler(key=load_or_make()) as other:
            stranger = await post(worker.url + "/reserve", signed(other, worker.url, {"duration": 0}))
            assert stranger.status == 401
            vast.key = other.key
            assert (await (await reserve(worker, other, duration=0)).answer()).status == 200
        assert await worker.metric("nullworker_auth_failures_total", reason="signature") == 1


async def test_the_first_address_that_answers_gets_the_reports(tmp_path: Path, vast: FakeAutoscaler) -> None:
    addresses = f"{dead_address()}, {vast.url}/"
    async with WorkerProcess(tmp_path, CONTAINER_ID="7", MASTER_TOKEN="x", REPORT_ADDR=addresses) as worker:
        await worker.line("key_loaded")
        claim = await reserve(worker, vast, duration=0)
        assert await claim.outcome() == "Success"
        await status_where(vast, max_perf=100)
        assert await worker.metric("nullworker_autoscaler_reports_total", call="delete_requests", result="failed") == 0


@pytest.mark.parametrize(("how", "seconds"), [(500, 0.0), ("slow", 0.3)])
async def test_no_figure_is_lost_or_doubled_by_a_report_that_fails_or_is_slow(
    worker: WorkerProcess, vast: FakeAutoscaler, how: Any, seconds: float
) -> None:
    await status_where(vast, max_perf=100)
    vast.fail("worker_status", how, times=1, seconds=seconds)
    vast.fail("delete_requests", how, times=1, seconds=seconds)
    claims = [await reserve(worker, vast, duration=0)]
    await vast.wait_for(lambda: "worker_status" not in vast.faults.active)
    claims += [await reserve(worker, vast, duration=0) for _ in range(5)]
    assert [await claim.outcome() for claim in claims] == ["Success"] * 6
    await vast.wait_for(lambda: vast.totals().cur_perf >= 600)
    assert await worker.terminate() == 0
    assert vast.totals() == (600, 0, 600)


async def test_outcomes_come_in_the_order_of_the_ends_also_after_trouble(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    vast.fail("delete_requests", 500, times=1)
    claims = [await reserve(worker, vast) for _ in range(6)]
    await claims[3].hang_up()
    for claim in (*claims[:3], *claims[4:]):
        await worker.release(reservation_id=claim.id)
    await vast.wait_for(lambda: len(vast.outcomes) == 6)
    first, second, third, gone, *rest = [claim.idx for claim in claims]
    assert [outcome["request_idx"] for outcome in vast.outcomes] == [gone, first, second, third, *rest]
    backlog = await worker.metric("nullworker_autoscaler_backlog")
    assert backlog == 0


async def test_an_outcome_that_is_refused_is_set_aside_and_holds_up_nobody(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    await status_where(vast, max_perf=100)
    first = await reserve(worker, vast, duration=0)
    await first.outcome()  # the next are a batch: there is a second between two calls
    claims = [await reserve(worker, vast, duration=0) for _ in range(3)]
    vast.fail("delete_requests", 400, times=2)  # the batch, then the first of it alone
    line = await worker.line("outcome_refused")
    assert [await claim.outcome() for claim in claims[1:]] == ["Success", "Success"]
    assert vast.outcomes_of(claims[0].idx) == []
    (kept,) = worker.sql("SELECT name, seq, outcome, detail FROM settled")
    assert kept[:3] == ("delete_requests", line["seq"], "refused")
    assert "answered 400" in kept[3]
    await worker.line("reservation_expired", nth=4)
    assert await worker.metric("nullworker_autoscaler_reports_total", call="delete_requests", result="refused") == 2


async def test_a_standalone_worker_owes_nothing_to_a_later_autoscaler(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with WorkerProcess(tmp_path) as alone:
        assert (await post(alone.url + "/reserve", {"duration": 0})).status == 200
        assert await alone.terminate() == 0
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        claim = await reserve(worker, vast, duration=0)
        assert await claim.outcome() == "Success"
        assert await worker.terminate() == 0
        assert len(vast.outcomes) == 1
        assert vast.totals() == (100, 0, 100)


async def test_unauthenticated_requests_are_not_reported(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    forged = [signed(vast, worker.url, request_idx=999, signature="x" * 344) for _ in range(5)]
    answers = await asyncio.gather(*(post(worker.url + "/reserve", body) for body in forged))
    assert {answer.status for answer in answers} == {401}
    claim = await reserve(worker, vast, duration=0)
    await claim.outcome()
    assert await worker.terminate() == 0
    assert vast.outcomes_of(999) == []
    assert not [status for status in vast.statuses if status["rej_load"] or 999 in status["working_request_idxs"]]
    assert vast.totals() == (100, 0, 100)


async def test_a_stop_waits_for_the_call_that_is_under_way_so_that_it_arrives_once(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    vast.fail("delete_requests", "slow", seconds=0.5)
    claim = await reserve(worker, vast)
    await worker.release()
    assert await claim.outcome() == "Success"
    assert await worker.terminate() == 0
    assert len(vast.outcomes_of(claim.idx)) == 1
    assert vast.totals().cur_perf == 100
