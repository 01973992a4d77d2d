"""The worker's time: steady under steps of the wall clock, also over a restart in the same boot."""

from __future__ import annotations

import time

import pytest

from nullworker import clock
from nullworker.clock import Anchor, SystemClock, from_iso, iso


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Both clocks of this machine, to be set."""
    times = {"wall": 1_800_000_000.0, "monotonic": 500.0}
    monkeypatch.setattr(time, "time", lambda: times["wall"])
    monkeypatch.setattr(time, "monotonic", lambda: times["monotonic"])
    return times


def test_time_passes_with_the_monotonic_clock_and_not_with_the_wall_clock(wall: dict[str, float]) -> None:
    steady = SystemClock()
    assert steady.now() == 1_800_000_000.0
    wall["wall"] += 3600
    assert steady.now() == 1_800_000_000.0
    wall["monotonic"] += 5
    assert steady.now() == 1_800_000_005.0


def test_an_idle_worker_follows_the_wall_clock(wall: dict[str, float]) -> None:
    steady = SystemClock()
    wall["wall"] -= 3600
    anchor = steady.settle()
    assert anchor == steady.anchor
    assert steady.now() == wall["wall"]
    assert steady.settle() is None


def test_a_small_drift_is_left_alone(wall: dict[str, float]) -> None:
    steady = SystemClock()
    wall["wall"] += 0.9
    assert steady.settle() is None
    assert steady.now() == 1_800_000_000.0


def test_a_restart_goes_on_with_the_anchor_of_the_same_boot(wall: dict[str, float]) -> None:
    before = SystemClock()
    wall["wall"] += 3600
    wall["monotonic"] += 10
    assert SystemClock(before.anchor).now() == 1_800_000_010.0
    assert SystemClock(Anchor("another boot", before.anchor.offset)).now() == wall["wall"]
    assert SystemClock(None).now() == wall["wall"]


def test_where_boots_have_no_id_no_anchor_is_trusted(
    wall: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(clock, "_read_boot_id", lambda: "")
    assert SystemClock(Anchor("", 0.0)).now() == wall["wall"]


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_795_000_000.1234, "2026-11-18T11:06:40.123Z"),
        (1_795_000_000.9996, "2026-11-18T11:06:41.000Z"),
    ],
)
def test_times_are_shown_in_utc_with_milliseconds(at: float, text: str) -> None:
    assert iso(at) == text
    assert from_iso(text) == pytest.approx(at, abs=0.001)


def test_a_time_without_a_zone_is_utc_and_nonsense_is_refused() -> None:
    assert from_iso("2026-11-18T11:06:40") == 1_795_000_000.0
    assert from_iso("2026-11-18T12:06:40+01:00") == 1_795_000_000.0
    with pytest.raises(ValueError, match="soon"):
        from_iso("soon")
