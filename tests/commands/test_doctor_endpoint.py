"""`nullworker doctor --endpoint`: each finding about an endpoint is provoked once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from harness import PATIENCE, ROOT, secured
from instances import the_only
from programs import free_port, nullworker

from nullworker.doctor.endpoint import EndpointWorker, judge
from nullworker.testing import FakeAutoscaler, Parameters

# ---- the endpoint ----

RIGHT = {
    "target_util": 1.0,
    "max_queue_time": 1.0,
    "target_queue_time": 0.5,
    "min_load": 200.0,
    "max_workers": 5,
    "cold_workers": 0,
    "inactivity_timeout": 10.0,
    "endpoint_state": "active",
}
READY = EndpointWorker(1, "IDLE", 100.0)


def test_the_recommended_parameters_are_ok() -> None:
    assert {each.level for each in judge(RIGHT, 42, [READY], cost=100)} == {"ok"}


@pytest.mark.parametrize(
    ("name", "value", "level", "fix"),
    [
        ("target_util", 0.9, "error", "vastai update endpoint 42 --target_util 1"),
        ("target_util", None, "error", "vastai update endpoint 42 --target_util 1"),
        ("max_queue_time", 30.0, "error", "vastai update endpoint 42 --max_queue_time 1"),
        ("max_queue_time", None, "error", "vastai update endpoint 42 --max_queue_time 1"),
        ("target_queue_time", 10.0, "error", "vastai update endpoint 42 --target_queue_time 0.5"),
        ("target_queue_time", None, "error", "vastai update endpoint 42 --target_queue_time 0.5"),
        ("min_load", 150.0, "error", "vastai update endpoint 42 --min_load 200"),
        ("inactivity_timeout", None, "warning", "vastai update endpoint 42 --inactivity_timeout 10"),
        ("inactivity_timeout", -1.0, "warning", "vastai update endpoint 42 --inactivity_timeout 10"),
        ("max_workers", 0, "error", "vastai update endpoint 42 --max_workers 1"),
        ("cold_workers", 5, "warning", "vastai update endpoint 42 --cold_workers 0"),
        ("endpoint_state", "stopped", "error", "vastai update endpoint 42 --endpoint_state active"),
    ],
)
def test_each_unsuitable_parameter_is_a_finding(name: str, value: Any, level: str, fix: str) -> None:
    finding = the_only(list(judge({**RIGHT, name: value}, 42, [READY], cost=100)), name)
    assert finding.level == level
    assert finding.fix.startswith(fix)


def test_a_cost_different_from_max_perf() -> None:
    finding = the_only(list(judge(RIGHT, 42, [EndpointWorker(1, "IDLE", 250.0)], cost=100)), "cost")
    assert (finding.level, "NULL_MAX_PERF=100" in finding.fix, "cost=250" in finding.fix) == ("error", True, True)


def test_a_worker_that_is_errored() -> None:
    finding = the_only(list(judge(RIGHT, 42, [EndpointWorker(1, "ERROR", 100.0)], cost=100)), "workers")
    assert "vastai get endpt-logs 42" in finding.fix


def test_a_worker_that_is_loading_has_no_max_perf_yet() -> None:
    assert {each.level for each in judge(RIGHT, 42, [EndpointWorker(1, "MODEL_LOADING", 0.0)], cost=100)} == {"ok"}


def test_a_held_worker_that_the_engine_has_downgraded() -> None:
    held = EndpointWorker(1, "IDLE", perf=12.5, measured_perf=100, cur_perf=0, reqs_working=1)
    finding = the_only(list(judge(RIGHT, 42, [held], cost=100)), "perf")
    assert (finding.level, finding.fix) == ("error", "NULL_REPORT_PERF=held in the template's environment")
    assert "perf 12.5, measured_perf 100, cur_perf 0" in finding.what
    well = held._replace(perf=100)
    assert not [each for each in judge(RIGHT, 42, [well], cost=100) if each.check == "perf"]


def test_workers_that_are_all_held_while_nothing_starts() -> None:
    held = [EndpointWorker(number, "IDLE", 100.0, reqs_working=1) for number in (1, 2)]
    finding = the_only(list(judge(RIGHT, 42, held, cost=100)), "growth")
    assert finding.level == "warning"
    assert "--min_load 300" in finding.fix
    assert "cost=200" in finding.fix
    for others in (
        [*held, READY],
        [*held, EndpointWorker(3, "MODEL_LOADING", 0.0)],
        [EndpointWorker(number, "IDLE", 100.0, reqs_working=1) for number in range(5)],
    ):
        assert not [each for each in judge(RIGHT, 42, others, cost=100) if each.check == "growth"]


@pytest.mark.parametrize("field", [{"auto_delete_in_seconds": 3600.0}, {"auto_delete_due_24h": True}])
def test_an_endpoint_that_is_going_to_be_deleted(field: dict[str, Any]) -> None:
    finding = the_only(list(judge({**RIGHT, **field}, 42, [READY], cost=100)), "auto_delete")
    assert finding.level == "warning"


# ---- the command ----


async def doctor(*arguments: str, code: int, **env: str) -> dict[str, Any]:
    """`nullworker doctor --json`; its answer."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **env}
    command = (sys.executable, "-m", "nullworker", "doctor", "--json", *arguments)
    process = await forks.start(command, cwd=Path.cwd(), env=own)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert (process.returncode, err) == (code, b"")
    answer: dict[str, Any] = json.loads(out)
    assert answer["ok"] == (code == 0)
    return answer


def ports() -> dict[str, str]:
    return {name: str(free_port()) for name in ("WORKER_PORT", "WORKER_HTTP_PORT", "NULL_CONTROL_PORT")}


async def test_it_exits_with_1_when_there_is_an_error(tmp_path: Path) -> None:
    env = {"UNSECURED": "true", "NULL_EVENT_LOG": str(tmp_path / "log.db"), **ports()}
    assert {each["level"] for each in (await doctor(code=0, **env))["findings"]} == {"ok", "warning"}
    answer = await doctor(code=1, **{**env, "BACKEND": "null"})
    assert [each["check"] for each in answer["findings"] if each["level"] == "error"] == ["template"]


async def test_the_text_output_says_why_and_how_to_fix_it(tmp_path: Path) -> None:
    env = {"UNSECURED": "true", "NULL_EVENT_LOG": str(tmp_path / "log.db"), **ports()}
    said = (await nullworker("doctor", code=0, **env)).splitlines()
    at = next(number for number, line in enumerate(said) if line.startswith("warning  consumer"))
    assert [line.split()[0] for line in said[at + 1 : at + 3]] == ["why", "fix"]
    assert said[-1] == f"0 errors, 1 warning, {sum(line.startswith('ok ') for line in said)} ok"


async def test_an_endpoint_is_asked_by_the_official_client(tmp_path: Path) -> None:
    env = {"NULL_EVENT_LOG": str(tmp_path / "log.db"), **ports()}
    parameters = Parameters(target_util=0.9, cold_workers=3)
    async with FakeAutoscaler(parameters=parameters) as vast, secured(tmp_path, vast, NULL_MAX_PERF="50") as worker:
        await worker.line("key_loaded")
        await vast.wait_for(lambda: any(status["max_perf"] for status in vast.statuses))
        answer = await doctor("--endpoint", "null", "--autoscaler", vast.url, code=1, **env)
        levels = {each["check"]: each["level"] for each in answer["findings"]}
        assert levels["settings"] == "warning", "a desk is no instance"
        wrong = {name for name, level in levels.items() if level == "error"}
        assert wrong == {"target_util", "cost"}
        assert levels["cold_workers"] == "warning"
        parameters.target_util = 1.0
        await doctor("--endpoint", "null", "--autoscaler", vast.url, "--cost", "50", code=0, **env)


async def test_an_unknown_endpoint(tmp_path: Path, vast: FakeAutoscaler) -> None:
    env = {"NULL_EVENT_LOG": str(tmp_path / "log.db"), **ports()}
    answer = await doctor("--endpoint", "nul", "--autoscaler", vast.url, code=1, **env)
    assert "no endpoint named 'nul'" in answer["findings"][-1]["what"]


async def test_an_endpoint_without_an_api_key_is_wrong_use() -> None:
    assert "VAST_API_KEY" in await nullworker("doctor", "--endpoint", "null", code=2)
