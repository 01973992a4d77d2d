"""Bad input: each is answered with a status and the name of the field, in JSON, and leaves nothing in the log."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from harness import Answer, WorkerProcess, changed, post, secured, signed

from nullworker.testing import FakeAutoscaler
from nullworker.testing.keys import load_or_make, sign

MAX_BODY, MAX_EXTERNAL_BODY = 1024 * 1024, 128 * 1024
FORGED = "Zm9yZ2Vk" * 40


class Case(NamedTuple):
    """A body as it is sent, the status of its answer, and the words that its `error` must have."""

    body: bytes
    status: int
    names: tuple[str, ...] = ()


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


NOT_JSON: tuple[Case, ...] = (
    Case(b"", 422),
    Case(b"{", 422),
    Case(b"5", 422, ("object",)),
    Case(b"[]", 422, ("object",)),
    Case(b"null", 422, ("object",)),
    Case(b'"\xff"', 422),
    Case(b"\xff\xfe", 422),
    Case(nested(600), 422, ("deep",)),
    Case(nested(60_000), 422, ("deep",)),
    Case(nested(30_000)[:-1], 422, ("deep",)),
    Case(b'["' + b'\\"' * 60_000, 422),
    Case(b'{"\\ud800": NaN}', 422),
    Case(b" " * (2 * MAX_BODY), 413, ("the body is larger than",)),
)


def with_auth(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**body, "auth_data": {**body["auth_data"], **fields}}


def envelopes(good: dict[str, Any]) -> Iterator[Case]:
    """Whatever the route: envelopes that are none. `good` is one that is, but for its payload."""

    def sent(body: dict[str, Any]) -> bytes:
        return json.dumps(body).encode()

    yield from NOT_JSON
    yield Case(b"{}", 422, ("auth_data",))
    yield Case(sent({**good, "auth_data": None}), 422, ("auth_data",))
    yield Case(sent({**good, "auth_data": []}), 422, ("auth_data",))
    yield Case(sent({**good, "auth_data": {}}), 422, tuple(f"auth_data.{name}" for name in good["auth_data"]))
    for name in good["auth_data"]:
        lacking = {key: value for key, value in good["auth_data"].items() if key != name}
        yield Case(sent({**good, "auth_data": lacking}), 422, (f"auth_data.{name}",))
        values: list[Any] = [None, True, [], {}, "abc" if name in ("cost", "reqnum", "request_idx") else 5]
        for wrong in values:
            yield Case(sent(with_auth(good, **{name: wrong})), 422, (f"auth_data.{name}",))
    for index in (1.5, "1", 2**63):
        yield Case(sent(with_auth(good, request_idx=index)), 422, ("auth_data.request_idx",))
    for cost in ("", "1e", "nan", float("nan"), float("inf")):
        yield Case(sent(with_auth(good, cost=cost)), 422, ("auth_data.cost",))
    yield Case(sent({key: value for key, value in good.items() if key != "payload"}), 422, ("payload",))
    yield Case(sent({**good, "session_id": 5}), 422, ("session_id",))
    yield Case(sent(with_auth(good, more="\ud800")), 422)
    yield Case(sent(with_auth(good, more="X")).replace(b'"X"', nested(3000)), 422)
    yield Case(sent(with_auth(good, signature=FORGED)), 401, ("signature",))
    yield Case(sent(with_auth(good, signature="not base64 ✓")), 401, ("signature",))
    yield Case(sent(with_auth(good, signature="")), 401, ("signature",))
    yield Case(sent(with_auth(good, url="http://elsewhere")), 401, ("signature",))


def payloads(good: dict[str, Any], wrong: dict[str, list[Any]]) -> Iterator[Case]:
    """Payloads that the route cannot take, each with one field that is wrong."""
    no_objects: list[Any] = [None, 5, [], "text"]
    for payload in no_objects:
        yield Case(json.dumps({**good, "payload": payload}).encode(), 422)
    for name, values in wrong.items():
        for value in values:
            sent = json.dumps({**good, "payload": {name: "X"}}).encode()
            value = value if isinstance(value, bytes) else json.dumps(value).encode()
            yield Case(sent.replace(b'"X"', value), 422, (name,))


SECONDS: list[Any] = ["abc", "5", True, False, [], {}, -1, -0.001, float("nan"), float("inf"), b"1e400", b"9" * 400]
METADATA: list[Any] = [5, "text", [], {"big": "x" * 4096}, {"n": float("nan")}, b'{"deep": %s}' % nested(500)]


async def send(url: str, body: bytes) -> Answer:
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url, data=io.BytesIO(body)) as answer:
        return Answer(answer.status, await answer.json(), answer.headers)


async def check(url: str, cases: Iterator[Case] | tuple[Case, ...]) -> None:
    """Send each case; every one that is not answered as it should be is shown."""
    wrong = []
    for case in cases:
        answer = await send(url, case.body)
        error = str(answer.body.get("error", ""))
        if answer.status != case.status or not error or not all(name in error for name in case.names):
            wrong.append((case.body[:120], case.status, case.names, answer.status, answer.body))
    assert wrong == []


async def no_trace(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    """Nothing of it was claimed, logged as a bug, or told to the autoscaler; and the worker goes on."""
    assert worker.sql("SELECT count(*) FROM events") == [(0,)]
    body = signed(vast, worker.url, {"duration": 0})
    assert (await post(worker.url + "/reserve", body)).status == 200
    await worker.line("reservation_expired")
    assert not [line for line in worker.lines if line["event"] in ("bug", "")]
    await vast.wait_for(lambda: vast.outcomes)
    assert [outcome["request_idx"] for outcome in vast.outcomes] == [body["auth_data"]["request_idx"]]
    totals = vast.totals()
    assert (totals.rej_load, totals.new_load <= 100) == (0, True)


async def test_invalid_bodies_of_reserve(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    good = signed(vast, worker.url)
    await check(worker.url + "/reserve", envelopes(good))
    wrong = {"duration": SECONDS, "metadata": METADATA, "stream": [1, "yes", []]}
    await check(worker.url + "/reserve", payloads(good, wrong))
    assert await worker.metric("nullworker_auth_failures_total", reason="signature") == 4
    await no_trace(worker, vast)


async def test_invalid_bodies_of_session_create(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    good = signed(vast, worker.url)
    await check(worker.url + "/session/create", envelopes(good))
    routes: list[Any] = [5, "/release", "ftp://example.com/", "http://", worker.control + "/release"]
    wrong = {"lifetime": [*SECONDS, 0], "metadata": METADATA, "on_close_route": routes}
    await check(worker.url + "/session/create", payloads(good, wrong))
    await no_trace(worker, vast)


async def test_invalid_bodies_of_the_session_routes(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    good = signed(vast, worker.url)
    await check(worker.url + "/ping", envelopes(good))
    await check(worker.url + "/ping", (Case(json.dumps(good).encode(), 422, ("session_id",)),))
    for route in ("/session/end", "/session/get", "/session/health"):
        cases = (Case(b"{}", 422, ("session_id",)), Case(b'{"session_id": 5}', 422, ("session_id",)))
        await check(worker.url + route, (*NOT_JSON, *cases))
    await no_trace(worker, vast)


async def test_invalid_bodies_of_the_control_port(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    not_json = tuple(case for case in NOT_JSON if case.body.strip())  # an empty body is a plain release
    cases = (
        Case(b'{"reservation_id": 5}', 422, ("reservation_id",)),
        Case(b'{"reason": ""}', 422, ("reason",)),
        Case(b'{"result": NaN}', 422, ("result",)),
        Case(b'{"result": "%s"}' % (b"x" * 64 * 1024), 422, ("result",)),
        Case(b'{"result": %s}' % nested(500), 422, ("result",)),
        Case(b" " * (2 * MAX_BODY), 413),
    )
    await check(worker.control + "/release", (*not_json, *cases))
    seconds = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in SECONDS]
    extensions = [Case(b'{"seconds": %s}' % value, 422, ("seconds",)) for value in (*seconds, b"null")]
    named = Case(b'{"seconds": 5, "reservation_id": 5}', 422, ("reservation_id",))
    await check(worker.control + "/extend", (*NOT_JSON, Case(b"{}", 422, ("seconds",)), *extensions, named))
    await no_trace(worker, vast)


async def test_a_missing_field_is_named_where_it_is_missing(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    body = signed(vast, worker.url)
    del body["auth_data"]["reqnum"]
    answer = await post(worker.url + "/reserve", body)
    assert (answer.status, answer.body["auth_data"]) == (422, {"reqnum": "missing parameter"})
    answer = await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": "abc"}))
    assert list(answer.body["payload"]) == ["duration"]


async def test_further_keys_and_numbers_as_text_are_fine(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    for cost in ("100", " 1.5e2", 0.5):
        body = with_auth(signed(vast, worker.url, {"duration": 0}), cost=cost, more=[1, 2])
        assert (await post(worker.url + "/reserve", body)).status == 200


async def test_unknown_routes_and_methods(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    async def asked(method: str, url: str) -> Answer:
        async with aiohttp.ClientSession() as http, http.request(method, url) as answer:
            return Answer(answer.status, await answer.json(), answer.headers)

    for url in (worker.url + "/nothing", worker.url + "/", worker.control + "/reserve", worker.url + "/%ed%a0%80"):
        for method in ("GET", "POST", "DELETE", "TRACE"):
            answer = await asked(method, url)
            assert (answer.status, list(answer.body)) == (404, ["error"])
    for method, url, allowed in (
        ("GET", worker.url + "/reserve", "POST"),
        ("PUT", worker.url + "/session/create", "POST"),
        ("GET", worker.control + "/release", "POST"),
        ("POST", worker.control + "/readyz", "GET"),
    ):
        answer = await asked(method, url)
        assert (answer.status, list(answer.body)) == (405, ["error"])
        assert allowed in answer.headers["Allow"]
    assert await worker.metric("nullworker_http_requests_total", port="external", route="unknown", status="404") == 12
    await no_trace(worker, vast)


async def test_a_body_that_contradicts_its_headers(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(worker.url + "/reserve", data=b"no gzip", headers=headers) as answer,
    ):
        assert (answer.status, list(await answer.json())) == (415, ["error"])
    await no_trace(worker, vast)


@pytest.mark.parametrize(("port", "most"), [("external", MAX_EXTERNAL_BODY), ("control", MAX_BODY)])
async def test_a_body_over_the_limit_is_refused(worker: WorkerProcess, port: str, most: int) -> None:
    url = worker.url + "/reserve" if port == "external" else worker.control + "/release"
    async with aiohttp.ClientSession() as http:
        for size, status in ((most, 422), (most + 1, 413)):
            async with http.post(url, data=io.BytesIO(b'"' + b" " * (size - 2) + b'"')) as answer:
                assert (answer.status, list(await answer.json())) == (status, ["error"])
                assert status == 422 or str(most) in (await answer.json())["error"]


async def test_a_body_that_grows_beyond_the_limit_without_saying_so(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    async def chunks() -> Any:
        for _ in range(3):
            yield b" " * (MAX_BODY // 2)

    async with aiohttp.ClientSession() as http, http.post(worker.url + "/reserve", data=chunks()) as answer:
        assert (answer.status, list(await answer.json())) == (413, ["error"])
    await no_trace(worker, vast)


async def test_a_body_that_does_not_arrive_gets_408(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, module=changed(nullworker__http__bodies__BODY_SECONDS=0.2)) as worker:
        await worker.line("key_loaded")
        for port, route in ((worker.port, "/reserve"), (worker.control_port, "/release")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
            head, _, body = (await asyncio.wait_for(reader.readuntil(b"}"), 10)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert list(json.loads(body)) == ["error"]
            writer.close()
        await no_trace(worker, vast)


async def test_a_truncated_body_is_not_logged_as_a_bug(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(b"POST /reserve HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await no_trace(worker, vast)


async def test_a_signature_by_another_key_is_refused(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    stranger = load_or_make()
    for _ in range(3):
        body = with_auth(signed(vast, worker.url, {"duration": 0}), signature=sign(stranger, worker.url))
        answer = await post(worker.url + "/reserve", body)
        assert (answer.status, list(answer.body)) == (401, ["error"])
    assert [seen.call for seen in vast.seen].count("pubkey") == 1  # the key is not 10 s old
    assert await worker.metric("nullworker_auth_failures_total", reason="signature") == 3
    await no_trace(worker, vast)


@pytest.mark.parametrize(("policy", "status", "lines"), [("warn", 200, 1), ("enforce", 401, 0), ("off", 200, 0)])
async def test_a_grant_for_another_worker(
    tmp_path: Path, vast: FakeAutoscaler, policy: str, status: int, lines: int
) -> None:
    async with secured(tmp_path, vast, NULL_GRANT_URL=policy) as worker:
        await worker.line("key_loaded")
        answer = await post(worker.url + "/reserve", signed(vast, "http://10.0.0.1:1", {"duration": 0}))
        assert answer.status == status
        own = await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": 0}))
        assert own.status == 200
        assert [line["event"] for line in worker.lines].count("grant_for_another_url") == lines
        assert worker.sql("SELECT count(*) FROM reservations") == [(1 + (status == 200),)]
        assert await worker.metric("nullworker_auth_failures_total", reason="url") == (status == 401)


async def test_the_update_route_takes_the_master_token_and_nothing_else(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    for token in (b"", b"Bearer ", b"Bearer wrong", b"Bearer \xff", b"Basic bWFzdGVyLXNlY3JldA=="):
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        head = b"POST /pyworker/update HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
        writer.write(head + b"Authorization: " + token + b"\r\n\r\n")
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 10)
        assert answer.startswith(b"HTTP/1.1 401 "), token
        assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["error"]
        writer.close()
    assert await worker.metric("nullworker_auth_failures_total", reason="token") == 5
    await no_trace(worker, vast)


async def test_without_a_master_token_the_update_route_answers_401(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, aiohttp.ClientSession() as http:
        for token in ("Bearer", "Bearer ", ""):
            async with http.post(worker.url + "/pyworker/update", headers={"Authorization": token}) as answer:
                assert answer.status == 401
