"""Sessions over raw HTTP, as the official client uses them: create, renew, end, wait, and forged requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import EACH_PING_RENEWS, Answer, WorkerProcess, post, secured, signed
from programs import free_port

from nullworker.testing import FakeAutoscaler

HEADER = "Nullworker-Reservation"
FORGED = "Zm9yZ2Vk" * 40


@pytest.fixture
async def worker(vast: FakeAutoscaler, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    env = {"MAX_RESERVATION_SECONDS": "100", "WORKER_HTTP_PORT": str(free_port())}
    async with secured(tmp_path, vast, module=EACH_PING_RENEWS, **env) as worker:
        await worker.line("key_loaded")
        yield worker


class Owner:
    """Somebody with one grant, and the session that was made with it."""

    def __init__(self, vast: FakeAutoscaler, worker: WorkerProcess) -> None:
        self.vast, self.worker = vast, worker
        self.auth = vast.grant(worker.url)
        self.id = ""

    async def create(self, **payload: Any) -> Answer:
        answer = await post(
            self.worker.url + "/session/create", {"auth_data": self.auth, "payload": payload, "session_id": None}
        )
        if answer.status == 201:
            self.id = answer.body["session_id"]
        return answer

    async def named(self, path: str, **fields: Any) -> Answer:
        body = {"session_id": self.id, "session_auth": self.auth, **fields}
        return await post(self.worker.url + path, body)

    async def ping(self, session_id: str | None = None, **auth: Any) -> Answer:
        body = signed(self.vast, self.worker.url, session_id=session_id or self.id, **auth)
        return await post(self.worker.url + "/ping", body)


@pytest.fixture
async def owner(vast: FakeAutoscaler, worker: WorkerProcess) -> Owner:
    """The owner of an open session of 60 s."""
    owner = Owner(vast, worker)
    await owner.create(lifetime=60, metadata={"job": 12})
    return owner


async def deadline(worker: WorkerProcess) -> float:
    """`ends_at` of the last event that set it."""
    (data,) = worker.sql("SELECT data FROM events WHERE kind IN ('held', 'extended') ORDER BY seq DESC LIMIT 1")
    return float(json.loads(data[0])["ends_at"])


# -- making one ------------------------------------------------------------------------------------------------------


async def test_a_session_takes_the_slot_and_tells_its_id_and_its_end(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    owner = Owner(vast, worker)
    answer = await owner.create(lifetime=60, metadata={"job": 12})
    assert answer.status == 201
    assert answer.body == {"session_id": owner.id, "expiration": await deadline(worker), "lifetime": 60}
    assert answer.headers[HEADER] == owner.id
    held = await worker.get("/reservation")
    assert (held["id"], held["kind"], held["state"], held["metadata"]) == (owner.id, "session", "held", {"job": 12})
    assert held["duration_cap"] == 60
    assert held["request_idx"] == owner.auth["request_idx"]


async def test_without_a_lifetime_it_lives_for_a_minute(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    await Owner(vast, worker).create()
    assert (await worker.get("/reservation"))["duration_cap"] == 60


@pytest.mark.parametrize("first", ["session", "request"])
async def test_a_session_that_finds_the_slot_taken_is_refused_at_once(
    vast: FakeAutoscaler, worker: WorkerProcess, first: str
) -> None:
    if first == "session":
        await Owner(vast, worker).create(lifetime=60)
    else:
        holder = asyncio.ensure_future(post(worker.url + "/reserve", signed(vast, worker.url)))
    await worker.line("reservation_held")
    refused = await Owner(vast, worker).create(lifetime=60)
    assert refused.status == 429
    assert (refused.body["reason"], refused.headers[HEADER]) == ("busy", refused.body["reservation_id"])
    assert int(refused.headers["Retry-After"]) > 0
    assert worker.story() == [("queued", None), ("held", None), ("queued", None), ("expired", "busy")]
    if first == "request":
        await worker.release()
        assert (await holder).status == 200


async def test_a_request_waits_for_the_end_of_a_session(
    vast: FakeAutoscaler, worker: WorkerProcess, owner: Owner
) -> None:
    request = asyncio.ensure_future(post(worker.url + "/reserve", signed(vast, worker.url)))
    await worker.line("reservation_queued", nth=2)
    await owner.named("/session/end")
    await worker.line("reservation_held", nth=2)
    await worker.release()
    assert (await request).body["released"] == "explicit"
    assert worker.story()[2:] == [
        ("queued", None),
        ("released", "session_end"),
        ("held", None),
        ("released", "explicit"),
    ]


@pytest.mark.parametrize("lifetime", [0, -1, "60", True, float("nan"), float("inf"), [1]])
async def test_an_invalid_lifetime_is_named(vast: FakeAutoscaler, worker: WorkerProcess, lifetime: Any) -> None:
    answer = await Owner(vast, worker).create(lifetime=lifetime)
    assert answer.status == 422
    assert "lifetime" in answer.body["payload"]
    assert worker.story() == []


async def test_a_forged_signature_makes_no_session_and_leaves_no_trace(
    vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    owner = Owner(vast, worker)
    owner.auth["signature"] = FORGED
    answer = await owner.create(lifetime=60)
    assert answer.status == 401
    assert worker.story() == []
    await worker.terminate()  # with its last reports
    assert vast.outcomes == []
    assert vast.totals() == (0, 0, 0)


# -- ending one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["external", "http"])
async def test_its_owner_ends_it_on_either_port(worker: WorkerProcess, owner: Owner, port: str) -> None:
    base = worker.url if port == "external" else f"http://127.0.0.1:{worker.env['WORKER_HTTP_PORT']}"
    named = {"session_id": owner.id, "session_auth": owner.auth}
    answer = await post(base + "/session/end", named)
    assert (answer.status, answer.body) == (200, {"ended": True, "removed_session": owner.id})
    assert worker.story()[-1] == ("released", "session_end")
    again = await post(base + "/session/end", named)
    assert again.status == 400
    assert "error" in again.body
    assert len(worker.story()) == 3


async def test_the_http_port_knows_nothing_but_the_end_of_sessions(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    base = f"http://127.0.0.1:{worker.env['WORKER_HTTP_PORT']}"
    for path in ("/reserve", "/session/create", "/release", "/ping"):
        assert (await post(base + path, signed(vast, worker.url))).status == 404
    assert worker.story() == []


@pytest.mark.parametrize("path", ["/session/end", "/session/get", "/session/health"])
async def test_an_incomplete_session_auth_gets_401(
    vast: FakeAutoscaler, worker: WorkerProcess, owner: Owner, path: str
) -> None:
    for wrong in (None, {}, {**owner.auth, "reqnum": -1}, vast.grant(worker.url), {**owner.auth, "more": 1}):
        assert (await owner.named(path, session_auth=wrong)).status == 401
    assert (await worker.get("/reservation"))["id"] == owner.id


@pytest.mark.parametrize("path", ["/session/end", "/session/get"])
async def test_an_unknown_session_is_400(owner: Owner, path: str) -> None:
    answer = await owner.named(path, session_id="never-was")
    assert answer.status == 400
    assert "error" in answer.body


async def test_the_auth_may_come_in_another_order(worker: WorkerProcess, owner: Owner) -> None:
    answer = await owner.named("/session/end", session_auth=dict(reversed(owner.auth.items())))
    assert answer.status == 200
    assert await worker.line("reservation_released")


async def test_get_and_health_tell_what_the_client_asks_for(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    owner = Owner(vast, worker)
    created = await owner.create(lifetime=30, on_close_route="http://192.0.2.1/x", on_close_payload={"a": 1})
    got = await owner.named("/session/get")
    assert (got.status, got.headers[HEADER]) == (200, owner.id)
    assert got.body.pop("created_at") == pytest.approx(created.body["expiration"] - 30, abs=0.001)
    assert got.body == {
        "session_id": owner.id,
        "auth_data": owner.auth,
        "lifetime": 30,
        "expiration": created.body["expiration"],
        "on_close_route": "http://192.0.2.1/x",
        "on_close_payload": {"a": 1},
    }
    well = await owner.named("/session/health")
    assert (well.body, well.headers[HEADER]) == ({"ok": True}, owner.id)
    await worker.release()
    gone = (await owner.named("/session/health")).body
    assert (gone["ok"], gone["state"], gone["reason"]) == (False, "released", "explicit")
    assert (await owner.named("/session/health", session_auth={})).body == {"ok": False}


async def test_the_consumer_may_release_a_session(worker: WorkerProcess, owner: Owner) -> None:
    assert await worker.release(reservation_id=owner.id) == {"released": True, "reservation_id": owner.id}
    assert worker.story()[-1] == ("released", "explicit")
    assert (await owner.ping()).status == 410


# -- renewing one ----------------------------------------------------------------------------------------------------


async def test_a_ping_renews_it_by_its_lifetime(worker: WorkerProcess, owner: Owner) -> None:
    before = await deadline(worker)
    answer = await owner.ping()
    assert (answer.status, answer.body) == (200, {"result": {"ok": True}})
    ((at, kind, reason),) = worker.sql("SELECT at, kind, reason FROM events WHERE seq = 3")
    assert (kind, reason) == ("extended", "ping")
    assert await deadline(worker) == pytest.approx(at + 60, abs=0.001)
    assert await deadline(worker) > before


async def test_a_ping_does_not_shorten_what_the_consumer_extended(worker: WorkerProcess, owner: Owner) -> None:
    await post(worker.control + "/extend", {"seconds": 90})
    extended = await deadline(worker)
    assert (await owner.ping()).status == 200
    assert await deadline(worker) >= extended


async def test_a_ping_for_nothing_is_refused(vast: FakeAutoscaler, worker: WorkerProcess, owner: Owner) -> None:
    assert (await owner.ping("never-was")).status == 410
    assert (await owner.ping(signature=FORGED)).status == 401
    assert (await post(worker.url + "/ping", signed(vast, worker.url))).status == 422
    await owner.named("/session/end")
    assert (await owner.ping()).status == 410
    assert "extended" not in [kind for kind, _ in worker.story()]


async def test_no_lifetime_and_no_ping_goes_beyond_the_cap(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    owner = Owner(vast, worker)
    created = await owner.create(lifetime=86_400)
    assert created.body["lifetime"] == (await owner.named("/session/get")).body["lifetime"] == 100
    said = await worker.line("duration_capped")
    assert (said["asked_seconds"], said["cap_seconds"]) == (86_400, 100)
    ((held_at,),) = worker.sql("SELECT at FROM events WHERE kind = 'held'")
    assert await deadline(worker) == pytest.approx(held_at + 100, abs=0.001)
    await owner.ping()
    ((pinged_at,),) = worker.sql("SELECT at FROM events WHERE kind = 'extended'")
    assert await deadline(worker) == pytest.approx(pinged_at + 100, abs=0.001)


async def test_a_lifetime_ends_by_itself_on_time(vast: FakeAutoscaler, worker: WorkerProcess) -> None:
    owner = Owner(vast, worker)
    await owner.create(lifetime=0.4)
    await owner.ping()
    ends_at = await deadline(worker)
    await worker.line("reservation_expired")
    ((at, reason),) = worker.sql("SELECT at, reason FROM events WHERE kind = 'expired'")
    assert reason == "duration_elapsed"
    assert ends_at <= at < ends_at + 1  # a loop that sweeps comes later
    assert (await owner.named("/session/end")).status == 400


# -- what others see of it -------------------------------------------------------------------------------------------


async def test_a_session_is_load_while_it_is_held_and_a_success_when_its_owner_ends_it(
    vast: FakeAutoscaler, worker: WorkerProcess, owner: Owner
) -> None:
    idx = owner.auth["request_idx"]
    loaded = await vast.wait_for(lambda: [s for s in vast.statuses if s["working_request_idxs"] == [idx]])
    assert (loaded[0]["cur_load"], loaded[0]["num_requests_working"]) == (100, 1)
    await owner.named("/session/end")
    (outcome,) = await vast.wait_for(lambda: vast.outcomes_of(idx))
    assert outcome["status"] == "Success"
    await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 0)


async def test_no_secret_is_in_the_log(
    vast: FakeAutoscaler, worker: WorkerProcess, owner: Owner, tmp_path: Path
) -> None:
    await owner.ping()
    waiting = asyncio.ensure_future(post(worker.url + "/reserve", signed(vast, worker.url)))
    await worker.line("reservation_queued", nth=2)
    await owner.named("/session/end")
    await worker.line("reservation_held", nth=2)
    await worker.release()
    await waiting
    kept = everything_in(tmp_path)
    canonical = json.dumps(owner.auth, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest().encode() in kept
    for secret in (owner.auth["signature"], "master-secret"):
        assert secret.encode() not in kept
        assert secret not in json.dumps(worker.lines)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())
