"""The spending limits: what counts, how many claims fit, when one fits again, and a whole dispatcher that has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dispatch_world import World, dispatching, play, rows
from hypothesis import given
from hypothesis import strategies as st

from nullworker.dispatch.decision import Policy
from nullworker.dispatch.driver import Terms
from nullworker.dispatch.ledger import HeldTime
from nullworker.dispatch.limits import DAY_SECONDS, Limits, Spent, room, spent

T = 1_800_000_000.0
HOUR = 3600.0


def test_only_the_last_24_hours_count_and_open_holds_until_now() -> None:
    holds = [
        HeldTime(T - 30 * HOUR, 7 * HOUR, 1.0),  # the last hour of it
        HeldTime(T - 2 * HOUR, HOUR, 0.5),
        HeldTime(T - HOUR / 2, None, None),
        HeldTime(T - 30 * HOUR, HOUR, 1.0),
    ]
    assert spent(T, holds, 2.0) == pytest.approx(Spent(2.5, 1.0 + 0.5 + 1.0))


def test_without_a_limit_there_is_room() -> None:
    assert room(T, [HeldTime(T - HOUR, None, 1.0)], 3, Limits(), lifetime=300, price=1.0).opens is None


@pytest.mark.parametrize(
    ("held_hours", "pending", "opens", "over"),
    [
        (0.0, 0, 12, False),
        (0.5, 0, 6, False),
        (0.5, 4, 2, False),
        (0.5, 9, 0, False),
        (0.95, 0, 0, False),
        (1, 0, 0, True),
    ],
)
def test_each_claim_that_may_become_a_hold_takes_a_lifetime(
    held_hours: float, pending: int, opens: int, over: bool
) -> None:
    left = room(T, [HeldTime(T - held_hours * HOUR, None, None)], pending, Limits(hours=1), lifetime=300, price=0.0)
    assert (left.opens, left.over, left.reached) == (opens, over, None if opens else "hours")


def test_dollars_are_counted_by_each_instances_price_and_the_next_ones() -> None:
    holds = [HeldTime(T - HOUR, HOUR, 0.4), HeldTime(T - HOUR, HOUR, 0.6)]
    left = room(T, holds, 0, Limits(dollars=2.0), lifetime=HOUR, price=0.5)
    assert left.opens == 2
    assert left.spent.dollars == pytest.approx(1.0)
    left = room(T, holds, 0, Limits(hours=2.0, dollars=9.0), lifetime=HOUR, price=0.5)
    assert (left.opens, left.reached, left.over) == (0, "hours", True)


def test_it_says_when_it_will_open_again() -> None:
    left = room(T, [HeldTime(T - 2 * HOUR, HOUR, None)], 0, Limits(hours=1.0), lifetime=360, price=0.0)
    assert left.opens == 0
    assert left.again_at == pytest.approx(T + 22 * HOUR + 360, abs=2)
    left = room(T, [], 0, Limits(hours=0.01), lifetime=360, price=0.0)
    assert (left.opens, left.again_at, left.never) == (0, None, True)  # one lifetime is more than the limit
    left = room(T, [], 10, Limits(hours=1.0), lifetime=360, price=0.0)
    assert (left.opens, left.reached, left.again_at, left.never) == (0, "hours", None, False)


@given(
    st.lists(
        st.builds(
            lambda ago, share, price: HeldTime(T - ago, None if share is None else ago * share, price),
            st.floats(0, 2 * DAY_SECONDS),
            st.none() | st.floats(0, 1),
            st.none() | st.floats(0, 5),
        ),
        max_size=20,
    ),
    st.integers(0, 10),
    st.floats(0.01, 100),
    st.floats(1, 3600),
)
def test_what_may_be_opened_never_exceeds_the_limit(
    holds: list[HeldTime], pending: int, hours: float, lifetime: float
) -> None:
    left = room(T, holds, pending, Limits(hours=hours, dollars=hours), lifetime=lifetime, price=1.0)
    assert left.opens is not None
    assert left.spent.hours <= 24.0 * len(holds) + 1e-9
    if left.opens:
        assert left.spent.hours + (pending + left.opens) * lifetime / 3600 <= hours * (1 + 1e-9) + 1e-6
        assert left.spent.dollars + (pending + left.opens) * lifetime / 3600 <= hours * (1 + 1e-9) + 1e-6
    elif left.again_at is not None:
        assert T <= left.again_at <= T + DAY_SECONDS


def test_a_limit_of_dollars_says_when_it_will_open_again_and_machines_that_cost_nothing_have_no_limit() -> None:
    limits = Limits(hours=9.0, dollars=1.0)
    holds = [HeldTime(T - 7200, 3600.0, 1.0)]
    left = room(T, holds, 0, limits, lifetime=360.0, price=1.0)
    assert (left.opens, left.reached, left.over) == (0, "dollars", True)
    # a tenth of an hour of the hold must be older than a day
    assert left.again_at == pytest.approx(T - 7200 + 360 + DAY_SECONDS, abs=2)
    assert (room(T, [], 3, Limits(dollars=1.0), lifetime=360.0, price=0.0).opens or 0) > 1000


def test_the_limit_that_is_exceeded_is_told_where_the_other_one_has_no_room_either() -> None:
    hold = HeldTime(T - 0.95 * HOUR, None, 10.0)
    left = room(T, [hold], 0, Limits(hours=1, dollars=5), lifetime=300, price=10.0)
    assert (left.reached, left.over) == ("dollars", True)
    left = room(T, [hold], 0, Limits(hours=0.9, dollars=10), lifetime=300, price=10.0)
    assert (left.reached, left.over) == ("hours", True)


def test_what_fits_to_the_second_fits() -> None:
    hold = HeldTime(T - HOUR, 360.0, 1.0)
    for limits in (Limits(hours=0.3), Limits(dollars=0.3)):  # (0.3 - 0.1) / 0.1 is less than 2 for a computer
        assert room(T, [hold], 0, limits, lifetime=360, price=1.0).opens == 2
    for limits in (Limits(hours=1), Limits(dollars=1)):
        left = room(T, [hold], 0, limits, lifetime=HOUR, price=1.0)
        assert (left.opens, left.over, left.never) == (0, False, False)
        assert left.again_at == pytest.approx(T - HOUR + 360 + DAY_SECONDS, abs=1.0)


def test_a_limit_that_is_reached_in_the_middle_opens_nothing_until_the_day_has_moved_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"limits": Limits(hours=2.1, price=1.0), "policy": Policy(4, interval=300.0)}

    async def scene(world: World) -> None:
        world.jobs = [1800.0] * 10
        async with dispatching(world, tmp_path, terms=Terms(lifetime=600.0), **options) as dispatcher:
            await asyncio.sleep(4 * 3600)
            assert (world.done, len(world.held), len(world.jobs)) == (4, 0, 6)
            assert world.count("limit_reached") == 1
            said = next(fields for word, fields in world.lines if word == "limit_reached")
            assert said["opens_again_at"].startswith("2027-01-16")
            assert said["message"] == "no worker is reserved"
            assert (said["hours"], said["dollars"]) == (pytest.approx(2.0, abs=0.1), pytest.approx(2.0, abs=0.1))
            shown = dispatcher.status()["limit"]
            assert (shown["reached"], shown["opens_again_at"][:10]) == ("hours", "2027-01-16")
            waiting, world.jobs = world.jobs, []
            await asyncio.sleep(3600)
            world.jobs = waiting
            await asyncio.sleep(3600)
            assert (world.count("limit_reached"), world.count("limit_reached_over")) == (1, 0)
            await asyncio.sleep(20 * 3600)  # the first four are a day old
            assert world.count("limit_reached_over") >= 1
            assert (world.done, len(world.jobs), dispatcher.room.reached) == (8, 2, "hours")

    play(monkeypatch, scene)


@pytest.mark.parametrize(
    ("hours", "again"),
    [(0.02, "when a claim that waits for a worker is over"), (0.001, "never: one --lifetime is more than the limit")],
)
def test_a_limit_that_is_reached_without_a_hold_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hours: float, again: str
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.ready_at = [1.0] * 4, 1e9
        async with dispatching(world, tmp_path, limits=Limits(hours=hours, price=1.0)) as dispatcher:
            await asyncio.sleep(20)
            assert len(dispatcher.book.claims) == int(hours * 3600 / 30)
        assert [fields["opens_again_at"] for word, fields in world.lines if word == "limit_reached"] == [again]

    play(monkeypatch, scene)


def test_a_limit_of_dollars_with_at_limit_end_ends_what_is_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [7200.0] * 4
        limits = Limits(dollars=3.0, price=1.0)
        async with dispatching(world, tmp_path, limits=limits, at_limit="end") as dispatcher:
            await asyncio.sleep(3600)
            assert (len(world.held), dispatcher.book.claims) == (0, {})
            assert dispatcher.room.spent.dollars == pytest.approx(3.0, abs=0.02)
        said = next(fields for word, fields in world.lines if word == "limit_reached")
        assert said["message"] == "no worker is reserved; held sessions are ended"
        assert rows(tmp_path, "SELECT DISTINCT reason FROM claims") == [("limit",)]

    play(monkeypatch, scene)


def test_a_session_whose_answers_are_lost_counts_in_the_limits_for_a_lifetime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [1.0] * 20
        world.loses_answers = True
        limits, terms = Limits(hours=0.1, price=1.0), Terms(lifetime=60.0)
        async with dispatching(world, tmp_path, limits=limits, terms=terms) as dispatcher:
            await asyncio.sleep(3600)
            assert (world.claims, dispatcher.room.reached) == (6, "hours")
        assert rows(tmp_path, "SELECT reason, held_at, held_seconds FROM claims") == [("lost", None, 60.0)] * 6
        async with dispatching(world, tmp_path, limits=limits, terms=terms) as dispatcher:
            await asyncio.sleep(60)
            assert world.claims == 6

    play(monkeypatch, scene)
