"""docs/fleet.md, held against the collector: its questions are answered, and its lists are complete."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner
from collectors import CollectorProcess, event, hold
from pages import DOCS, blocks, rows

from nullworker.cli.collect import collect
from nullworker.cli.commands import cli
from nullworker.clock import wall
from nullworker.collector.queries import WORKER_STATES
from nullworker.collector.schema import VIEWS

PAGE = DOCS / "fleet.md"


def test_every_option_and_view_and_state_stands_there() -> None:
    told = {name for cells in rows(PAGE, "| option | default |") for name in re.findall(r"--[\w-]+", cells[0])}
    options = {name for parameter in collect.params for name in parameter.opts}
    assert told | {"--log-format", "--help"} >= options
    assert told <= options
    assert CliRunner().invoke(cli, ["collect", "--help"]).exit_code == 0
    views = {name for cells in rows(PAGE, "| view | a row") for name in re.findall(r"`(\w+)`", cells[0])}
    assert views == VIEWS.keys() - {"live", "spans", "spans_by_day"}
    assert all(f"`{state}`" in PAGE.read_text() for state in WORKER_STATES)


async def test_questions_are_answered(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path, "--price", "0.4") as collector:
        now = wall()
        await collector.send(
            hold("nullworker/7/a", 1, "r1", now - 60, ends_at=now + 60, metadata={"job": "a-7"}), key="a"
        )
        ended = event("nullworker/8/b", 3, "released", "r2", now - 60, "explicit")
        await collector.send([*hold("nullworker/8/b", 1, "r2", now - 3660, ends_at=now), ended], key="b")
        for language, text in blocks(PAGE):
            if language == "sql":
                query = text.strip().rstrip(";").replace(":at", "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 second')")
                assert collector.sql(query), text
