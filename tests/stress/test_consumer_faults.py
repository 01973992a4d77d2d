"""The fault matrix of the examples in its short form: cuts of a second. `make stress` has cuts of 3 s and 60 s too."""

from __future__ import annotations

from pathlib import Path

import fault_matrix
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in fault_matrix.FAULTS.items() for fault in faults]
)
async def test_every_job_is_done_and_none_twice_at_a_time(name: str, fault: str, tmp_path: Path) -> None:
    await fault_matrix.run(name, fault, tmp_path, seconds=1.0)
