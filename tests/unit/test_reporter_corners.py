"""What the reporter counts and when it sends it, in the rarer cases: on a simulated clock."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable

import pytest
from offices import PERF, Office
from offices import opened_office as opened_office

from nullworker.autoscaler.messages import OUTCOMES_PATH, STATUS_PATH
from nullworker.autoscaler.reporter import OUTCOMES, STATUS
from nullworker.errors import LogUnavailable
from nullworker.eventlog import queries
from nullworker.fsm.book import Claim

# -- what is counted -------------------------------------------------------------------------------------------------


def test_a_duplicate_is_no_request_no_load_and_no_outcome(office: Office) -> None:
    async def story() -> None:
        first = office.service.claim(Claim(request_idx=7))
        assert office.service.claim(Claim(request_idx=7)).reason == "duplicate"
        await asyncio.sleep(3.0)
        status = office.autoscaler.bodies(STATUS_PATH)[0]
        assert (status["num_requests_recieved"], status["new_load"], status["rej_load"]) == (1, PERF, 0)
        office.service.release(first.id)
        await asyncio.sleep(3.0)
        assert office.autoscaler.told() == [(7, "Success")]
        assert office.reporter.backlog == 0

    office.live(story)


def test_an_extension_is_no_end(office: Office, logged: Callable[[], list[str]]) -> None:
    held = office.service.claim(Claim(request_idx=7))
    office.service.extend(held.id, 30.0)
    assert office.reporter.backlog == 0
    assert logged() == []


def test_ends_without_a_number_are_passed_over_without_a_call(office: Office) -> None:
    async def story() -> None:
        for _ in range(3):
            office.service.release(office.service.claim(Claim()).id)
        await asyncio.sleep(3.0)
        assert office.autoscaler.bodies(OUTCOMES_PATH) == []
        assert (office.log.cursor(OUTCOMES), office.reporter.backlog) == (9, 0)

    office.live(story)


def test_after_a_restart_the_figures_are_counted_over_any_number_of_ends(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = queries.finished
    monkeypatch.setattr(queries, "finished", lambda conn, *, after, limit: finished(conn, after=after, limit=2))
    for _ in range(5):
        office.serve()
    office.restart()

    async def story() -> None:
        await asyncio.sleep(0.5)
        assert office.autoscaler.bodies(STATUS_PATH)[0]["cur_perf"] == 5 * PERF

    office.live(story)


def test_the_disk_is_told_in_gib(office: Office) -> None:
    async def story() -> None:
        await asyncio.sleep(0.5)
        used = shutil.disk_usage("/").used / 2**30
        assert office.autoscaler.bodies(STATUS_PATH)[0]["disk_usage"] == pytest.approx(used, rel=0.2)

    office.live(story)


# -- when it is sent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("report_held", "expected"), [(True, 10), (False, 2)])
def test_while_something_is_held_a_status_comes_each_second_only_if_its_time_is_the_load(
    office: Office, report_held: bool, expected: int
) -> None:
    office.restart(report_held=report_held)

    async def story() -> None:
        office.service.claim(Claim(request_idx=7))
        await asyncio.sleep(10.5)
        assert len(office.autoscaler.bodies(STATUS_PATH)) == pytest.approx(expected, abs=1)

    office.live(story)


def test_what_changes_in_the_readiness_is_told_within_a_second_and_no_more_often(office: Office) -> None:
    readiness = office.service.readiness

    async def story() -> None:
        await asyncio.sleep(3.0)
        office.autoscaler.calls.clear()
        for _ in range(5):
            readiness.consumer_is_unhealthy("it does not answer")
            await asyncio.sleep(0.05)
            readiness.consumer_is_healthy()
            await asyncio.sleep(0.05)
        readiness.consumer_is_unhealthy("it does not answer")
        await asyncio.sleep(1.0)
        told = [status["error_msg"] for status in office.autoscaler.bodies(STATUS_PATH)]
        assert told[-1] == "it does not answer"
        assert len(told) == 2

    office.live(story)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_outcomes_that_cannot_be_read_are_read_later(
    office: Office, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async def story() -> None:
        monkeypatch.setattr(queries, "finished", fail)
        office.serve()
        await asyncio.sleep(2.0)
        assert set(logged()) == {"outcomes_not_read"}
        monkeypatch.undo()
        await asyncio.sleep(10.0)
        assert office.autoscaler.told() == [(1, "Success")]

    office.live(story)


def test_a_cursor_that_cannot_be_moved_stops_no_report(
    office: Office, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    def fail(*_: object) -> None:
        raise LogUnavailable("the disk is full")

    async def story() -> None:
        monkeypatch.setattr(office.log, "move_cursor", fail)
        office.serve()
        await asyncio.sleep(3.0)
        assert office.autoscaler.told() == [(1, "Success")], "once, since this process knows what it has told"
        assert set(logged()) == {"cursor_not_moved"}
        monkeypatch.undo()
        office.serve()
        await asyncio.sleep(15.0)
        assert office.autoscaler.told() == [(1, "Success"), (2, "Success")]
        assert (office.log.cursor(STATUS), office.log.cursor(OUTCOMES)) == (6, 6)

    office.live(story)


def test_a_flush_finds_the_outcome_that_is_refused_and_sends_the_others(office: Office) -> None:
    async def story() -> None:
        office.autoscaler.refused = {2}
        await asyncio.sleep(0.5)
        for _ in range(3):
            office.serve()
        await office.reporter.flush(2.0)
        assert {1, 3} <= {index for index, _ in office.autoscaler.told()}
        assert office.settled() == [6]
        assert office.log.cursor(OUTCOMES) == 9

    office.loop.run_until_complete(story())


def test_a_flush_to_an_autoscaler_that_is_down_tries_once(office: Office) -> None:
    async def story() -> None:
        office.autoscaler.answers = {OUTCOMES_PATH: "failed"}
        office.serve()
        await office.reporter.flush(2.0)
        assert [path for _, path, _ in office.autoscaler.calls] == [OUTCOMES_PATH, STATUS_PATH]

    office.loop.run_until_complete(story())
