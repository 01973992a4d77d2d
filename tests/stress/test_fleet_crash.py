"""A short run of the fleet harness: what workers wrote outlives them, whatever happens to the collector."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


async def test_every_event_of_a_worker_that_stopped_outlives_its_machine() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "stress.fleet", "--workers", "3", "--reservations", "250", "--seed", "31"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    assert re.search(r"^wrong +0$", said, re.MULTILINE), said
    assert re.search(r"^events +2250 ", said, re.MULTILINE), said
    kills = re.search(r"^kills +(\d+) ", said, re.MULTILINE)
    assert kills, said
    assert int(kills[1]) >= 1
