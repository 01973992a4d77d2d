"""docs/dispatch.md against the dispatcher: lists are complete, questions are answered, files parse."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

import click
import pytest
import yaml
from dispatching import Dispatch
from harness import ROOT
from pages import DOCS, blocks, rows

from nullworker.cli.dispatch import dispatch
from nullworker.dispatch import schema
from nullworker.dispatch.claims import OWN_REASONS
from nullworker.dispatch.ledger import open_ledger
from nullworker.testing import FakeAutoscaler

PAGE = DOCS / "dispatch.md"


def test_every_option_is_there_with_its_variable_and_its_default() -> None:
    shown = {cells[0].strip("`"): cells[1:3] for cells in rows(PAGE, "| option |")}
    options = {option.opts[0]: option for option in dispatch.params if isinstance(option, click.Option)}
    assert sorted(shown) == sorted(options)
    for name, (variable, default) in shown.items():
        option = options[name]
        assert variable == (option.envvar or ""), name
        if default not in ("", "required", "each instance's"):
            assert str(option.default).removesuffix(".0") == default, name


def test_every_reason_of_its_own_and_every_view_is_there() -> None:
    shown = [cells[0].strip("`") for cells in rows(PAGE, "| reason |")]
    assert shown == [*OWN_REASONS, "unknown"]
    assert [cells[0].strip("`") for cells in rows(PAGE, "| view |")] == ["claims", "open_claims", "daily", "timeline"]


def test_the_view_of_claims_has_the_columns_that_are_named(tmp_path: Path) -> None:
    open_ledger(tmp_path / "ledger.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as conn:
        columns = {name for _, name, *_ in conn.execute("PRAGMA table_info(claims)")}
    (named,) = (cells[1] for cells in rows(PAGE, "| view |") if cells[0] == "`claims`")
    words = set(re.findall(r"\w+_\w+|\w+", named))
    assert {"state", "reason", "wait_seconds", "held_seconds", "dollars", "price", "url", "instance"} <= words & columns
    assert {word for word in words if "_" in word} <= columns


def test_its_questions_are_answered_by_an_empty_ledger(tmp_path: Path) -> None:
    open_ledger(tmp_path / "ledger.db").close()
    questions = [text for language, text in blocks(PAGE) if language == "sql"]
    assert len(questions) >= 3
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as conn:
        for question in questions:
            assert conn.execute(question).fetchall() == []


async def test_every_metric_is_there_with_its_type(tmp_path: Path) -> None:
    async with FakeAutoscaler() as vast, Dispatch(tmp_path, vast.url, "--command", "echo 0", "--max", "1") as started:
        text = (await started.ask("/metrics"))[1]
    exported = re.findall(r"^# TYPE (nullworker_\S+) (\S+)$", text, re.MULTILINE)
    shown = [(cells[0].strip("`"), cells[1]) for cells in rows(PAGE, "| metric |")]
    assert sorted(shown) == sorted(exported)
    used = set(re.findall(r"nullworker_dispatch_\w+", (ROOT / "monitoring" / "alerts_dispatch.yaml").read_text()))
    assert used <= {name for name, _ in exported}


def test_the_scaled_job_is_one() -> None:
    (job,) = yaml.safe_load_all((ROOT / "examples" / "keda" / "scaledjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("keda.sh/v1alpha1", "ScaledJob")
    container = job["spec"]["jobTargetRef"]["template"]["spec"]["containers"][0]
    assert "nullworker reserve" in container["args"][0]
    assert job["spec"]["scalingStrategy"]["strategy"] == "accurate"


@pytest.mark.parametrize("view", schema.VIEWS)
def test_datasette_knows_each_column(tmp_path: Path, view: str) -> None:
    open_ledger(tmp_path / "ledger.db").close()
    told = yaml.safe_load((ROOT / "monitoring" / "datasette_dispatch.yaml").read_text())
    described = told["databases"]["nullworker-dispatch"]["tables"][view]
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as conn:
        columns = [name for _, name, *_ in conn.execute(f"PRAGMA table_info({view})")]
    assert list(described["columns"]) == columns
