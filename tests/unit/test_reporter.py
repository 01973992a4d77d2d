"""What the reporter owes, when it sends it, and what it remembers of that: on a simulated clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from offices import PERF, Office
from offices import opened_office as opened_office

from nullworker.autoscaler.messages import OUTCOMES_PATH, STATUS_PATH
from nullworker.autoscaler.reporter import BATCH, OUTCOMES, STATUS
from nullworker.deadline_timer import DeadlineTimer
from nullworker.errors import LogUnavailable
from nullworker.fsm.book import Claim


def test_the_status_cursor_stands_at_what_was_sent_and_not_at_what_came_meanwhile(office: Office) -> None:
    async def story() -> None:
        office.serve()
        sent = office.log.last_seq
        office.autoscaler.during = office.serve
        office.autoscaler.answers[OUTCOMES_PATH] = "failed"
        await asyncio.sleep(0.5)
        assert office.autoscaler.bodies(STATUS_PATH)[0]["cur_perf"] == PERF
        assert office.log.last_seq > sent
        assert office.log.cursor(STATUS) == sent

    office.live(story)
    office.restart()
    office.autoscaler.calls.clear()

    async def after_a_kill() -> None:
        await asyncio.sleep(0.5)
        assert office.autoscaler.bodies(STATUS_PATH)[0]["cur_perf"] == PERF, "what came meanwhile, and no more"

    office.live(after_a_kill)


@pytest.mark.parametrize("load_seconds", [0.5, 3.0])
def test_a_status_counts_what_was_claimed_and_how_long_it_took_to_be_ready(office: Office, load_seconds: float) -> None:
    async def story() -> None:
        office.service.readiness.key_is_missing("not yet")
        await asyncio.sleep(load_seconds)
        office.service.readiness.key_is_loaded()
        for _ in range(3):
            office.serve()
        await asyncio.sleep(12.0)
        first, *_, last = office.autoscaler.bodies(STATUS_PATH)
        assert (first["loadtime"], first["max_perf"], first["num_requests_recieved"]) == (0.0, 0.0, 0)
        assert (last["loadtime"], last["max_perf"], last["num_requests_recieved"]) == (load_seconds, PERF, 3)
        times = [at for at, path, body in office.autoscaler.calls if path == STATUS_PATH and body["loadtime"]]
        assert times[0] < load_seconds + 0.1, "that it is ready is told at once"

    office.live(story)


def test_no_cursor_moves_when_nothing_was_delivered_and_all_is_sent_again(office: Office) -> None:
    async def story() -> None:
        office.autoscaler.answers = {STATUS_PATH: "failed", OUTCOMES_PATH: "failed"}
        office.serve()
        await asyncio.sleep(60.0)
        assert (office.log.cursor(STATUS), office.log.cursor(OUTCOMES)) == (0, 0)
        assert len(office.autoscaler.bodies(OUTCOMES_PATH)) < 12, "with pauses"
        statuses = office.autoscaler.bodies(STATUS_PATH)
        assert len(statuses) > 5
        assert {status["cur_perf"] for status in statuses} == {PERF}
        office.autoscaler.answers.clear()
        await asyncio.sleep(60.0)
        assert (office.log.cursor(STATUS), office.log.cursor(OUTCOMES)) == (3, 3)
        assert sum(status["cur_perf"] for status in office.autoscaler.bodies(STATUS_PATH)[len(statuses) :]) == PERF

    office.live(story)


def test_a_cursor_never_goes_back(office: Office) -> None:
    office.serve()
    office.log.move_cursor(STATUS, 3)
    office.reporter._move(STATUS, 1)
    assert office.log.cursor(STATUS) == 3


def test_an_outcome_that_is_refused_is_set_aside_by_itself_and_the_others_arrive(
    office: Office, logged: Callable[[], list[str]]
) -> None:
    async def story() -> None:
        office.autoscaler.refused = {3}
        for _ in range(5):
            office.serve()
        await asyncio.sleep(30.0)
        alone = [body["requests"] for body in office.autoscaler.bodies(OUTCOMES_PATH) if len(body["requests"]) == 1]
        assert [each["request_idx"] for (each,) in alone] == [3]
        assert office.settled() == [9]
        assert logged() == ["outcome_refused"]
        assert {index for index, _ in office.autoscaler.told()} == {1, 2, 3, 4, 5}
        assert office.log.cursor(OUTCOMES) == 15
        assert office.reporter.backlog == 0

    office.live(story)


def test_a_refused_outcome_in_a_backlog_is_found_by_halves_and_costs_few_calls(office: Office) -> None:
    async def story() -> None:
        office.autoscaler.refused = {150, 350}
        for _ in range(2 * BATCH):
            office.serve()
        await asyncio.sleep(30.0)
        assert office.settled() == [3 * 150, 3 * 350]
        delivered = [
            each["request_idx"]
            for body in office.autoscaler.bodies(OUTCOMES_PATH)
            for each in body["requests"]
            if not office.autoscaler.refused & {other["request_idx"] for other in body["requests"]}
        ]
        assert delivered == [index for index in range(1, 2 * BATCH + 1) if index not in (150, 350)]
        assert len(office.autoscaler.bodies(OUTCOMES_PATH)) <= 60

    office.live(story)


def test_a_refused_outcome_that_cannot_be_set_aside_is_not_passed_over(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise LogUnavailable("the disk is full")

    async def story() -> None:
        office.autoscaler.refused = {1}
        monkeypatch.setattr(office.log, "settle", fails)
        office.serve()
        await asyncio.sleep(30.0)
        assert office.log.cursor(OUTCOMES) == 0
        assert office.reporter.backlog == 1
        monkeypatch.undo()
        await asyncio.sleep(30.0)
        assert office.settled() == [3]
        assert office.log.cursor(OUTCOMES) == 3

    office.live(story)


def test_a_backlog_goes_in_batches_in_order_and_at_once(office: Office) -> None:
    for _ in range(2 * BATCH + 10):
        office.serve()
    office.restart()
    assert office.reporter.backlog == 2 * BATCH + 10

    async def story() -> None:
        await asyncio.sleep(0.5)
        sizes = [len(body["requests"]) for body in office.autoscaler.bodies(OUTCOMES_PATH)]
        assert sizes == [BATCH, BATCH, 10]
        assert [index for index, _ in office.autoscaler.told()] == list(range(1, 2 * BATCH + 11))
        assert office.reporter.backlog == 0

    office.live(story)


def test_what_ends_is_told_within_a_second_and_a_status_each_second_or_ten(office: Office) -> None:
    async def story() -> None:
        await asyncio.sleep(35.0)
        idle = [at for at, path, _ in office.autoscaler.calls if path == STATUS_PATH]
        assert [round(at) for at in idle] == [0, 10, 20, 30]
        for _ in range(5):
            office.serve()
            await asyncio.sleep(1.0)
        busy = [at for at, path, _ in office.autoscaler.calls if path == STATUS_PATH and at >= 35.0]
        assert len(busy) == 5
        assert len(office.autoscaler.told()) == 5

    office.live(story)


def test_an_end_that_waits_for_the_log_is_told_when_it_is_in_it(office: Office) -> None:
    async def story() -> None:
        held = office.service.claim(Claim(request_idx=7))
        office.log.conn.execute("PRAGMA query_only = ON")
        office.service.release(held.id)
        await asyncio.sleep(5.0)
        assert office.autoscaler.told() == []
        office.log.conn.execute("PRAGMA query_only = OFF")
        office.service.tick()
        await asyncio.sleep(3.0)
        assert office.autoscaler.told() == [(7, "Success")]

    office.live(story)


def test_the_last_reports_are_the_outcomes_and_then_a_status(office: Office) -> None:
    async def story() -> None:
        await asyncio.sleep(0.5)
        office.autoscaler.calls.clear()
        office.serve()
        await office.reporter.flush(2.0)
        assert [path for _, path, _ in office.autoscaler.calls][-1] == STATUS_PATH
        assert office.autoscaler.told() == [(1, "Success")]
        assert sum(status["cur_perf"] for status in office.autoscaler.bodies(STATUS_PATH)) == PERF

    office.live(story)


def test_a_flush_tells_also_what_ends_meanwhile(office: Office) -> None:
    """The deadline of a session that stays held over the stop."""

    async def story() -> None:
        held = office.service.claim(Claim(request_idx=7))
        office.autoscaler.during = lambda: office.service.release(held.id)
        await office.reporter.flush(2.0)
        assert office.autoscaler.told() == [(7, "Success")]
        assert office.reporter.backlog == 0

    office.loop.run_until_complete(story())


def test_a_flush_ends_in_time_whatever_the_autoscaler_does(office: Office, logged: Callable[[], list[str]]) -> None:
    async def story() -> None:
        office.autoscaler.takes = 100.0
        office.serve()
        before = office.loop.time()
        await office.reporter.flush(2.0)
        assert office.loop.time() - before <= 2.1
        assert logged() == ["last_reports_unsent"]
        assert office.log.cursor(OUTCOMES) == 0

    office.live(story)


# -- the deadline timer ----------------------------------------------------------------------------------------------


def test_a_tick_that_raises_is_not_the_last(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    tick = office.service.tick

    def fails_once() -> None:
        ticks.append(office.loop.time())
        if len(ticks) == 1:
            raise ValueError("a bug")
        tick()

    async def story() -> None:
        timer = DeadlineTimer(office.service)
        office.loop.set_exception_handler(lambda *_: None)
        monkeypatch.setattr(office.service, "tick", fails_once)
        held = office.service.claim(Claim(duration=5.0))
        await asyncio.sleep(6.0)
        assert held.state == "expired"
        assert len(ticks) == 2
        timer.stop()

    office.loop.run_until_complete(story())


def test_a_tick_that_raises_each_time_leaves_others_their_turn(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    def fails() -> None:
        ticks.append(office.loop.time())
        if len(ticks) == 100:
            office.loop.stop()
        raise ValueError("a bug")

    async def story() -> None:
        timer = DeadlineTimer(office.service)
        office.loop.set_exception_handler(lambda *_: None)
        monkeypatch.setattr(office.service, "tick", fails)
        office.service.claim(Claim(duration=5.0))
        await asyncio.sleep(6.0)
        assert ticks == pytest.approx([5.0, 5.25, 5.5, 5.75, 6.0][: len(ticks)], abs=0.01)
        assert len(ticks) >= 4
        timer.stop()

    office.loop.run_until_complete(story())


def test_a_deadline_that_is_brought_forward_comes_in_time_and_one_put_off_does_not_come_early(
    office: Office, logged: Callable[[], list[str]]
) -> None:
    def open_ones() -> int:
        return len(list(office.service.book.live()))

    async def story() -> None:
        timer = DeadlineTimer(office.service)
        for before in (100.0, 5.5):
            office.service.extend(office.service.claim(Claim(duration=before)).id, 5.0)
            await asyncio.sleep(5.01)
            assert open_ones() == 0
        office.service.extend(office.service.claim(Claim(duration=5.0)).id, 100.0)
        await asyncio.sleep(99.9)
        assert open_ones() == 1
        await asyncio.sleep(0.2)
        assert open_ones() == 0
        office.service.extend(office.service.claim(Claim(duration=8.0)).id, 5.0)
        timer.stop()
        await asyncio.sleep(10.0)
        assert open_ones() == 1, "it was stopped"
        assert logged() == []

    office.loop.run_until_complete(story())
