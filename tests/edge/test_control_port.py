"""The control port of a real worker: its routes, and who is refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from claims import reserve
from harness import PATIENCE, Answer, WorkerProcess, post
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from nullworker import __version__
from nullworker.testing import FakeAutoscaler


async def ask(worker: WorkerProcess, method: str, path: str, **more: Any) -> Answer:
    async with aiohttp.ClientSession() as http, http.request(method, worker.control + path, **more) as answer:
        is_json = answer.content_type == "application/json"
        return Answer(answer.status, await (answer.json() if is_json else answer.text()), answer.headers)


def epoch(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()


# -- release -----------------------------------------------------------------------------------------------------


async def test_a_plain_release_has_one_of_two_answers(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    bodies = (None, b"", b"{}", b" \n", b'{"reservation_id": null, "reason": null}', b'{"unknown": 1}')
    for body in bodies:
        nothing = await ask(worker, "POST", "/release", data=body)
        assert (nothing.status, nothing.body) == (200, {"released": False, "reason": "no active reservation"})
        await reserve(worker, vast)
        done = await ask(worker, "POST", "/release", data=body)
        assert (done.status, done.body) == (200, {"released": True})
    assert await worker.metric("nullworker_releases_total", result="none") == len(bodies)
    assert await worker.metric("nullworker_releases_total", result="released") == len(bodies)


async def test_a_release_by_id_ends_only_that_reservation(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    first, second = [await reserve(worker, vast) for _ in range(2)]

    waits = await worker.release(reservation_id=second.id)
    assert (waits["released"], waits["state"]) == (False, "queued")
    assert await worker.release(reservation_id=first.id) == {"released": True, "reservation_id": first.id}
    over = await worker.release(reservation_id=first.id)
    assert (over["released"], over["state"]) == (False, "released")
    assert "explicit" in over["reason"]
    unknown = await post(worker.control + "/release", {"reservation_id": "nobody"})
    assert unknown.status == 404
    assert "nobody" in unknown.body["error"]

    assert (await worker.get("/reservation"))["id"] == second.id
    counted = {
        result: await worker.metric("nullworker_releases_total", result=result)
        for result in ("released", "none", "stale", "unknown")
    }
    assert counted == {"released": 1, "none": 0, "stale": 2, "unknown": 1}


async def test_an_id_in_the_query_is_meant_as_one_in_the_body_is(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    over = await reserve(worker, vast, duration=0)
    held = await reserve(worker, vast)
    for path, body in (("/release", {}), ("/extend", {"seconds": 5})):
        for meant, status in ((over.id, 200 if path == "/release" else 409), ("nobody", 404), ("", 404)):
            assert (await post(f"{worker.control}{path}?reservation_id={meant}", body)).status == status
        two = await post(f"{worker.control}{path}?reservation_id={held.id}", {**body, "reservation_id": over.id})
        assert (two.status, list(two.body)) == (409, ["error"])
        assert (await worker.get("/reservation"))["id"] == held.id
    assert (await post(f"{worker.control}/extend?reservation_id={held.id}", {"seconds": 5})).status == 200
    done = await ask(worker, "POST", f"/release?reservation_id={held.id}")
    assert done.body == {"released": True, "reservation_id": held.id}


# -- extend ------------------------------------------------------------------------------------------------------


async def test_an_extension_moves_the_deadline_to_so_long_from_now(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    claim = await reserve(worker, vast, duration=30)
    answer = await post(worker.control + "/extend", {"seconds": 100, "reservation_id": claim.id})
    (at,) = worker.sql("SELECT at FROM events WHERE kind = 'extended'")[0]
    assert (answer.status, answer.body["reservation_id"]) == (200, claim.id)
    assert epoch(answer.body["ends_at"]) == pytest.approx(at + 100, abs=0.001)
    assert (await worker.get("/reservation"))["ends_at"] == answer.body["ends_at"]
    deadline = await worker.metric("nullworker_reservation_deadline_timestamp_seconds")
    assert deadline == pytest.approx(at + 100, abs=0.001)
    assert await worker.metric("nullworker_extensions_total", result="extended") == 1
    assert worker.story()[-1] == ("extended", "extend")


async def test_no_extension_goes_beyond_the_cap_and_none_at_all_ends_it(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    claim = await reserve(worker, vast, duration=30)
    answer = await post(worker.control + "/extend", {"seconds": 1e9})
    (at,) = worker.sql("SELECT at FROM events WHERE kind = 'extended'")[0]
    assert epoch(answer.body["ends_at"]) == pytest.approx(at + 3600, abs=0.001)
    assert (await post(worker.control + "/extend", {"seconds": 0})).status == 200
    assert (await claim.answer()).body["released"] == "duration_elapsed"


async def test_an_extension_without_a_held_reservation_is_refused(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    nothing = await post(worker.control + "/extend", {"seconds": 5})
    over = await reserve(worker, vast, duration=0)
    await reserve(worker, vast)
    stale = await post(worker.control + "/extend", {"seconds": 5, "reservation_id": over.id})
    unknown = await post(worker.control + "/extend", {"seconds": 5, "reservation_id": "nobody"})
    assert [answer.status for answer in (nothing, stale, unknown)] == [409, 409, 404]
    assert all(answer.body["error"] for answer in (nothing, stale, unknown))
    assert "extended" not in [kind for kind, _ in worker.story()]
    for result in ("none", "stale", "unknown"):
        assert await worker.metric("nullworker_extensions_total", result=result) == 1


# -- looking -----------------------------------------------------------------------------------------------------


async def test_the_held_reservation_is_returned_at_once_or_after_a_wait(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    idle = await ask(worker, "GET", "/reservation")
    assert (idle.status, idle.body) == (204, "")
    in_vain = await ask(worker, "GET", "/reservation?wait=0.05")
    assert in_vain.status == 204
    waiting = asyncio.ensure_future(ask(worker, "GET", "/reservation?wait=60"))
    claim = await reserve(worker, vast, metadata={"job": 1})
    held = await asyncio.wait_for(waiting, PATIENCE)
    assert (held.status, held.body["id"], held.body["state"]) == (200, claim.id, "held")
    assert held.body["metadata"] == {"job": 1}
    assert (await ask(worker, "GET", "/reservation?wait=60")).body["id"] == claim.id


async def test_a_reservation_looks_the_same_while_it_lives_and_afterwards(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    claim = await reserve(worker, vast, duration=30, metadata={"job": 1})
    live = await worker.get("/reservation")
    (listed,) = (await worker.get("/reservations"))["reservations"]
    assert list(live) == list(listed)
    assert list(live) == [
        *("id", "kind", "state", "reason", "queued_at", "held_at", "ends_at", "ended_at", "queued_seconds"),
        *("held_seconds", "duration_cap", "request_idx", "metadata", "result"),
    ]
    running = ("held_seconds",)
    assert {**live, **dict.fromkeys(running)} == {**listed, **dict.fromkeys(running)}
    assert (live["kind"], live["state"], live["reason"], live["request_idx"]) == ("request", "held", None, claim.idx)
    assert epoch(live["ends_at"]) - epoch(live["held_at"]) == pytest.approx(30, abs=0.002)
    await worker.release(result=[1])
    (over,) = (await worker.get("/reservations"))["reservations"]
    assert (over["state"], over["reason"], over["result"]) == ("released", "explicit", [1])
    assert epoch(over["ended_at"]) >= epoch(over["held_at"])


async def test_the_history_comes_newest_first_by_pages_and_by_state(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    over = [(await reserve(worker, vast, duration=0)).id for _ in range(3)]
    held, queued = [(await reserve(worker, vast)).id for _ in range(2)]

    async def ids(query: str) -> list[str]:
        found = (await worker.get(f"/reservations{query}"))["reservations"]
        return [each["id"] for each in found]

    newest_first = [queued, held, *reversed(over)]
    assert await ids("") == newest_first
    assert await ids("?limit=2") == newest_first[:2]
    assert await ids(f"?limit=2&before={newest_first[1]}") == newest_first[2:4]
    assert await ids(f"?before={newest_first[-1]}") == []
    assert await ids("?before=2001-01-01T00:00:00Z") == []
    shown = {each["id"]: each["queued_at"] for each in (await worker.get("/reservations"))["reservations"]}
    for known_as, at in shown.items():
        assert await ids(f"?before={at}") == [each for each in newest_first if shown[each] < at]
        assert await ids(f"?id={known_as}") == [known_as]
    assert await ids("?id=never-was") == []
    assert await ids("?state=held") == [held]
    assert await ids("?state=queued") == [queued]
    assert await ids("?state=expired&limit=1") == [over[-1]]
    assert await ids("?state=released") == []


async def test_an_invalid_query_parameter_is_named(worker: WorkerProcess) -> None:
    for path, field in (
        ("/reservations?state=gone", "state"),
        ("/reservations?limit=-1", "limit"),
        ("/reservations?limit=ten", "limit"),
        ("/reservations?before=nobody", "before"),
        ("/reservations?before=%00", "before"),
        ("/reservation?wait=-1", "wait"),
        ("/reservation?wait=nan", "wait"),
        ("/events?after=-1", "after"),
        ("/events?after=1.5", "after"),
        ("/events?after=%C2%B2", "after"),
    ):
        answer = await ask(worker, "GET", path)
        assert answer.status == 422, path
        assert field in answer.body["error"]
        assert answer.body[field]


@asynccontextmanager
async def following(
    worker: WorkerProcess, query: str = "", **headers: str
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """GET /events, as an iterator over its events, each with the `id:` it came with."""

    async def read(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        known_as = ""
        async for raw in answer.content:
            line = raw.decode().rstrip()
            if line.startswith("id: "):
                known_as = line.removeprefix("id: ")
            elif line.startswith("data: "):
                yield {"id": known_as, **json.loads(line.removeprefix("data: "))}

    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.get(worker.control + "/events" + query, headers=headers) as answer,
    ):
        assert answer.content_type == "text/event-stream"
        yield read(answer)


async def test_events_come_live_and_go_on_where_a_reader_left_off(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    await reserve(worker, vast)
    async with following(worker) as events:
        seen = [await events.__anext__() for _ in range(2)]
        await worker.release()
        seen.append(await events.__anext__())
    assert [event["kind"] for event in seen] == ["queued", "held", "released"]
    assert [event["seq"] for event in seen] == [1, 2, 3]
    assert [event["id"] for event in seen] == ["1", "2", "3"]
    assert set(seen[0]) == {"id", "seq", "at", "reservation_id", "kind", "reason", "data"}
    async with following(worker, **{"Last-Event-ID": "2"}) as events:
        assert await events.__anext__() == seen[2]
    async with following(worker, "?after=1") as events:
        assert await events.__anext__() == seen[1]
    async with following(worker, "?after=0", **{"Last-Event-ID": "2"}) as events:
        assert await events.__anext__() == seen[2]


@pytest.mark.parametrize("where", ["header", "query"])
async def test_a_reader_of_a_log_that_was_replaced_is_told_and_begins_anew(tmp_path: Path, where: str) -> None:
    async with WorkerProcess(tmp_path) as worker:
        for _ in range(2):
            await post(worker.url + "/reserve", {"duration": 0})
        await worker.terminate()
        shutil.rmtree(tmp_path)
        os.mkdir(tmp_path)
        await worker.start()
        query, headers = ("", {"Last-Event-ID": "6"}) if where == "header" else ("?after=6", {})
        async with following(worker, query, **headers) as events:
            assert await events.__anext__() == {"id": "", "after": 6, "last_seq": 0}
            await post(worker.url + "/reserve", {"duration": 0})
            assert (await events.__anext__())["id"] == "1"
        async with following(worker, "?after=3") as events:
            await post(worker.url + "/reserve", {"duration": 0})
            assert (await events.__anext__())["id"] == "4", "the end of the log is not beyond it"
        async with following(worker, "?after=7") as events:
            assert await events.__anext__() == {"id": "", "after": 7, "last_seq": 6}
            assert (await events.__anext__())["id"] == "1"


async def test_metrics_come_in_both_formats_complete_from_the_start(worker: WorkerProcess) -> None:
    for accept, kind in (
        ("text/plain", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
    ):
        answer = await ask(worker, "GET", "/metrics", headers={"Accept": accept})
        assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (200, kind)
    families = read_openmetrics(answer.body)  # type: ignore[no-untyped-call]
    assert "nullworker_hold_seconds" in {family.name for family in families}
    for name, labels in (
        ("nullworker_releases_total", {"result": "stale"}),
        ("nullworker_reservations_total", {"kind": "session", "state": "cancelled", "reason": "worker_restart"}),
        ("nullworker_reservations", {"state": "held"}),
        ("nullworker_auth_failures_total", {"reason": "signature"}),
        ("nullworker_autoscaler_reports_total", {"call": "delete_requests", "result": "refused"}),
        ("nullworker_reservation_deadline_timestamp_seconds", {}),
        ("nullworker_event_log_unwritten", {}),
        ("nullworker_busy_seconds_total", {}),
    ):
        assert await worker.metric(name, **labels) == 0
    states = [
        await worker.metric("nullworker_worker_state", state=s) for s in ("starting", "ready", "errored", "draining")
    ]
    assert states == [0, 1, 0, 0]
    assert await worker.metric("nullworker_build_info", version=__version__) == 1


# -- who may ask -------------------------------------------------------------------------------------------------


async def test_requests_with_a_foreign_host_or_origin_get_403(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    claim = await reserve(worker, vast)
    allowed: list[dict[str, str]] = [
        {"Host": "127.0.0.1"},
        {"Host": "LOCALHOST:1234"},
        {"Host": "[::1]:18999"},
        {"Origin": worker.control},
        {"Origin": "http://localhost:8000"},
    ]
    refused: list[dict[str, str]] = [
        {"Host": "example.com"},
        {"Host": "127.0.0.1.example.com"},
        {"Host": "localhost.example.com"},
        {"Host": "10.0.0.1"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Host": "somebody@127.0.0.1"},
        {"Origin": "null"},
        {"Origin": "https://example.com"},
        {"Origin": "http://127.0.0.1.example.com"},
        {"Origin": ""},
        {"User-Agent": "nullworker-callback"},
    ]
    for headers in allowed:
        assert (await ask(worker, "GET", "/status", headers=headers)).status == 200, headers
    for headers in refused:
        for method, path in (("POST", "/release"), ("GET", "/status"), ("GET", "/metrics"), ("GET", "/nothing")):
            answer = await ask(worker, method, path, headers=headers)
            assert (answer.status, list(answer.body)) == (403, ["error"]), (headers, path)
    assert (await worker.get("/reservation"))["id"] == claim.id


async def test_who_speaks_http_1_0_without_a_host_is_answered(worker: WorkerProcess) -> None:
    for headers, status in (("", 200), ("Origin: http://example.com\r\n", 403)):
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
        writer.write(f"GET /health HTTP/1.0\r\n{headers}\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        assert answer.startswith(b"HTTP/1.0 %d " % status)
        writer.close()
        await writer.wait_closed()


async def test_a_path_that_is_not_utf_8_is_told_as_well_as_it_can_be(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xffb"))
    os.mkdir(folder)
    worker = WorkerProcess(folder)
    worker.env["NULL_EVENT_LOG"] = "nullworker.db"  # in the current folder, so that no setting is wrong
    async with worker:
        assert (await worker.get("/status"))["log"]["path"] == f"{tmp_path}/a\\xffb/nullworker.db"
        assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
        for path in ("/readyz", "/metrics", "/reservations", "/"):
            assert (await ask(worker, "GET", path)).status == 200


async def test_the_control_port_is_on_one_address_alone_and_none_of_it_is_outside(worker: WorkerProcess) -> None:
    other = "127.0.0.2"  # this machine too, and what a socket on all addresses would listen on
    _, writer = await asyncio.open_connection(other, worker.port)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(other, worker.control_port)
    for path in ("/release", "/extend", "/reservation", "/reservations", "/status", "/metrics", "/events", "/readyz"):
        for method in ("GET", "POST"):
            async with aiohttp.ClientSession() as http, http.request(method, worker.url + path) as answer:
                assert answer.status == 404, path


async def test_no_answer_may_be_cached(worker: WorkerProcess) -> None:
    for path in ("/status", "/readyz", "/reservations", "/events", "/nothing", "/openapi.json", "/"):
        async with aiohttp.ClientSession() as http, http.get(worker.control + path) as answer:
            assert answer.headers["Cache-Control"] in ("no-store", "no-cache"), path
    refused = await post(worker.url + "/reserve", {})
    assert (refused.status, refused.headers["Cache-Control"]) == (422, "no-store")
