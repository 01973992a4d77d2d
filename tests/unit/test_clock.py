"""The worker's time is steady under steps of the wall clock, also after a restart within the same boot."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nullworker import clock
from nullworker.clock import Anchor, SystemClock, elapsed, from_iso, iso, tidy, wall_iso
from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits, Reservation
from nullworker.fsm.events import SessionTerms
from nullworker.http.reservations import reservation_json
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.testing.fakes import FakeClock


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
    anchor = steady.moved()
    assert anchor is not None
    assert steady.now() == 1_800_000_000.0, "not before the anchor is stored"
    steady.follow(anchor)
    assert anchor == steady.anchor
    assert steady.now() == wall["wall"]
    assert steady.moved() is None


def test_a_small_drift_is_left_alone(wall: dict[str, float]) -> None:
    steady = SystemClock()
    for small in (0.9, -0.9):
        wall["wall"] = 1_800_000_000.0 + small
        assert steady.moved() is None
        assert steady.now() == 1_800_000_000.0
    wall["wall"] = 1_800_000_001.1
    assert steady.moved() is not None


def test_a_restart_goes_on_with_the_anchor_of_the_same_boot(wall: dict[str, float]) -> None:
    before = SystemClock()
    wall["wall"] += 3600
    wall["monotonic"] += 10
    assert SystemClock(before.anchor).now() == 1_800_000_010.0
    assert SystemClock(Anchor("another boot", before.anchor.offset)).now() == wall["wall"]
    assert SystemClock(None).now() == wall["wall"]


def test_a_reboot_with_the_clock_behind_goes_on_from_the_newest_event(wall: dict[str, float]) -> None:
    """Also in the same boot, if the anchor that fits the event could not be stored."""
    newest = wall["wall"] + 7200
    for anchor in (None, Anchor("another boot", 0.0), SystemClock().anchor):
        steady = SystemClock(anchor, not_before=newest)
        assert steady.now() == newest
        assert steady.moved() is not None, "it follows the wall clock when nothing is held"
    assert SystemClock(not_before=newest - 7201).now() == wall["wall"]


def test_where_boots_have_no_id_no_anchor_is_trusted(
    wall: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clock, "_BOOT_ID", tmp_path / "missing")
    assert SystemClock(Anchor("", 0.0)).now() == wall["wall"]
    assert SystemClock().boot_id == ""


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


def test_a_lock_file_says_when_to_the_second(wall: dict[str, float]) -> None:
    wall["wall"] = 1_795_000_000.9
    assert wall_iso() == "2026-11-18T11:06:40Z"


def test_spans_are_told_to_the_millisecond_and_whole_ones_as_whole() -> None:
    assert [repr(tidy(span)) for span in (0.12345, 0.0004, 60.0, 1.5)] == ["0.123", "0", "60", "1.5"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that is not set to UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("elsewhere")
def test_a_time_without_a_zone_is_utc_and_nonsense_is_refused() -> None:
    assert from_iso("2026-11-18T11:06:40") == 1_795_000_000.0
    assert from_iso("2026-11-18T12:06:40+01:00") == 1_795_000_000.0
    with pytest.raises(ValueError, match="soon"):
        from_iso("soon")


#: Just under half a millisecond: SQLite rounds it up, Python down.
NEARLY_HALF = st.integers(0, 90_000).map(lambda milliseconds: (milliseconds + 0.49) / 1000)
#: Half a millisecond for a binary number too, as in 0.0625: Python rounds it to the even one, SQLite up.
HALVES = st.integers(0, 90 * 16).map(lambda sixteenths: sixteenths / 16)
SPANS = st.floats(0, 90) | NEARLY_HALF | HALVES
MOMENTS = SPANS.map(lambda seconds: 1_795_000_000 + seconds)


@settings(deadline=None)
@given(start=MOMENTS, span=SPANS)
def test_a_span_is_what_lies_between_the_times_that_are_shown(start: float, span: float) -> None:
    shown = from_iso(iso(start + span)) - from_iso(iso(start))
    assert elapsed(start, start + span) == pytest.approx(shown, abs=1e-6)


@settings(deadline=None)
@given(moment=MOMENTS, spans=st.tuples(SPANS, SPANS, SPANS, SPANS))
def test_what_is_live_and_what_the_log_says_of_it_are_the_same(
    moment: float, spans: tuple[float, float, float, float]
) -> None:
    held_for, extension, lifetime, pause = spans
    with tempfile.TemporaryDirectory() as folder:
        log, clock = open_log(Path(folder) / "nullworker.db", sync="normal"), FakeClock(moment)
        service = Service(log, clock, Limits(), Readiness())

        def told_alike(live: Reservation) -> None:
            told: dict[str, Any] = dict(reservation_json(live, clock.now()))
            logged: dict[str, Any] = dict(queries.reservation(log.conn, live.id) or {})
            if live.ended_at is None:  # the log has no clock to count on with
                del told[f"{live.state}_seconds"], logged[f"{live.state}_seconds"]
            assert told == logged

        one, two = service.claim(Claim(duration=100 + held_for)), service.claim(Claim(duration=held_for))
        told_alike(one)
        told_alike(two)
        clock.advance(pause / 4)
        service.extend(one.id, extension)
        told_alike(one)
        service.release(one.id)
        told_alike(one)
        told_alike(two)
        service.cancel(two.id, "client_disconnect")
        session = service.claim(Claim("session", 100 + lifetime, session=SessionTerms(100 + lifetime)))
        clock.advance(pause)
        service.renew(session.id)
        told_alike(session)
        service.cancel(session.id, "client_disconnect")
        told_alike(session)
        log.close()
