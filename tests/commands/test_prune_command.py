"""`nullworker prune`, and a worker that prunes its own log (NULL_LOG_KEEP)."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from claims import reserve
from harness import WorkerProcess, post, secured
from programs import nullworker
from pruning import DAY, add, names, told_all
from troubles import size_of

from nullworker.clock import SystemClock
from nullworker.eventlog.opening import open_for_reading, open_log
from nullworker.testing import FakeAutoscaler

# -- the command -------------------------------------------------------------------------------------------------------


def long_history(path: Path, reservations: int = 300) -> None:
    """Old and told, and one of today."""
    with contextlib.closing(open_log(path, sync="normal")) as log:
        now = SystemClock().now()
        for number in range(reservations):
            add(log, f"old{number}", now - 40 * DAY + number)
        add(log, "new", now - DAY)
        told_all(log)


async def ask(*arguments: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(await nullworker("prune", "--json", *arguments))
    return told


async def test_the_command_removes_what_is_old_and_gives_the_space_back(path: Path) -> None:
    long_history(path)
    size = size_of(path)
    dry = await ask("--keep", "30d", "--log", str(path), "--dry-run")
    assert (dry["reservations"], dry["dry_run"], size_of(path)) == (300, True, size)
    told = await ask("--keep", "30d", "--log", str(path))
    assert (told["reservations"], told["dry_run"], told["log"]) == (300, False, str(path))
    assert told["bytes"] == size_of(path) < size / 4
    with contextlib.closing(open_for_reading(path)) as log:
        assert names(log) == {"new": 4}
    assert (await ask("--keep", "30d", "--log", str(path)))["reservations"] == 0
    assert "0 reservations that ended before" in await nullworker("prune", "--keep", "5m", NULL_EVENT_LOG=str(path))


async def test_the_command_keeps_what_the_sink_has_not_got_and_says_so(path: Path) -> None:
    long_history(path, 3)
    with contextlib.closing(open_log(path)) as log:
        log.set_sink("https://fleet.example.com/events")
    said = await nullworker("prune", "--keep", "30d", NULL_EVENT_LOG=str(path))
    assert "0 reservations that ended before" in said
    assert "3 more are kept: not acknowledged, not sent to the sink" in said
    with contextlib.closing(open_log(path)) as log:
        log.set_sink(None)
    assert (await ask("--keep", "30d", "--log", str(path)))["reservations"] == 3


async def test_the_command_leaves_the_log_of_a_running_worker_alone(tmp_path: Path) -> None:
    long_history(tmp_path / "nullworker.db", 3)
    async with WorkerProcess(tmp_path) as worker:
        said = await nullworker("prune", "--keep", "30d", "--log", str(worker.db), code=1)
        assert f"pid {worker.process.pid}" in said
        assert "NULL_LOG_KEEP" in said
        assert "--dry-run" in said
        told = await ask("--keep", "30d", "--log", str(worker.db), "--dry-run")
        assert (told["reservations"], told["kept"]) == (3, 0)
        assert worker.sql("SELECT count(*) FROM reservations") == [(4,)]


async def test_the_command_makes_nothing_and_sets_nothing_aside(tmp_path: Path) -> None:
    missing = tmp_path / "missing.db"
    assert "there is no event log" in await nullworker("prune", "--keep", "30d", "--log", str(missing), code=1)
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"noise" * 1000)
    said = await nullworker("prune", "--keep", "30d", "--log", str(damaged), code=1)
    assert said == f"nullworker: there is no event log to read at {damaged}: file is not a database\n"
    assert os.listdir(tmp_path) == ["damaged.db"]


@pytest.mark.parametrize("keep", ["", "d", "-1d", "1e9d", "1w", "9" * 400 + "d", "½d"])
async def test_invalid_ages_are_refused(path: Path, keep: str) -> None:
    long_history(path, 1)
    assert "must be seconds, as 90" in await nullworker("prune", "--keep", keep, "--log", str(path), code=2)


# -- the worker --------------------------------------------------------------------------------------------------------

AT_ONCE = (
    "from nullworker.cli import commands; from nullworker.eventlog import retention; "
    "retention.FIRST_SECONDS = retention.PAUSE_SECONDS = 0; commands.main()"
)


@pytest.mark.parametrize("standalone", [True, False])
async def test_a_worker_prunes_its_own_log(tmp_path: Path, vast: FakeAutoscaler, *, standalone: bool) -> None:
    long_history(tmp_path / "nullworker.db")
    size = size_of(tmp_path / "nullworker.db")
    module = ("-c", AT_ONCE, "serve")
    make = WorkerProcess(tmp_path, module=module, NULL_LOG_KEEP="30d")
    if not standalone:
        make = secured(tmp_path, vast, module=module, NULL_LOG_KEEP="30d")
    async with make as worker:
        assert (await worker.line("log_pruned"))["reservations"] == 300
        assert worker.sql("SELECT id FROM reservations") == [("new",)]
        if not standalone:
            await worker.line("key_loaded")
            claim = await (await reserve(worker, vast)).held()
            await worker.release()
            assert (await claim.answer()).status == 200
            assert await claim.outcome() == "Success"
        else:
            assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
        assert await worker.terminate() == 0
    assert size_of(worker.db) < size / 4


async def test_a_worker_keeps_unacknowledged_reservations_until_they_are_acknowledged(
    tmp_path: Path, vast: FakeAutoscaler
) -> None:
    with contextlib.closing(open_log(tmp_path / "nullworker.db")) as log:
        for name in ("owed", "last"):
            add(log, name, 0)
    quick = AT_ONCE.replace("commands.main", "retention.DAY_SECONDS = 0.1; commands.main")
    async with secured(tmp_path, vast, module=("-c", quick, "serve"), NULL_LOG_KEEP="30d") as worker:
        assert (await worker.line("log_pruned", where=lambda line: line["reservations"]))["reservations"] == 1
        assert worker.sql("SELECT id FROM reservations") == [("last",)]
        await vast.wait_for(lambda: vast.totals().cur_perf >= 200)  # both were reported before


async def test_a_worker_without_the_setting_keeps_everything(tmp_path: Path) -> None:
    long_history(tmp_path / "nullworker.db", 3)
    async with WorkerProcess(tmp_path, module=("-c", AT_ONCE, "serve")) as worker:
        assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
        assert worker.sql("SELECT count(*) FROM reservations") == [(5,)]


async def test_pruning_is_tried_again_the_next_day(tmp_path: Path) -> None:
    long_history(tmp_path / "nullworker.db", 3)
    quick = AT_ONCE.replace("commands.main", "retention.DAY_SECONDS = 0.1; commands.main")
    worker = WorkerProcess(tmp_path, module=("-c", quick, "serve"), NULL_LOG_KEEP="30d")
    with contextlib.closing(sqlite3.connect(worker.db, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        async with worker:
            assert "locked" in (await worker.line("not_pruned"))["why"]
            shell.execute("ROLLBACK")
            assert (await worker.line("log_pruned"))["reservations"] == 3
            assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
