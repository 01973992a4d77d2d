"""A short run of the simulation: one history of each kind of world. `make simulate` runs longer ones."""

from __future__ import annotations

from random import Random

import pytest

from stress import simulation
from stress.simulated_troubles import World

SEEDS = (1, 2, 7, 1001)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_accounts_are_right_after_a_history_of_crashes_and_faults(seed: int) -> None:
    figures = simulation.simulate(seed, steps=400)
    assert figures["kills"] + figures["power_cuts"] > 0
    assert figures["served"] > 5
    assert figures["rejected"] > 20


def test_the_seeds_above_have_every_kind_of_world() -> None:
    worlds = [World.of(Random(seed)) for seed in SEEDS]
    for fault in ("power_cuts", "disk_trouble", "network_trouble", "harm"):
        assert {getattr(world, fault) for world in worlds} == {True, False}


def test_a_seed_replays_exactly() -> None:
    assert simulation.simulate(42, steps=300) == simulation.simulate(42, steps=300)
