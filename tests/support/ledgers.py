"""A dispatcher's ledger and a clock that stands still, for tests of what is built on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nullworker.dispatch.ledger import Ledger, open_ledger

T = 1_800_000_000.0  # 2027-01-15T08:00:00Z


class StillClock:
    """Shows `time` until a test moves it."""

    def __init__(self) -> None:
        self.time = T

    def now(self) -> float:
        return self.time


@pytest.fixture(name="clock")
def still_clock() -> StillClock:
    """For tests that import it under its own name."""
    return StillClock()


@pytest.fixture(name="ledger")
def opened_ledger(tmp_path: Path) -> Iterator[Ledger]:
    """For tests that import it under its own name."""
    opened = open_ledger(tmp_path / "ledger.db")
    yield opened
    opened.close()
