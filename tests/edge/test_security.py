"""docs/security.md, checked: its numbers, where secrets may appear, and where callbacks may go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import re
import ssl
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from claims import reserve
from harness import ROOT, WorkerProcess, post, secured, signed
from instances import consumer
from pages import DOCS, rows
from programs import dead_address

from nullworker.http.auth import EXPLAINED_BYTES
from nullworker.http.sockets import tls
from nullworker.settings import Settings, variable
from nullworker.testing import FakeAutoscaler

BOUNDS = list(rows(DOCS / "security.md", "| what | at most |"))
ATTACKS = list(rows(DOCS / "security.md", "| attack | bound |"))


@pytest.mark.parametrize("row", BOUNDS, ids=lambda row: row[2].strip("`"))
def test_bounds_are_those_of_the_code(row: list[str]) -> None:
    module, _, name = row[2].strip("`").rpartition(".")
    (number,) = re.findall(r"[\d,]+", row[1])
    assert getattr(importlib.import_module(module), name) == int(number.replace(",", ""))


def test_every_bound_of_the_http_edge_is_told() -> None:
    told = {row[2].strip("`") for row in BOUNDS}
    for module in ("nullworker.http.server", "nullworker.http.bodies"):
        names = [name for name in vars(importlib.import_module(module)) if re.match(r"MAX_|\w+_CONNECTIONS", name)]
        assert len(names) >= 3
        assert {f"{module}.{name}" for name in names} <= told


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row[2].strip("`"))
def test_every_attack_has_a_bound_and_a_test(row: list[str]) -> None:
    constants = {told[2].strip("`").rpartition(".")[2] for told in BOUNDS}
    settings = {variable(field.name) for field in dataclasses.fields(Settings)}
    assert set(re.findall(r"`([A-Z_]{5,})`", row[1])) <= constants | settings
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert f"def {row[2].strip('`')}(" in tests


def test_tls_is_what_it_says(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    context = tls(tmp_path / "crt", tmp_path / "key")
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.get_ciphers() == ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).get_ciphers()


async def test_tokens_and_signatures_are_in_no_log(tmp_path: Path, vast: FakeAutoscaler) -> None:
    settings = {"NULL_METRICS_TOKEN": "metrics-secret", "NULL_METRICS_HOST": "127.0.0.1", "NULL_METRICS_PORT": "0"}
    async with secured(tmp_path, vast, NULL_LOG_LEVEL="debug", **settings) as worker:
        await worker.line("key_loaded")
        query = "?api_key=key-in-query"
        held = await reserve(worker, vast)
        await worker.release()
        await held.answer()
        body = signed(vast, worker.url, {"lifetime": 60})
        body["auth_data"]["more"] = "secret-in-auth"
        session = await post(worker.url + "/session/create" + query, body)
        assert session.status == 201
        for route, sent in (
            ("/reserve", {**body, "auth_data": {**body["auth_data"], "signature": "forged-secret"}}),
            ("/reserve", "no object"),
            ("/nothing", body),
            ("/session/end", {"session_id": session.body["session_id"], "session_auth": "wrong-secret"}),
            ("/session/end", {"session_id": session.body["session_id"], "session_auth": body["auth_data"]}),
        ):
            await post(worker.url + route + query, sent)
        headers, url = {"Authorization": "Bearer wrong-secret"}, worker.url + "/pyworker/update" + query
        async with aiohttp.ClientSession(headers=headers) as http, http.post(url) as answer:
            assert answer.status == 401
        assert await worker.terminate() == 0
        assert len(worker.story()) >= 6
        said = json.dumps(worker.lines).encode() + read_all(tmp_path)
        signature = body["auth_data"]["signature"]
        for secret in ("master-secret", "metrics-secret", "secret", "key-in-query", signature, signature[:40]):
            assert secret.encode() not in said, secret


async def test_a_password_in_a_url_is_shown_nowhere(tmp_path: Path, vast: FakeAutoscaler) -> None:
    dead = dead_address().removeprefix("http://")
    urls: Any = {
        "REPORT_ADDR": f"http://user:REPORT-SECRET@{dead},https://REPORT-SECRET@127.0.0.1:1",
        "BACKEND_HEALTH_URL": f"http://user:HEALTH-SECRET@{dead}/health?token=HEALTH-SECRET",
    }
    async with WorkerProcess(tmp_path, CONTAINER_ID="7", MASTER_TOKEN="x", NULL_LOG_LEVEL="debug", **urls) as worker:
        await worker.line("key_not_loaded")
        await worker.line("report_not_delivered")
        shown = [await worker.get(path) for path in ("/status", "/readyz")]
        refused = await post(worker.url + "/reserve", signed(vast, worker.url))
        assert refused.status == 503
        assert await worker.terminate() == 0
    doctor = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nullworker", "doctor"),
        env={**worker.env, "PYTHONWARNINGS": "default"},
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await doctor.communicate())[0].decode()
    text = json.dumps([shown, refused.body, worker.lines, said])
    assert dead in text
    assert "***@" in said
    for hidden in ("REPORT-SECRET", "HEALTH-SECRET"):
        assert hidden not in text, hidden


async def test_what_the_autoscaler_is_told_has_no_password_of_a_url(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with contextlib.AsyncExitStack() as gone:
        healthy = await gone.enter_async_context(consumer())
        url = healthy.replace("//", "//user:SECRET@") + "?token=SECRET"
        async with secured(tmp_path, vast, BACKEND_HEALTH_URL=url, NULL_HEALTH_INTERVAL="0.1") as worker:
            await worker.line("consumer_healthy")
            await gone.aclose()
            told = await vast.wait_for(lambda: [status for status in vast.statuses if status["error_msg"]])
            assert "***@" in told[0]["error_msg"]
            assert "SECRET" not in json.dumps([told, worker.lines, await worker.get("/readyz")])


async def test_no_call_to_this_machine_goes_through_a_proxy(tmp_path: Path, vast: FakeAutoscaler) -> None:
    proxy = dead_address()
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY")
    settings: Any = dict.fromkeys(names, proxy)
    async with consumer() as health, secured(tmp_path, vast, BACKEND_HEALTH_URL=health, **settings) as worker:
        await worker.line("key_loaded")
        await worker.line("consumer_healthy")
        assert await (await reserve(worker, vast, duration=0)).outcome() == "Success"
        assert [line for line in worker.lines if line["event"] == "report_not_delivered"] == []


def read_all(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.glob("nullworker.db*"))


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f000001", "0177.0.0.1"])
async def test_a_callback_cannot_release_what_another_holds(tmp_path: Path, vast: FakeAutoscaler, host: str) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        route = f"http://{host}:{worker.control_port}/release"
        session: Any = await post(
            worker.url + "/session/create", signed(vast, worker.url, {"lifetime": 60, "on_close_route": route})
        )
        assert session.status == 201
        other = await reserve(worker, vast)
        await worker.release()
        await other.held()
        await worker.line("callback_failed")
        assert (await worker.get("/reservation"))["id"] == other.id
        await worker.release()
        assert (await asyncio.wait_for(other.answer(), 20)).body["released"] == "explicit"
        assert worker.sql("SELECT count(*) FROM events WHERE kind = 'released'") == [(2,)]


@pytest.mark.parametrize(
    "host",
    [
        "\N{CIRCLED DIGIT ONE}\N{CIRCLED DIGIT TWO}\N{CIRCLED DIGIT SEVEN}.0.0.1",
        "127\N{IDEOGRAPHIC FULL STOP}0\N{IDEOGRAPHIC FULL STOP}0\N{IDEOGRAPHIC FULL STOP}1",
        "".join(chr(ord(each) + 0xFEE0) for each in "localhost"),  # full width
        "localhost.",
        "a.localhost",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0::1]",
        "[::]",
        "127.8.9.10",
        "user:word@127.0.0.1",
    ],
)
async def test_a_callback_to_the_worker_itself_is_refused_however_its_host_is_written(
    tmp_path: Path, host: str
) -> None:
    async with WorkerProcess(tmp_path) as worker:
        for port in (worker.port, worker.control_port, worker.port + 1):
            route = f"http://{host}:{port}/extend"
            answer = await post(worker.url + "/session/create", {"on_close_route": route})
            assert (answer.status, answer.body["payload"]) == (
                422,
                {"on_close_route": "must not be one of this worker's own ports"},
            )


async def test_a_callback_of_one_worker_is_refused_by_the_control_port_of_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with WorkerProcess(tmp_path / "a") as one, WorkerProcess(tmp_path / "b") as other:
        assert (await post(other.url + "/session/create", {})).status == 201
        await post(one.url + "/session/create", {"on_close_route": other.control + "/release", "lifetime": 0.01})
        assert (await one.line("callback_failed"))["why"] == "it answered 403"
        assert [kind for kind, _ in other.story()] == ["queued", "held"]


async def test_a_large_envelope_that_is_wrong_is_not_searched_for_where(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        large = "x" * EXPLAINED_BYTES
        for wrong in ({"auth_data": {"x": large}}, {"auth_data": {}, "session_id": large}):
            answer = await post(worker.url + "/reserve", {**wrong, "payload": {}})
            assert (answer.status, list(answer.body)) == (422, ["error"])
        for payload in ({}, {"x": large}):
            answer = await post(worker.url + "/reserve", {"auth_data": {}, "payload": payload})
            assert (answer.status, answer.body["auth_data"]["reqnum"]) == (422, "missing parameter")
        answer = await post(worker.url + "/reserve", {"auth_data": {}, "payload": [large]})
        assert (answer.status, {"auth_data", "payload"} - set(answer.body)) == (422, set())
