"""The size of a local fleet, and its chart."""

from __future__ import annotations

import io
import sys

import aiohttp
import pytest

from nullworker.local.chart import Bar, chart, table
from nullworker.local.scaling import wanted
from nullworker.testing import FakeAutoscaler, Parameters
from nullworker.testing.payloads import SILENT
from nullworker.testing.routing import Router


@pytest.mark.parametrize(
    ("parameters", "load", "running", "workers"),
    [
        (Parameters(), 0, 0, 0),
        (Parameters(), 100, 0, 1),
        (Parameters(), 300, 1, 3),
        (Parameters(max_workers=2), 300, 1, 2),
        (Parameters(target_util=0.9), 100, 0, 2),  # 100 / 0.9 rounds up to one worker more
        (Parameters(target_util=0.5), 100, 0, 2),
        (Parameters(min_load=200), 0, 0, 2),
        (Parameters(min_load=200), 300, 2, 3),
        (Parameters(min_load=900, max_workers=4), 0, 0, 4),
        (Parameters(target_queue_time=2), 300, 2, 2),  # 1.5 s of load: not worth another
        (Parameters(target_queue_time=2), 500, 2, 5),
        (Parameters(target_queue_time=2), 100, 0, 1),  # without any there is no rate at which it would be served
        (Parameters(inactivity_timeout=-1), 0, 0, 1),
    ],
)
def test_how_many_workers_the_parameters_ask_for(
    parameters: Parameters, load: float, running: int, workers: int
) -> None:
    assert wanted(parameters, load=load, perf=100, running=running) == workers


@pytest.mark.parametrize(
    ("running", "working", "workers"),
    [
        (1, 100, 2),  # the first two came
        (2, 200, 2),  # two held at exactly 100 %: a third did not
        (2, 400, 3),  # with cost=200 it did
        (2, 100, 2),
    ],
)
def test_the_engine_of_may_2026_takes_exactly_100_percent_for_being_on_target(
    running: int, working: float, workers: int
) -> None:
    parameters, load = Parameters(max_workers=3), working + 100
    assert wanted(parameters, load=load, perf=100, running=running, working=working, stalls=True) == workers
    assert wanted(parameters, load=load, perf=100, running=running, working=working) == min(round(load / 100), 3)


def test_the_chart_shows_who_was_there_and_who_was_reserved() -> None:
    drawn = chart([Bar("worker 1", 0, 16, 64, [(32, 48)]), Bar("worker 2", 48, 56, 64, [])], 64)
    axis, one, two, count, _ = drawn.splitlines()
    assert one[11:] == "·" * 16 + "░" * 16 + "█" * 16 + "░" * 16
    assert two[11:] == " " * 48 + "·" * 8 + "░" * 8
    assert count[11:] == "1" * 48 + "2" * 16
    assert axis[11 + 20 : 11 + 22] == "20"


def test_what_stdout_cannot_show_is_drawn_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    drawn = chart([Bar("worker 1", 0, 16, 64, [(32, 48)])], 64)
    assert drawn.isascii()
    assert drawn.splitlines()[1][11:] == "." * 16 + "-" * 16 + "#" * 16 + "-" * 16


def test_a_table_is_as_wide_as_it_needs() -> None:
    assert table(("a", "long name"), [("longer", None)]) == "a       long name\n------  ---------\nlonger  -"


def test_a_retired_worker_gets_no_more_requests_whatever_it_reports() -> None:
    fleet = Router(Parameters())
    report = {**SILENT, "id": 1, "url": "http://a", "max_perf": 100, "error_msg": ""}
    fleet.report(report, 0)
    fleet.retired.add(1)
    fleet.report(report, 1)
    assert (fleet.grant(1, 100, 2), fleet.ready(2)) == (None, [])
    fleet.retired.discard(1)
    assert fleet.grant(1, 100, 2) == "http://a"


async def test_what_waits_for_a_worker_is_counted_by_its_cost(vast: FakeAutoscaler) -> None:
    async with aiohttp.ClientSession() as http:
        for cost in (100, 250):
            asked = {"endpoint": "null", "api_key": "", "cost": cost, "request_idx": 0}
            async with http.post(f"{vast.url}/route/", json=asked) as answer:
                assert answer.status == 200
    assert (vast.waiting, vast.waiting_load) == ([1, 2], 350)
