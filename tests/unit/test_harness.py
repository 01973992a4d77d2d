"""The test harness: its error when an expected log line can no longer come."""

from __future__ import annotations

import sys
from pathlib import Path

import harness
import pytest
from programs import Program

pytestmark = pytest.mark.process

SCRIPT = """
import sys
print('{"event": "begun"}', file=sys.stderr)
sys.exit("there is no more to say")
"""


@pytest.mark.timeout(30)
async def test_waiting_for_a_line_ends_when_the_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PATIENCE", 3600.0)
    async with Program(tmp_path, sys.executable, "-c", SCRIPT) as program:
        with pytest.raises(AssertionError) as failed:
            await program.line("never")
        assert (await program.line("begun"))["event"] == "begun"
    assert str(failed.value) == (
        "no line 'never' number 1; the process has ended with code 1, and its last lines are:\n"
        '{"event": "begun"}\nthere is no more to say'
    )
