"""docs/fleet.md, held against the collector: its questions are answered, and its lists are complete."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from click.testing import CliRunner
from collectors import CollectorProcess, event, hold
from harness import ROOT
from pages import DOCS, blocks, rows

from nullworker.cli.collect import collect
from nullworker.cli.commands import cli
from nullworker.clock import wall
from nullworker.collector.queries import WORKER_STATES
from nullworker.collector.schema import VIEWS
from nullworker.collector.store import open_store
from nullworker.dispatch import schema as dispatch

PAGE = DOCS / "fleet.md"
DATABASE: dict[str, Any] = yaml.safe_load((ROOT / "monitoring" / "datasette-fleet.yaml").read_text())["databases"][
    "fleet"
]
QUERIES = [text.strip().rstrip(";") for language, text in blocks(PAGE) if language == "sql"]


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
        lost = event("nullworker/9/c", 3, "cancelled", "r3", now, "consumer_lost")
        await collector.send([*hold("nullworker/9/c", 1, "r3", now - 60, ends_at=now), lost], key="c")
        for query in QUERIES:
            found = collector.sql(query.replace(":at", "'now', '-1 second'"))
            assert found, query


async def test_fleet_and_the_dispatchers_ledger_are_joined(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "nullworker-dispatch.db")) as ledger:
        ledger.executescript(dispatch.SCRIPT)
        now = wall()
        for seq, (kind, data) in enumerate(
            [
                ("pending", {"metadata": {"job": "a-7"}}),
                ("granted", {"url": "http://w"}),
                ("held", {"session_id": "r1"}),
            ],
            1,
        ):
            row = (seq, now - 100 + 10 * seq, "c1", kind, None, json.dumps(data))
            ledger.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", row)
        ledger.commit()
    async with CollectorProcess(tmp_path, "--price", "36") as collector:
        await collector.send(hold("nullworker/7/a", 1, "r1", now - 70, ends_at=now + 60), key="a")
        [(_, text)] = [block for block in blocks(PAGE) if block[0] == "sql ledger"]
        attach, query = text.strip().rstrip(";").split(";")
        with contextlib.closing(sqlite3.connect(collector.db)) as conn:
            conn.execute(attach.replace("'nullworker-dispatch.db'", f"'{tmp_path / 'nullworker-dispatch.db'}'"))
            [row] = conn.execute(query).fetchall()
    job, opened, waited, held, worker, _, state, reason, seconds, dollars, ended = row
    assert (job, waited, worker, state, reason, ended) == ("a-7", 20, "7/a", "held", None, None)
    assert opened < held
    assert dollars == pytest.approx(seconds / 100, abs=0.01)
    assert seconds == pytest.approx(70, abs=10)


async def test_every_metric_is_there_with_its_type(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        async with aiohttp.ClientSession() as http, http.get(f"{collector.url}/metrics") as answer:
            text = await answer.text()
        await collector.send([event("nullworker/7/a", 1, "queued", "r1", wall())])
        for page in sorted((ROOT / "monitoring" / "runbooks").glob("*.md")):
            if "On the collector's machine" in page.read_text():
                for sql in re.findall(r"```sql\n(.*?);\n```", page.read_text(), re.DOTALL):
                    collector.sql(sql)
    exported = re.findall(r"^# TYPE (nullworker_\S+) (\S+)$", text, re.MULTILINE)
    shown = [(cells[0].strip("`"), cells[1]) for cells in rows(PAGE, "| metric |")]
    assert sorted(shown) == sorted(exported)
    used = set(re.findall(r"nullworker_collect_\w+", (ROOT / "monitoring" / "alerts_collect.yaml").read_text()))
    assert used <= {name for name, _ in exported}


# -- Datasette ---------------------------------------------------------------------------------------------------------


def test_page_and_datasette_ask_the_same_questions() -> None:
    found = re.findall(r"^### (.+?)$(.*?)(?=^##+ |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    asked = {title: sql for title, text in found for sql in re.findall(r"```sql\n(.*?);\n```", text, re.DOTALL)}
    assert asked == {query["title"]: query["sql"].strip() for query in DATABASE["queries"].values()}


def test_every_table_and_column_is_described(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path / "fleet.db")) as store:
        sql = "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
        names = [name for (name,) in store.conn.execute(sql)]
        assert sorted(DATABASE["tables"]) == sorted(names)
        for name, told in DATABASE["tables"].items():
            columns = [column[1] for column in store.conn.execute(f"PRAGMA table_info({name})")]
            assert told["description"]
            assert told.get("hidden") or list(told["columns"]) == columns, name
