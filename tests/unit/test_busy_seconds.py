"""busy_seconds_total, the seconds that a GPU's bill is made of."""

from __future__ import annotations

import pytest

from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms
from nullworker.metrics.exporter import Exporter, Readings
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.testing.fakes import FakeClock, MemoryJournal


class Process:
    """A worker process, as far as metrics go."""

    def __init__(self, journal: MemoryJournal, clock: FakeClock) -> None:
        self.service = Service(journal, clock, Limits(), Readiness())
        self.exporter = Exporter(self.service, Readings(lambda: 0, lambda: 0, lambda: 0))
        self.service.observers.append(self.exporter.observe)
        self.service.resume()

    @property
    def busy(self) -> float | None:
        return self.exporter.registry.get_sample_value("nullworker_busy_seconds_total")


@pytest.mark.parametrize("step", [-3600.0, 0.0, 3600.0])
def test_a_hold_is_counted_while_it_lasts_and_after_whatever_the_wall_clock_did(step: float) -> None:
    clock = FakeClock()
    process = Process(MemoryJournal(), clock)
    clock.step_wall(step)  # followed by the next claim, since nothing is held
    held = process.service.claim(Claim())
    clock.advance(500)
    assert process.busy == 500
    process.service.release(held.id)
    clock.advance(10)
    assert process.busy == 500


def test_of_a_session_that_was_taken_over_only_what_is_ones_own_is_counted() -> None:
    clock, journal = FakeClock(), MemoryJournal()
    session = Process(journal, clock).service.claim(Claim("session", 3000, session=SessionTerms(3000)))
    clock.advance(100)
    process = Process(journal, clock)
    clock.advance(20)
    assert process.busy == 20
    process.service.release(session.id, reason="session_end")
    process.service.claim(Claim())
    clock.advance(5)
    assert process.busy == 25
