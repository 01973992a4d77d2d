"""A log that cannot be written: no event is lost, no claim is taken, and everybody is told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import EACH_PING_RENEWS, Answer, WorkerProcess, post, secured, signed
from programs import run
from troubles import TROUBLES, FullDisk, SizeLimit, StrangersLock, Trouble, unmount

from nullworker.testing import FakeAutoscaler

#: Those that last while the worker is away.
STARTS_WITH = [trouble for trouble in TROUBLES if trouble in (StrangersLock, FullDisk)]
#: What is the same for every trouble is shown with one that every machine can make.
ANY = [SizeLimit]


@pytest.fixture(params=TROUBLES, ids=lambda trouble: trouble.__name__)
async def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Trouble]:
    trouble: Trouble = request.param(tmp_path)
    try:
        yield trouble
    finally:
        await trouble.over()
        unmount(trouble.folder)


@pytest.fixture
async def worker(trouble: Trouble, vast: FakeAutoscaler) -> AsyncIterator[WorkerProcess]:
    async with secured(trouble.folder, vast, module=EACH_PING_RENEWS) as worker:
        await worker.line("key_loaded")
        await vast.wait_for(lambda: vast.statuses and vast.statuses[-1]["max_perf"])
        yield worker
        await trouble.over()


async def hold(vast: FakeAutoscaler, worker: WorkerProcess, **payload: Any) -> asyncio.Task[Answer]:
    """A request that has the slot."""
    task = asyncio.ensure_future(post(worker.url + "/reserve", signed(vast, worker.url, payload)))
    await worker.line("reservation_held")
    return task


async def refused(vast: FakeAutoscaler, worker: WorkerProcess, path: str = "/reserve") -> str:
    """A claim that is turned away because of the log; its id."""
    answer = await post(worker.url + path, signed(vast, worker.url))
    assert (answer.status, answer.body["reason"]) == (503, "log_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    return str(answer.body["reservation_id"])


async def ready(worker: WorkerProcess) -> tuple[bool, str]:
    checks = await worker.get("/readyz")
    return checks["ready"], checks["checks"]["log"]["why"]


@pytest.mark.process
async def test_what_is_held_can_be_released_and_all_is_written_when_the_disk_is_back(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker)
    waiting = asyncio.ensure_future(post(worker.url + "/reserve", signed(vast, worker.url)))
    await worker.line("reservation_queued", nth=2)
    await trouble.begin(worker)
    first = await refused(vast, worker)
    assert await worker.release(result={"rows": 3}) == {
        "released": True,
        "reservation_id": (await held).body["reservation_id"],
    }
    assert (await held).body["result"] == {"rows": 3}
    second = await refused(vast, worker, "/session/create")
    assert (await worker.get("/status"))["held"] is None, "who waits is held only when that is in the log"
    assert worker.story() == [("queued", None), ("held", None), ("queued", None)]
    await trouble.over()
    await worker.line("event_log_recovered")
    await worker.line("reservation_held", nth=2)
    assert await worker.release() == {"released": True}
    assert (await waiting).status == 200
    assert worker.story() == [
        ("queued", None),
        ("held", None),
        ("queued", None),
        *[("queued", None), ("cancelled", "log_unavailable")],
        ("released", "explicit"),
        *[("queued", None), ("cancelled", "log_unavailable")],
        *[("held", None), ("released", "explicit")],
    ]
    ids = [name for (name,) in worker.sql("SELECT id FROM reservations WHERE reason = 'log_unavailable'")]
    assert ids == [first, second]
    assert worker.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.process
@pytest.mark.parametrize("trouble", ANY, indirect=True)
async def test_everybody_is_told_that_the_log_cannot_be_written_and_that_it_can_again(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker)
    assert await ready(worker) == (True, "the event log is writable")
    await trouble.begin(worker)
    await refused(vast, worker)
    is_ready, why = await ready(worker)
    assert not is_ready
    assert str(worker.db) in why
    status = await worker.get("/status")
    assert (status["state"], status["log"]["unwritten"], status["log"]["why"]) == ("errored", 2, why)
    assert await worker.metric("nullworker_event_log_unwritten") == 2
    assert await worker.metric("nullworker_event_log_events_total") == 2
    assert await worker.metric("nullworker_worker_state", state="errored") == 1
    await vast.wait_for(lambda: str(worker.db) in vast.statuses[-1]["error_msg"])
    await trouble.over()
    await worker.line("event_log_recovered")
    assert (await worker.get("/readyz"))["ready"] is True
    assert await worker.metric("nullworker_event_log_unwritten") == 0
    assert await worker.metric("nullworker_event_log_events_total") == 4
    await vast.wait_for(lambda: vast.statuses[-1]["error_msg"] == "", 15)
    await worker.release()
    assert (await held).status == 200


@pytest.mark.process
@pytest.mark.parametrize("trouble", ANY, indirect=True)
async def test_an_end_that_is_not_logged_yet_is_visible_everywhere(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker)
    await trouble.begin(worker)
    turned_away = await refused(vast, worker)
    assert (await worker.release())["released"] is True
    known_as = (await held).body["reservation_id"]
    again = await worker.release(reservation_id=known_as)
    assert again == {
        "released": False,
        "reason": "the reservation has ended: released, explicit",
        "state": "released",
    }
    late = await post(worker.control + "/extend", {"reservation_id": turned_away, "seconds": 5})
    assert late.status == 409
    listed = (await worker.get("/reservations"))["reservations"]
    assert [(row["id"], row["state"]) for row in listed] == [(known_as, "released"), (turned_away, "cancelled")]
    assert (await worker.get("/reservations?state=held"))["reservations"] == []
    assert [row["id"] for row in (await worker.get("/reservations?state=released"))["reservations"]] == [known_as]
    assert (await worker.get("/reservations?limit=1"))["reservations"] == listed[:1]
    assert (await worker.get(f"/reservations?limit=1&before={known_as}"))["reservations"] == listed[1:]
    assert (await worker.get(f"/reservations?before={turned_away}"))["reservations"] == []
    assert (await worker.get(f"/reservations?before={listed[1]['queued_at']}"))["reservations"] == listed[:1]
    assert (await worker.get(f"/reservations?id={known_as}"))["reservations"] == listed[:1]
    await trouble.over()
    await worker.line("event_log_recovered")
    assert (await worker.get("/reservations"))["reservations"] == listed[::-1], "the same, in the order of the claims"


@pytest.mark.process
@pytest.mark.parametrize("trouble", ANY, indirect=True)
async def test_what_is_held_expires_on_time_without_a_log(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker, duration=1)
    await trouble.begin(worker)
    await refused(vast, worker)
    assert (await held).body == {"released": "duration_elapsed", "duration": 1}
    await trouble.over()
    await worker.line("event_log_recovered")
    assert worker.story()[-1] == ("expired", "duration_elapsed")
    ((held_at, expired_at),) = worker.sql(
        "SELECT h.at, e.at FROM events h JOIN events e USING (reservation_id)"
        " WHERE h.kind = 'held' AND e.kind = 'expired'"
    )
    assert held_at + 1 <= expired_at < held_at + 2


@pytest.mark.process
@pytest.mark.parametrize("trouble", ANY, indirect=True)
async def test_outcomes_that_waited_for_the_disk_reach_the_autoscaler_when_it_is_back(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker)
    await trouble.begin(worker)
    await refused(vast, worker)
    await worker.release()
    assert (await held).status == 200
    reports = len(vast.statuses)
    await vast.wait_for(lambda: vast.statuses[reports:] and not vast.statuses[-1]["working_request_idxs"])
    await trouble.over()
    await worker.line("event_log_recovered")
    await vast.wait_for(lambda: len(vast.outcomes) == 2)
    assert [each["status"] for each in vast.outcomes] == ["Rejected", "Success"]
    await vast.wait_for(lambda: vast.totals() == (100, 100, 100))


@pytest.mark.process
@pytest.mark.parametrize("trouble", ANY, indirect=True)
async def test_a_session_without_a_log_can_be_ended_but_not_renewed(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    body = signed(vast, worker.url, {"lifetime": 60})
    session_id = (await post(worker.url + "/session/create", body)).body["session_id"]
    await trouble.begin(worker)
    ping = await post(worker.url + "/ping", signed(vast, worker.url, session_id=session_id))
    assert (ping.status, ping.body["reason"]) == (503, "log_unavailable")
    named = {"session_id": session_id, "session_auth": body["auth_data"]}
    assert (await post(worker.url + "/session/end", named)).status == 200
    await trouble.over()
    await worker.line("event_log_recovered")
    assert worker.story() == [("queued", None), ("held", None), ("released", "session_end")]


@pytest.mark.process
async def test_a_kill_without_a_log_leaves_a_log_that_replays(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    held = await hold(vast, worker)
    await trouble.begin(worker)
    await refused(vast, worker)
    await worker.kill()
    assert isinstance((await asyncio.gather(held, return_exceptions=True))[0], Exception)
    await trouble.over()
    await worker.start()
    await worker.line("key_loaded")
    assert worker.sql("SELECT count(*) FROM open_reservations") == [(0,)]
    again = await hold(vast, worker)
    assert (await worker.release())["released"] is True
    assert (await again).status == 200
    assert worker.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.process
@pytest.mark.parametrize("trouble", [*STARTS_WITH], indirect=True)
async def test_a_worker_that_starts_without_a_log_still_lets_go_what_is_held(
    trouble: Trouble, worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    created = await post(worker.url + "/session/create", signed(vast, worker.url, {"lifetime": 60}))
    await trouble.begin(worker)
    await worker.kill()
    await worker.start()
    await worker.line("key_loaded")
    assert (await worker.get("/reservation"))["id"] == created.body["session_id"]
    await refused(vast, worker)
    assert await worker.release() == {"released": True}
    await trouble.over()
    await worker.line("event_log_recovered")
    assert worker.story()[2:] == [("queued", None), ("cancelled", "log_unavailable"), ("released", "explicit")]


async def test_a_disk_that_is_too_full_for_a_new_log_is_said(tmp_path: Path) -> None:
    serve = f"ulimit -f 40; exec {sys.executable} -m nullworker serve"
    env = {
        "UNSECURED": "true",
        "WORKER_PORT": "0",
        "NULL_CONTROL_PORT": "0",
        "NULL_EVENT_LOG": str(tmp_path / "log.db"),
    }
    said = await run("bash", "-c", serve, code=1, **env)
    assert said == f"nullworker: the event log {tmp_path / 'log.db'} cannot be opened: disk I/O error\n"
