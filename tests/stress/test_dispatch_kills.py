"""The short form of `python -m stress.dispatch_kills`: a real Redis, `nullworker dev`, and kill -9 of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stress.dispatch_kills import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_every_job_is_done_once_whoever_is_killed(tmp_path: Path) -> None:
    account = await Run(tmp_path, jobs=6, kills=2, workers=3, seed=4, others_each=6.0).run()
    assert account.faults == []
    assert account.most_held <= 3
    assert account.killed["dispatcher"] == 2
    assert account.runs >= 6  # and maybe fewer holds: work that was killed after a job comes back for another
