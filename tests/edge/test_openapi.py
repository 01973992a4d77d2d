"""openapi.json, checked against the code's routes and structs and against live workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from harness import PATIENCE, ROOT, WorkerProcess, secured

from nullworker import __version__
from nullworker.eventlog import queries
from nullworker.fsm.table import EDGES, EVENT_KINDS, STATES
from nullworker.http import auth, control, external, sessions
from nullworker.outgoing import OwnPorts
from nullworker.readiness import WORKER_STATES, Readiness
from nullworker.testing import FakeAutoscaler

FILE = ROOT / "nullworker" / "http" / "openapi.json"
DESCRIPTION: dict[str, Any] = json.loads(FILE.read_text())
SCHEMAS: dict[str, Any] = DESCRIPTION["components"]["schemas"]
BODIES = {
    "Auth": auth.Auth,
    "Envelope": auth._Checked,
    "ReservePayload": external.ReservePayload,
    "CreatePayload": sessions.CreatePayload,
    "Named": sessions.Named,
    "ReleaseBody": control.ReleaseBody,
    "ExtendBody": control.ExtendBody,
}
#: Not checked where there is a grant: JSON Schema calls 7.0 an integer, and the worker does not.
SEVEN = "positive_data_acceptance"
#: What a tool cannot know: which ids there are.
IDS = """
[[operations]]
include-path = "/reservations"
checks.positive_data_acceptance.expected-statuses = ["2xx", 422]
"""


def operations(tag: str) -> set[tuple[str, str]]:
    return {
        (method.upper(), path)
        for path, item in DESCRIPTION["paths"].items()
        for method, operation in item.items()
        if method != "servers" and tag in operation["tags"]
    }


def routes(app: web.Application) -> set[tuple[str, str]]:
    """Those of an app; a HEAD comes with each GET."""
    found = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    return {(method, path) for method, path in found if method != "HEAD"}


def conforms(value: Any, name: str) -> None:
    """A value is as the schema of that name says."""
    # it takes 2 s, for which no other test should wait
    from openapi_schema_validator import (
        OAS31Validator,
        oas31_format_checker,
    )

    OAS31Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]},
        format_checker=oas31_format_checker,
    ).validate(value)


def words(schema: Any) -> set[str]:
    """All that are in an `enum` or `const` of a schema's property `reason`, or of `released`."""
    properties = schema.get("properties", {})
    found = {word for name in ("reason", "released") for word in properties.get(name, {}).get("enum", ())}
    return found.union(*(words(part) for part in schema.get("allOf", ())))


def test_it_is_valid_and_of_this_version() -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    OpenAPIV31SpecValidator(DESCRIPTION).validate()
    assert DESCRIPTION["info"]["version"] == __version__


def test_it_has_every_route_of_each_port_and_no_other() -> None:
    nothing: Any = None
    reserve, session = (
        external.ExternalHandlers(nothing, nothing, nothing, nothing, nothing, master_token=""),
        sessions.SessionHandlers(nothing, nothing, nothing, own_ports=OwnPorts((), ("", 0))),
    )
    handlers = control.ControlHandlers(nothing, nothing, nothing, nothing)
    assert operations("external") == routes(external.external_app(reserve, session, nothing))
    assert operations("session-end") == routes(external.session_end_app(session, nothing))
    assert operations("control") == routes(control.control_app(handlers, nothing, control.health, stub_health=True))


@pytest.mark.parametrize("name", BODIES)
def test_a_body_has_the_fields_that_the_worker_reads(name: str) -> None:
    (_, schemas) = msgspec.json.schema_components([BODIES[name]], ref_template="#/components/schemas/{name}")
    read, told = schemas[BODIES[name].__name__], SCHEMAS[name]
    assert list(told["properties"]) == list(read["properties"])
    assert told["required"] == read["required"]
    for field, schema in read["properties"].items():
        schema.pop("default", None)  # null: not given
        assert schema.items() <= told["properties"][field].items(), field


def test_its_words_are_those_of_the_table() -> None:
    def reasons(status: int) -> set[str | None]:
        return {edge.reason for edge in EDGES if edge.status == status}

    assert words(SCHEMAS["Released"]) | {SCHEMAS["Elapsed"]["properties"]["released"]["const"]} == reasons(200)
    assert words(SCHEMAS["Refused"]) == reasons(429)
    assert words(SCHEMAS["NotNow"]) == reasons(503)
    assert SCHEMAS["State"]["enum"] == list(STATES)
    assert SCHEMAS["Event"]["properties"]["kind"]["enum"] == list(EVENT_KINDS)
    assert SCHEMAS["WorkerState"]["enum"] == list(WORKER_STATES)
    checks = Readiness().checks()
    assert list(SCHEMAS["Readiness"]["properties"]["checks"]["properties"]) == list(checks)
    assert ", ".join(SCHEMAS["Reservation"]["properties"]) == queries._COLUMNS


async def test_streams_and_the_history_are_as_described(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, aiohttp.ClientSession() as http:
        body = {"duration": 600, "metadata": {"job": 1}, "stream": True}
        async with http.post(worker.url + "/reserve", json=body) as answer:
            conforms(await worker.get("/reservation?wait=20"), "Reservation")
            conforms(await worker.get("/status"), "Status")
            conforms(await worker.get("/readyz"), "Readiness")
            await worker.release(result={"done": [1, None]})
            *told, verdict = [json.loads(line[5:]) async for line in answer.content if line.startswith(b"data:")]
        assert [event["kind"] for event in told] == ["queued", "held", "released"]
        conforms(verdict, "Released")
        async with http.get(worker.control + "/events") as stream:
            seen = [json.loads((await data_line(stream))[5:]) for _ in told]
        assert seen == told
        for event in told:
            conforms(event, "Event")
        (reservation,) = (await worker.get("/reservations"))["reservations"]
        conforms(reservation, "Reservation")
        async with http.get(worker.control + "/openapi.json") as answer:
            assert await answer.json() == DESCRIPTION


async def data_line(stream: aiohttp.ClientResponse) -> bytes:
    while not (line := await asyncio.wait_for(stream.content.readline(), PATIENCE)).startswith(b"data:"):
        assert line, "the stream has ended"
    return line


async def drive(folder: Path, url: str, *options: str) -> None:
    """Ask a worker all that Schemathesis can think of, from the description alone; each answer must be as it says."""
    config = folder / "schemathesis.toml"
    config.write_text(IDS)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(FILE), "--url", url),
        *("--checks", "all", "--seed", "1", "--no-shrink", "--request-timeout", str(PATIENCE), *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


def bugs(worker: WorkerProcess) -> list[dict[str, Any]]:
    return [line for line in worker.lines if line.get("event") in ("bug", "observer_failed", "task_died")]


@contextlib.asynccontextmanager
async def reserving(worker: WorkerProcess) -> AsyncIterator[None]:
    """Somebody reserves, and again whenever it is over."""

    async def forever() -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                async with http.post(worker.url + "/reserve", json={"metadata": {"job": "42"}}) as answer:
                    assert answer.status == 200

    task = asyncio.ensure_future(forever())
    try:
        await worker.get("/reservation?wait=20")
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.slow
async def test_the_control_port_answers_as_described(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, reserving(worker):
        endless = ("--exclude-path", "/events", "--exclude-path", "/attach")
        await drive(tmp_path, worker.control, "--include-tag", "control", *endless, "-n", "15")
        assert bugs(worker) == []


@pytest.mark.slow
async def test_the_external_port_answers_as_described(tmp_path: Path) -> None:
    # a hold is over at once; and an unsecured worker takes a bare payload with unknown fields, so it refuses little
    off = f"{SEVEN},negative_data_rejection"
    async with WorkerProcess(tmp_path, MAX_RESERVATION_SECONDS="0.02") as worker:
        await drive(tmp_path, worker.url, "--include-tag", "external", "-n", "20", "--exclude-checks", off)
        assert bugs(worker) == []
        assert ("held", None) in worker.story()


@pytest.mark.slow
async def test_a_secured_worker_answers_strangers_as_described(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        await drive(tmp_path, worker.url, "--include-tag", "external", "-n", "10", "--exclude-checks", SEVEN)
        assert bugs(worker) == []
        assert worker.story() == []
