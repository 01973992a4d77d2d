"""A whole dispatcher in virtual time while its queue, the autoscaler, its ledger or its clock fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from dispatch_world import World, dispatching, play, rows, until

from nullworker.dispatch.decision import Counts, Policy
from nullworker.dispatch.dispatcher import Dispatcher
from nullworker.dispatch.driver import Terms
from nullworker.dispatch.limits import Limits
from stress.faulty_disk import FaultyDisk

TEN_MINUTES = 600.0
FREE = Limits(price=1.0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    faulty = FaultyDisk(tmp_path, Random(1))
    faulty.install()
    yield faulty
    faulty.remove()


async def work_is_done(world: World, dispatcher: Dispatcher, jobs: int) -> None:
    await until(lambda: world.done == jobs, 2000)
    await until(lambda: not dispatcher.book.claims, 60)


async def refused() -> Counts:
    raise ConnectionRefusedError(111, "Connection refused")


async def slow() -> Counts:
    await asyncio.sleep(60)
    raise AssertionError


async def negative() -> Counts:
    return Counts(-3, 0)


async def no_number() -> Counts:
    raise ValueError("one or two numbers from 0 up are wanted, and there is 'ERR'")


@pytest.mark.parametrize("fault", [refused, slow, negative, no_number])
def test_a_queue_that_fails_for_ten_minutes_opens_and_ends_nothing_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Callable[[], Coroutine[Any, Any, Counts]]
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [900.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 1, 30)
            world.queue_fault = fault
            world.jobs += [1.0] * 5
            claims, renewals, reads = world.claims, world.renewals, world.reads
            await asyncio.sleep(TEN_MINUTES)
            assert (world.claims, len(world.held)) == (claims, 1)
            assert world.reads - reads - 1 <= dispatcher.queue_errors <= world.reads - reads  # one may be under way
            assert world.renewals - renewals >= TEN_MINUTES / 10 - 2
            assert world.count("queue_unreadable") == 1
            assert dispatcher.readiness()["queue"] is not None
            world.queue_fault = None
            await asyncio.sleep(10)
            assert world.count("queue_unreadable_over") == 1
            assert dispatcher.readiness()["queue"] is None
            await until(lambda: world.done == 6, 600)

    play(monkeypatch, scene)


def test_an_autoscaler_that_is_down_for_ten_minutes_is_said_once_and_what_is_held_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [900.0, 200.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 2, 30)
            world.engine_down = True
            world.jobs += [1.0] * 7
            await asyncio.sleep(TEN_MINUTES)
            assert world.done == 1
            assert len(dispatcher.book.in_state("held")) == 1
            assert len(dispatcher.book.claims) == 4
            assert world.count("autoscaler_unreachable") == 1
            assert str(dispatcher.readiness()["autoscaler"]).startswith("connection refused")
            world.engine_down = False
            await work_is_done(world, dispatcher, 9)
            assert world.count("autoscaler_unreachable_over") == 1
            assert world.most_held <= 4
        assert len(rows(tmp_path, "SELECT 1 FROM claims")) == world.claims == 9

    play(monkeypatch, scene)


def test_an_autoscaler_that_is_down_at_the_start_is_waited_for_while_held_sessions_are_renewed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [900.0]
        async with dispatching(world, tmp_path, limits=FREE):
            await until(lambda: len(world.held) == 1, 30)
        world.engine_down = True
        renewals = world.renewals
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await asyncio.sleep(TEN_MINUTES)
            assert world.renewals - renewals >= TEN_MINUTES / 10 - 2
            assert world.count("autoscaler_unreachable") == 1
            world.engine_down = False
            await work_is_done(world, dispatcher, 1)

    play(monkeypatch, scene)


@pytest.mark.parametrize("listed", [True, False])
def test_claims_whose_machines_were_stopped_while_no_dispatcher_ran_end_and_make_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: bool
) -> None:
    """Their jobs were done and the endpoint has scaled to zero: nobody is left who could tell how they ended."""

    async def scene(world: World) -> None:
        world.jobs = [60.0] * 4
        async with dispatching(world, tmp_path, limits=FREE):
            await until(lambda: len(world.held) == 4, 30)
        await asyncio.sleep(3600)
        assert world.done == 4
        world.stopped = {world.url(number) for number in world.listed}
        world.listed = world.listed if listed else set()
        world.jobs = [60.0] * 4
        async with dispatching(world, tmp_path, limits=FREE):
            await until(lambda: len(world.held) == 4, 60)
            assert rows(tmp_path, "SELECT reason, count(*) FROM claims GROUP BY reason") == [(None, 4), ("gone", 4)]

    play(monkeypatch, scene)


def test_a_claim_whose_machine_runs_and_does_not_answer_stays_held_for_a_day(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [50 * 3600.0]
        async with dispatching(world, tmp_path, policy=Policy(4, interval=600.0), limits=FREE) as dispatcher:
            await until(lambda: len(dispatcher.driver.silent) == 0 and dispatcher.book.in_state("held"), 30)
            await asyncio.sleep(10)
            world.unreachable = {world.url(number) for number in world.listed}
            await asyncio.sleep(18 * 3600)
            assert len(dispatcher.driver.silent) == 1
            assert 2 <= world.count("claim_news") <= 10
            world.unreachable = set()
            await asyncio.sleep(120)
            assert (len(dispatcher.driver.silent), len(dispatcher.book.in_state("held"))) == (0, 1)
            (claim,) = dispatcher.book.claims
            world.unreachable = {world.url(number) for number in world.listed}
            await asyncio.sleep(23.9 * 3600)
            assert claim in dispatcher.driver.silent
            await asyncio.sleep(600)
            assert claim not in dispatcher.book.claims
        ((reason, hours),) = rows(tmp_path, f"SELECT reason, held_seconds / 3600 FROM claims WHERE id = '{claim}'")
        assert (reason, hours) == ("silent", pytest.approx(42, abs=0.3))  # its job may have run until now

    play(monkeypatch, scene)


@pytest.mark.parametrize("step", [6 * 3600.0, -6 * 3600.0])
def test_a_clock_that_is_set_while_something_is_held_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: float
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [400.0] * 3
        async with dispatching(world, tmp_path, limits=Limits(hours=5.0, price=1.0)) as dispatcher:
            await until(lambda: len(world.held) == 3, 30)
            world.wall += step
            assert dispatcher.readiness()["queue"] is None
            await asyncio.sleep(60)
            assert dispatcher.readiness() == {"queue": None, "ledger": None, "autoscaler": None}
            assert (len(world.held), dispatcher.stalled) == (3, False)
            assert dispatcher.room.spent.hours == pytest.approx(3 * 65 / 3600, rel=0.2)
            await work_is_done(world, dispatcher, 3)
        for reason, seconds in rows(tmp_path, "SELECT reason, held_seconds FROM claims"):
            assert (reason, seconds) == ("consumer_exit", pytest.approx(400, abs=5))

    play(monkeypatch, scene)


@pytest.mark.parametrize("step", [6 * 3600.0, -6 * 3600.0])
def test_a_clock_that_is_set_while_nothing_is_held_moves_the_ledgers_times_and_no_limit_falls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: float
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [1800.0] * 2
        async with dispatching(world, tmp_path, limits=Limits(hours=2.0, price=1.0)) as dispatcher:
            await work_is_done(world, dispatcher, 2)
            await asyncio.sleep(30)
            world.wall += step
            world.jobs = [60.0]
            await asyncio.sleep(8)
            assert len(world.held) == 1
            await asyncio.sleep(100)
            assert world.done == 3
            assert dispatcher.room.spent.hours == pytest.approx(1 + 60 / 3600, rel=0.01)
            assert dispatcher.readiness() == {"queue": None, "ledger": None, "autoscaler": None}
        first, second = rows(tmp_path, "SELECT unixepoch(min(opened_at)), unixepoch(max(opened_at)) FROM claims")[0]
        assert abs(second - first) == pytest.approx(abs(step), rel=0.2)

    play(monkeypatch, scene)


def flapping(monkeypatch: pytest.MonkeyPatch, folder: Path, step: float, *, reboot: bool) -> int:
    """How many holds that bring nothing are opened, while the clock is set once, or at a reboot."""
    folder.mkdir()

    async def scene(world: World) -> None:
        async def one_job() -> Counts:
            return Counts(1, 0)

        world.queue_fault = one_job
        monkeypatch.setattr("nullworker.clock._BOOT_ID", folder / "boot")
        (folder / "boot").write_text("one")
        for boot in ("one", "two") if reboot else ("one",):
            (folder / "boot").write_text(boot)
            async with dispatching(world, folder, policy=Policy(1), limits=FREE):
                await asyncio.sleep(400)
                world.wall += step
                await asyncio.sleep(0 if reboot else 600)

    return play(monkeypatch, scene).claims


@pytest.mark.parametrize(("hours", "reboot"), [(6, False), (-6, False), (-6, True)])
def test_a_clock_that_is_set_neither_shortens_nor_prolongs_a_pause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hours: int, reboot: bool
) -> None:
    expected = flapping(monkeypatch, tmp_path / "steady", 0.0, reboot=reboot)
    assert flapping(monkeypatch, tmp_path / "set", hours * 3600.0, reboot=reboot) == expected


def test_a_ledger_on_a_full_disk_opens_nothing_keeps_what_is_held_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disk: FaultyDisk
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [100.0, 1000.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 2, 30)
            world.jobs += [1.0] * 4
            disk.full = 1.0
            renewals = world.renewals
            await asyncio.sleep(TEN_MINUTES)
            assert world.count("ledger_unwritable") == 1
            assert (world.done, len(world.held), len(dispatcher.book.claims)) == (1, 1, 1)
            assert world.renewals - renewals >= TEN_MINUTES / 10 - 2
            assert dispatcher.readiness()["ledger"] is not None
            disk.full = 0.0
            await work_is_done(world, dispatcher, 6)
            assert world.count("ledger_unwritable_over") == 1
            assert dispatcher.book.unwritten == []
        ends = rows(tmp_path, "SELECT reason, count(*) FROM claims GROUP BY reason")
        assert ends == [("consumer_exit", 6)]

    play(monkeypatch, scene)


def test_a_full_disk_is_noticed_and_what_was_not_written_is_written_while_nothing_is_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disk: FaultyDisk
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [100.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 1, 30)
            await asyncio.sleep(5)
            disk.full = 1.0
            await asyncio.sleep(6)
            assert dispatcher.readiness()["ledger"] is not None
            await asyncio.sleep(110)
            assert [event.kind for event in dispatcher.book.unwritten] == ["ended"]
            disk.full = 0.0
            await asyncio.sleep(6)
            assert dispatcher.readiness()["ledger"] is None
            assert rows(tmp_path, "SELECT reason FROM claims") == [("consumer_exit",)]

    play(monkeypatch, scene)


def test_a_dispatcher_that_dies_on_a_full_disk_asks_for_the_ends_that_it_could_not_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disk: FaultyDisk
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [50.0, 1000.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 2, 30)
            disk.full = 1.0
            await asyncio.sleep(100)
            assert len(dispatcher.book.unwritten) == 1
            disk.kill()
        disk.start()
        disk.full = 0.0
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await work_is_done(world, dispatcher, 2)
        ends = rows(tmp_path, "SELECT reason, count(*) FROM claims GROUP BY reason")
        assert ends == [("consumer_exit", 2)]
        assert world.most_held == 2

    play(monkeypatch, scene)


def test_a_claim_that_was_granted_when_the_dispatcher_died_is_asked_for_again_before_the_queue_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [100.0]
        world.loses_answers = True
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("granted"), 30)
            await asyncio.sleep(3)
        world.loses_answers = False
        world.queue_fault = refused
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await work_is_done(world, dispatcher, 1)
        assert rows(tmp_path, "SELECT reason FROM claims") == [("consumer_exit",)]

    play(monkeypatch, scene)


@pytest.mark.parametrize(("attach", "renewals"), [(0.0, (45, 70)), (120.0, (10, 14))])
def test_a_session_to_which_nobody_attaches_is_renewed_for_the_time_that_was_set_or_always(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attach: float, renewals: tuple[int, int]
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.attaches = [600.0], False
        terms = Terms(lifetime=30.0, attach=attach)
        async with dispatching(world, tmp_path, limits=FREE, terms=terms) as dispatcher:
            await work_is_done(world, dispatcher, 1)
        assert renewals[0] <= world.renewals <= renewals[1]

    play(monkeypatch, scene)


def test_a_silent_worker_that_never_said_which_instance_it_is_is_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.says_instance = [3600.0], False
        async with dispatching(world, tmp_path, policy=Policy(4, interval=60.0), limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 30)
            await asyncio.sleep(10)
            world.unreachable = {world.url(number) for number in world.listed}
            await asyncio.sleep(600)
            assert (len(dispatcher.driver.silent), len(dispatcher.book.in_state("held"))) == (1, 1)

    play(monkeypatch, scene)
