"""docs/recipes.md and docs/holding.md: their code runs, and their commands have the options that are given."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness import ROOT, WorkerProcess
from pages import DOCS, blocks, rows
from programs import Program, free_port, listens, nullworker_work, run, until
from queues import RedisQueue

from nullworker.cli.commands import COMMANDS, cli
from nullworker.settings import Settings

CODE = {block.language: block.text for block in blocks(DOCS / "recipes.md")}
COMMAND_LINES = [
    shlex.split(line)
    for page in ("recipes.md", "holding.md")
    for language, text in blocks(DOCS / page)
    if language == "console"
    for line in text.splitlines()
]
PATH = f"{ROOT / '.venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    with RedisQueue.run(tmp_path) as queue:
        yield queue.env["REDIS_URL"]


async def told(url: str, *words: str) -> list[str]:
    return (await run("redis-cli", "-u", url, *words)).splitlines()


def program(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line[0] == "nullworker"], ids=" ".join)
def test_each_command_has_the_options_that_are_given(line: list[str]) -> None:
    assert line[1] in COMMANDS
    help_text = CliRunner().invoke(cli, [line[1], "--help"]).output
    ours = line[: line.index("--")] if "--" in line else line
    assert {word for word in ours if word.startswith("--")} <= set(re.findall(r"--[\w-]+", help_text))


def test_the_limits_are_settings_and_options() -> None:
    for cells in rows(DOCS / "recipes.md", "| limit |"):
        for setting in re.findall(r"`([A-Z_]{8,})`", cells[0]):
            assert setting.lower() in Settings.__dataclass_fields__
        for command, option in re.findall(r"`nullworker (\w+) (--[\w-]+)`", cells[0]):
            assert option in CliRunner().invoke(cli, [command, "--help"]).output


async def test_the_nightly_job_reserves_once_at_a_time_and_tells_its_end(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        text = CODE["sh cron"].replace("--endpoint my-endpoint", f"--url {worker.url}")
        nightly = program(tmp_path, "nightly", text)
        env = {"PATH": PATH, "LOCK": f"{tmp_path}/lock", "OUT": f"{tmp_path}/told.json"}
        async with Program(tmp_path, nightly, **env) as first:
            held = (await worker.line("reservation_held"))["reservation_id"]
            assert "exit code 1" in await run(nightly, code=1, **{**env, "OUT": f"{tmp_path}/second.json"})
            assert (await worker.get("/reservation"))["metadata"] == {"job": "nightly"}
            await worker.release(reservation_id=held, result={"exit_code": 0})
            assert await first.exit_code() == 0
        assert json.loads((tmp_path / "told.json").read_text())["released"] == "explicit"


async def test_an_urgent_job_is_taken_first_and_both_queues_are_counted(tmp_path: Path, redis: str) -> None:
    await told(redis, "lpush", "jobs", "slow")
    await told(redis, "lpush", "jobs:urgent", "first")
    count = program(tmp_path, "count", f"#!/bin/sh\n{CODE['sh count']}")
    assert await run(count, REDIS_URL=redis) == "2 0\n"
    consumer = program(tmp_path, "consumer.py", CODE["python priorities"])
    for expected in ("working on first\n", "working on slow\n", ""):
        assert await run(sys.executable, consumer, REDIS_URL=redis) == expected
    assert await run(count, REDIS_URL=redis) == "0 0\n"


async def test_one_job_runs_on_each_gpu_and_one_that_fails_fails_all(tmp_path: Path) -> None:
    gpus = program(tmp_path, "gpus", CODE["sh gpus"])
    said = await run(gpus, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES", GPUS="3")
    assert sorted(said.split()) == ["0", "1", "2"]
    await run(gpus, "sh", "-c", "exit $(( CUDA_VISIBLE_DEVICES == 1 ? 7 : 0 ))", GPUS="3", code=7)
    await run(gpus, "sh", "-c", "exit $(( CUDA_VISIBLE_DEVICES == 2 ? 75 : 0 ))", GPUS="3", code=75)
    await run(gpus, "sh", "-c", "exit $(( CUDA_VISIBLE_DEVICES == 2 ? 75 : 3 ))", GPUS="3", code=3)


async def test_a_handler_of_runpod_is_called_with_a_job_and_its_result_is_kept(tmp_path: Path, redis: str) -> None:
    handler = 'def handler(job):\n    return {"sum": sum(job["input"]["numbers"])}\n'
    (tmp_path / "handler.py").write_text(handler)
    consumer = program(tmp_path, "consumer.py", CODE["python runpod"])
    for job in ({"id": "a", "input": {"numbers": [1, 2]}}, {"id": "b", "input": {}}):
        await told(redis, "lpush", "jobs", json.dumps(job))
    async with (
        WorkerProcess(tmp_path) as worker,
        nullworker_work(worker, "--", sys.executable, consumer, REDIS_URL=redis),
    ):
        answer = await run(sys.executable, "-m", "nullworker", "reserve", "--json", "--url", worker.url)
        assert json.loads(answer)["result"]["exit_code"] == 0
    assert json.loads((await told(redis, "get", "result:a"))[0]) == {"status": "COMPLETED", "output": {"sum": 3}}
    said = await run(sys.executable, consumer, REDIS_URL=redis, code=1)
    assert said == ""
    assert json.loads((await told(redis, "get", "result:b"))[0])["status"] == "FAILED"


async def test_an_error_of_redis_is_not_taken_for_a_job(tmp_path: Path, redis: str) -> None:
    await told(redis, "set", "jobs", "a string")
    await run(program(tmp_path, "job.sh", CODE["sh job"]), REDIS_URL=redis, code=1)
    assert await told(redis, "llen", "jobs:busy") == ["0"]


@pytest.mark.slow
async def test_a_redis_queue_is_worked_off_by_workers_of_the_stand_in(tmp_path: Path, redis: str) -> None:
    program(tmp_path, "job.sh", CODE["sh job"])
    port = free_port()
    here = {"8080": str(port), "--max-workers": f"--worker-port 0 --control-port 0 --folder {tmp_path} --max-workers"}
    scripts = {}
    for name in ("dev", "jobs"):
        text = CODE[f"sh {name}"].replace("nullworker dispatch", "exec nullworker dispatch --port 0 --interval 1")
        for shown, mine in here.items():
            text = text.replace(shown, mine)
        scripts[name] = program(tmp_path, name, f"#!/bin/sh\n{text.replace('nullworker dev', 'exec nullworker dev')}")
    env = {"PATH": PATH, "REDIS_URL": redis, "HOME": str(tmp_path)}
    async with Program(tmp_path, scripts["dev"], **env) as dev:
        await until(lambda: listens(port))
        async with Program(tmp_path, scripts["jobs"], **env) as jobs:
            await until((tmp_path / "nullworker-dispatch.db").exists)
            await until(lambda: str(jobs.lines).count("claim_ended") >= 3)
            with contextlib.closing(sqlite3.connect(tmp_path / "nullworker-dispatch.db")) as ledger:
                done = "SELECT count(*) FROM claims WHERE reason = 'consumer_exit' AND result ->> 'exit_code' = 0"
                await until(lambda: ledger.execute(done).fetchone() == (3,))
            assert await jobs.terminate() == 0
        assert await told(redis, "llen", "jobs") == await told(redis, "llen", "jobs:busy") == ["0"]
        await dev.terminate()
