"""`nullworker work` with a simulated worker and simulated commands: what it runs when, and with which result."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from simulated_commands import COMMAND, FOREVER, Commands, Guard
from simulated_time import simulated
from simulated_worker import URL, SimulatedWorker, now

from nullworker import logs
from nullworker.consumer import work as work_module
from nullworker.consumer.work import Work


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimulatedWorker:
    monkeypatch.setattr(work_module, "stopwatch", now)
    monkeypatch.setattr(work_module, "OrphanGuard", Guard)
    return SimulatedWorker(monkeypatch)


Begin = Callable[..., "tuple[Work, asyncio.Task[None]]"]


@pytest.fixture
def begin(worker: SimulatedWorker, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Work through these commands; the rest are the arguments of Work."""

    def begin(commands: Commands, **options: Any) -> tuple[Work, asyncio.Task[None]]:
        monkeypatch.setattr(work_module, "ProcessGroup", commands.start)
        options = {"kill_after": 5.0, "extend": False, "patience": 30.0, **options}
        work = Work(COMMAND, URL, **options)
        return work, asyncio.ensure_future(work.run())

    return begin


Lines = Callable[[str], "list[dict[str, Any]]"]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log lines with this word."""
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    yield lambda word: [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == word]
    logs.configure("console", "warning")


async def results(worker: SimulatedWorker, count: int) -> list[Any]:
    """Hold so many, one after another; their results."""
    found = []
    for number in range(len(worker.ended), len(worker.ended) + count):
        worker.hold(f"r{number}")
        found.append((await worker.end_of(f"r{number}"))["result"])
    return found


# -- one run for each reservation -----------------------------------------------------------------------------------


@simulated
async def test_the_exit_of_the_command_is_the_release_and_its_code_the_result(
    worker: SimulatedWorker, begin: Begin, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN", "kept")
    commands = Commands((10, 7))
    work, _ = begin(commands)
    worker.hold("r1", metadata={"job": "of 7"})
    end = await worker.end_of("r1")
    assert (end["state"], end["reason"], end["result"]) == ("released", "consumer_exit", {"exit_code": 7})
    assert now() == pytest.approx(10, abs=0.1)
    (environment,) = commands.environments
    assert {name: text for name, text in environment.items() if name.startswith("NULL")} == {
        "NULL_CONTROL_PORT": "18999",
        "NULLWORKER_RESERVATION_ID": "r1",
        "NULLWORKER_RESERVATION_DEADLINE": end["ends_at"],
        "NULLWORKER_RESERVATION_METADATA": '{"job": "of 7"}',
    }
    assert environment["OWN"] == "kept"
    await asyncio.sleep(1)
    (done,) = lines("work_done")
    assert (done["reservation_id"], done["exit_code"]) == ("r1", 7)
    (started,) = lines("work_started")
    assert (started["reservation_id"], started["pid"], started["ends_at"]) == ("r1", 4711, end["ends_at"])
    assert (lines("work_stops"), lines("work_ended_late"), lines("work_fails")) == ([], [], [])
    assert work.trouble() is None


@simulated
async def test_one_that_ends_first_ends_its_command_and_the_next_one_is_taken_when_that_has_ended(
    worker: SimulatedWorker, begin: Begin, lines: Lines
) -> None:
    commands = Commands((FOREVER, 0), (1, 0))
    commands.last_words = 4.0
    begin(commands)
    worker.hold("r1")
    await asyncio.sleep(1)
    worker.end("expired", "duration_elapsed")
    worker.hold("r2")
    await worker.end_of("r2")
    assert commands.times[1] == pytest.approx(commands.groups[0].ended_at, abs=0.2)
    assert commands.groups[0].ended_at == pytest.approx(5.0, abs=0.1)
    (stops,), (late,) = lines("work_stops"), lines("work_ended_late")
    assert (stops["reservation_id"], stops["why"]) == ("r1", "expired, duration_elapsed")
    assert (late["why"], late["exit_code"], late["reservation_id"]) == ("expired, duration_elapsed", 143, "r1")


@simulated
async def test_a_result_that_the_worker_does_not_hear_of_in_time_is_logged_and_released_later(
    worker: SimulatedWorker, begin: Begin, lines: Lines
) -> None:
    begin(Commands((10, 7)))
    worker.hold("r1")
    await asyncio.sleep(9)
    worker.silent = True
    await asyncio.sleep(10)
    (late,) = lines("work_ended_late")
    assert (late["exit_code"], late["why"]) == (7, "the worker does not answer")
    worker.silent = False
    assert (await worker.end_of("r1"))["result"] == {"exit_code": 7}


@pytest.mark.parametrize(
    ("extend", "patience", "asked", "gone_after"), [(False, 30.0, "1", 30.0), (True, 100.0, "all", 100.0)]
)
@simulated
async def test_extend_and_patience_are_those_of_its_reservations(
    worker: SimulatedWorker, begin: Begin, extend: bool, patience: float, asked: str, gone_after: float
) -> None:
    commands = Commands((FOREVER, 0))
    begin(commands, extend=extend, patience=patience)
    worker.hold("r1")
    await asyncio.sleep(1)
    assert [connection.extend for connection in worker.connections] == [asked]
    worker.silent = True
    await commands.groups[0].ended.wait()
    assert gone_after <= now() <= gone_after + 6


@pytest.mark.parametrize(("error", "code"), [(FileNotFoundError(2, "no"), 127), (PermissionError(13, "no"), 126)])
@simulated
async def test_a_command_that_cannot_be_run_fails_with_the_code_of_a_shell(
    worker: SimulatedWorker, begin: Begin, lines: Lines, error: OSError, code: int
) -> None:
    work, _ = begin(Commands(error))
    assert await results(worker, 3) == [{"exit_code": code}] * 3
    await asyncio.sleep(0.1)
    assert [line["command"] for line in lines("work_cannot_start")] == ["render"] * 3
    assert work.trouble() == "render failed at once 3 times in a row"


@pytest.mark.parametrize("until", [None, 3])
@simulated
async def test_a_run_that_hangs_is_ended_with_the_code_of_timeout(
    worker: SimulatedWorker, begin: Begin, lines: Lines, until: int | None
) -> None:
    commands = Commands((FOREVER, 0), (59, 3), (59, 3))
    begin(commands, run_timeout=60.0, until=until)
    (result,) = await results(worker, 1)
    assert result == ({"exit_code": 124} if until is None else {"exit_code": 124, "runs": 1, "failed": 1})
    assert commands.groups[0].ended_at == pytest.approx(60, abs=0.1)
    (stops,) = lines("work_stops")
    assert (stops["why"], stops["reservation_id"]) == ("it ran for 60 s", "r0")
    assert await results(worker, 1) != [result], "one that ends in time has a code of its own"


@simulated
async def test_a_run_that_hangs_for_two_seconds_has_not_failed_at_once(
    worker: SimulatedWorker, begin: Begin, lines: Lines
) -> None:
    """It has worked for as long as it may."""
    begin(Commands((FOREVER, 0)), run_timeout=1.5)
    await results(worker, 4)
    await asyncio.sleep(0.1)
    assert not lines("work_fails")


# -- commands that fail at once -------------------------------------------------------------------------------------


@simulated
async def test_from_the_third_failure_at_once_on_it_pauses_and_its_health_says_so(
    worker: SimulatedWorker, begin: Begin, lines: Lines
) -> None:
    commands = Commands((1.9, 1))
    work, _ = begin(commands)
    await results(worker, 2)
    await asyncio.sleep(0.1)
    assert (work.trouble(), lines("work_fails")) == (None, [])
    for failures in range(3, 13):
        await results(worker, 1)
        assert work.trouble() == f"render failed at once {failures} times in a row"
    await asyncio.sleep(0.1)
    pauses = [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert [line["pause_seconds"] for line in lines("work_fails")] == pauses
    assert lines("work_fails")[0]["why"] == "render failed at once 3 times in a row"
    between = [later - earlier for earlier, later in itertools.pairwise(commands.times[2:])]
    assert between == pytest.approx([pause + 1.9 for pause in pauses[:-1]], abs=0.3)
    commands.to_come[:] = [(0.1, 0)]
    await results(worker, 1)
    assert work.trouble() is None
    before = now()
    await results(worker, 1)
    assert now() - before < 1


@pytest.mark.parametrize("run", [(2.1, 1), (0.0, 0)], ids=["a failure that takes longer", "a success at once"])
@simulated
async def test_what_is_no_failure_at_once_causes_no_pause(
    worker: SimulatedWorker, begin: Begin, lines: Lines, run: tuple[float, int]
) -> None:
    work, _ = begin(Commands((0, 1), (0, 1), run, (0, 1), (0, 1), run))
    await results(worker, 8)
    await asyncio.sleep(0.1)
    assert (lines("work_fails"), work.trouble()) == ([], None)


# -- --until --------------------------------------------------------------------------------------------------------


@simulated
async def test_the_queue_is_drained_until_the_command_says_that_it_is_empty(
    worker: SimulatedWorker, begin: Begin, lines: Lines
) -> None:
    commands = Commands((5, 0), (5, 8), (5, 0), (5, 7), (5, 0), (0, 3))
    begin(commands, until=3)
    assert await results(worker, 2) == [
        {"exit_code": 7, "runs": 5, "failed": 2},
        {"exit_code": 0, "runs": 0, "failed": 0},
    ]
    await asyncio.sleep(0.1)
    first = lines("work_done")[0]
    assert (first["exit_code"], first["runs"], first["failed"]) == (7, 5, 2)
    assert {worker.ended[name]["reason"] for name in ("r0", "r1")} == {"consumer_exit"}
    assert not lines("work_fails")


@simulated
async def test_an_empty_queue_is_asked_again_while_idle_lasts_and_from_a_job_on_anew(
    worker: SimulatedWorker, begin: Begin
) -> None:
    commands = Commands((0, 3), (0, 3), (0, 0), (0, 3))
    begin(commands, until=3, idle=40.0)
    assert await results(worker, 1) == [{"exit_code": 0, "runs": 1, "failed": 0}]
    started = commands.times[0]
    expected = [0, 1, 3, *(3 + seconds for seconds in (0, 1, 3, 7, 15, 25, 35, 40))]
    assert [at - started for at in commands.times] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("why", ["the reservation ends", "it is told to stop"])
@simulated
async def test_the_wait_for_an_empty_queue_ends_when(worker: SimulatedWorker, begin: Begin, why: str) -> None:
    commands = Commands((0, 3))
    work, _ = begin(commands, until=3, idle=1000.0)
    worker.hold("r1")
    await asyncio.sleep(20)
    assert len(commands.times) == 5  # the next one would be after 25 s
    if why == "the reservation ends":
        worker.end("expired", "duration_elapsed")
        worker.hold("r2")
        await asyncio.sleep(0.2)
        assert commands.environments[-1]["NULLWORKER_RESERVATION_ID"] == "r2"
    else:
        work.stop()
        assert (await worker.end_of("r1"))["result"] == {"exit_code": 0, "runs": 0, "failed": 0}
        assert now() < 21


@pytest.mark.parametrize(("seconds", "failures"), [(1.9, 2), (2.1, 10)], ids=["two at once", "ten that take longer"])
@simulated
async def test_failures_in_a_row_release_it_and_the_pauses_are_spent_released(
    worker: SimulatedWorker, begin: Begin, lines: Lines, seconds: float, failures: int
) -> None:
    commands = Commands((3, 0), (seconds, 9))
    work, _ = begin(commands, until=3)
    assert await results(worker, 1) == [{"exit_code": 9, "runs": failures + 1, "failed": failures}]
    assert work.trouble() == "render keeps failing"
    assert await results(worker, 9) == [{"exit_code": 9, "runs": failures, "failed": failures}] * 9
    await asyncio.sleep(0.1)
    assert [line["pause_seconds"] for line in lines("work_fails")] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert {line["why"] for line in lines("work_fails")} == {"render keeps failing"}
    starts = commands.times[1 + failures :: failures]
    between = [later - earlier for earlier, later in itertools.pairwise(starts)]
    pauses = [2, 4, 8, 16, 32, 60, 60, 60]
    assert between == pytest.approx([pause + seconds * failures for pause in pauses], abs=0.3)


@pytest.mark.parametrize("end", [(1, 0), (0, 3)], ids=["a success", "an empty queue"])
@simulated
async def test_after_failures_the_health_and_the_pauses_begin_anew_with(
    worker: SimulatedWorker, begin: Begin, lines: Lines, end: tuple[float, int]
) -> None:
    work, _ = begin(Commands((0, 9), (0, 9), (0, 9), (0, 9), end, (0, 9)), until=3)
    await results(worker, 2)
    assert work.trouble() == "render keeps failing"
    await results(worker, 1)
    if end == (0, 3):  # which has released it
        assert work.trouble() is None
        await results(worker, 1)
    await asyncio.sleep(0.1)
    assert [line["pause_seconds"] for line in lines("work_fails")] == [1, 2, 1]


@simulated
async def test_failures_with_something_else_between_them_do_not_release(worker: SimulatedWorker, begin: Begin) -> None:
    slow, at_once = [(3, 9)] * 9 + [(3, 0)], [(1, 9), (3, 9), (1, 9), (1, 0)]
    commands = Commands(*slow, *slow, *at_once, *at_once, (0, 3))
    begin(commands, until=3)
    assert await results(worker, 1) == [{"exit_code": 9, "runs": 28, "failed": 24}]


@simulated
async def test_no_run_begins_after_half_of_the_longest_hold(worker: SimulatedWorker, begin: Begin) -> None:
    worker.max_hold = 100.0
    begin(Commands((20, 0)), until=3)
    assert await results(worker, 1) == [{"exit_code": 0, "runs": 3, "failed": 0}]


# -- being told to stop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1])
@simulated
async def test_while_nothing_is_held_it_stops_at_once(worker: SimulatedWorker, begin: Begin, before: int) -> None:
    work, task = begin(Commands((1, 0)))
    await results(worker, before)
    await asyncio.sleep(5)
    work.stop()
    assert work.trouble() == "nullworker work is stopping"
    await task
    assert now() == pytest.approx(5 + before, abs=0.2)


@pytest.mark.parametrize("until", [None, 3])
@simulated
async def test_while_a_command_runs_it_is_ended_and_what_is_held_is_released(
    worker: SimulatedWorker, begin: Begin, lines: Lines, until: int | None
) -> None:
    commands = Commands((FOREVER, 0))
    commands.last_words = 4.0
    work, task = begin(commands, until=until)
    worker.hold("r1")
    await asyncio.sleep(10)
    work.stop()
    await task
    result = {"exit_code": 143} if until is None else {"exit_code": 143, "runs": 1, "failed": 1}
    assert (worker.ended["r1"]["reason"], worker.ended["r1"]["result"]) == ("consumer_exit", result)
    assert len(commands.times) == 1
    assert now() == pytest.approx(14, abs=0.1)
    assert lines("work_stops")[0]["why"] == "told to stop"
    assert (lines("work_fails"), len(lines("work_done"))) == ([], 1)


@simulated
async def test_a_stop_is_no_failure_of_the_command(worker: SimulatedWorker, begin: Begin, lines: Lines) -> None:
    """Although it was the second run in a row that has ended at once with another code than 0."""
    commands = Commands((1, 9), (FOREVER, 0))
    work, task = begin(commands, until=3)
    worker.hold("r1")
    await asyncio.sleep(1.5)
    work.stop()
    await task
    assert worker.ended["r1"]["result"] == {"exit_code": 143, "runs": 2, "failed": 2}
    assert work.trouble() == "nullworker work is stopping"
    assert not lines("work_fails")


@simulated
async def test_a_second_stop_does_not_wait_for_the_command(worker: SimulatedWorker, begin: Begin) -> None:
    commands = Commands((FOREVER, 0))
    commands.last_words = 1000.0
    work, task = begin(commands, kill_after=9999.0)
    worker.hold("r1")
    await asyncio.sleep(1)
    work.stop()
    await asyncio.sleep(100)
    assert not task.done()
    work.stop()
    await task
    assert worker.ended["r1"]["result"] == {"exit_code": 137}
    assert now() == pytest.approx(101, abs=0.1)


@simulated
async def test_a_stop_in_a_pause_does_not_wait_for_its_end(worker: SimulatedWorker, begin: Begin) -> None:
    commands = Commands((0, 1))
    work, task = begin(commands)
    await results(worker, 8)  # the pause is of 32 s now
    await asyncio.sleep(1)
    before = now()
    work.stop()
    await task
    assert now() == before


@simulated
async def test_a_fault_of_its_own_ends_it_and_closes_the_guard(
    worker: SimulatedWorker, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(signal.SIGKILL)
    monkeypatch.setattr(work_module, "OrphanGuard", lambda _: guard)
    _, task = begin(Commands((1, 0)))
    worker.hold("r1")
    worker.held = {"id": "r1"}  # what no worker answers
    with pytest.raises(KeyError):
        await task
    assert guard.closed


@simulated
async def test_exits_are_collected_also_when_no_command_runs(worker: SimulatedWorker, begin: Begin) -> None:
    commands = Commands((1, 0))
    work, _ = begin(commands)
    work.reap()
    await results(worker, 1)
    await asyncio.sleep(10)
    work.reap()
    assert [group.reaped for group in commands.groups] == [1]
