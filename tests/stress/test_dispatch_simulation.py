"""The dispatcher's decisions over days of a simulated queue, with dying consumers and crashes of the dispatcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from stress.dispatch_simulation import Pattern, World


@pytest.mark.parametrize("block", range(2))
def test_at_most_1_02_holds_are_opened_for_a_job_where_in_flight_is_known(block: int) -> None:
    worlds = [World(Pattern.of(seed), seed).run() for seed in range(block * 50, block * 50 + 50)]
    assert all(world.most <= world.pattern.most for world in worlds)
    assert sum(world.opened for world in worlds) <= 1.02 * sum(len(world.done) for world in worlds)


def test_dropped_jobs_are_reclaimed_and_still_few_holds_are_opened() -> None:
    worlds = [World(Pattern.of(seed, dies=0.1), seed).run() for seed in range(30)]
    assert sum(world.lost for world in worlds) > 50
    assert all(world.most <= world.pattern.most for world in worlds)
    assert sum(world.opened for world in worlds) <= 1.05 * sum(len(world.done) + world.lost for world in worlds)


def test_all_jobs_are_done_where_in_flight_is_unknown() -> None:
    worlds = [World(Pattern.of(seed, known=False), seed).run() for seed in range(30)]
    assert all(world.most <= world.pattern.most for world in worlds)
    assert sum(world.opened for world in worlds) <= 1.2 * sum(len(world.done) for world in worlds)


def test_crashes_between_any_two_steps_lose_no_hold_and_open_few_too_many(tmp_path: Path) -> None:
    kills = opened = runs = 0
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        pattern = Pattern.of(seed, dies=0.05)
        world = World(pattern, seed, tmp_path / str(seed), crashes=0.03).run()
        assert world.most <= pattern.most
        if world.core is None:
            world.start()
        assert world.core is not None
        assert not world.core.book.in_state("held"), "a hold that has ended is still thought to be held"
        world.ledger.close()
        kills, opened, runs = kills + world.kills, opened + world.opened, runs + len(world.done) + world.lost
    assert kills > 40
    assert opened <= 1.10 * runs
