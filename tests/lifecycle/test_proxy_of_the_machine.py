"""A machine with HTTP_PROXY set, to a proxy that is down: what talks to this machine never uses it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from fleets import Dev, official, reserve
from harness import ROOT, WorkerProcess
from programs import Program, answered, caller, dead_address, nullworker, nullworker_work, run


@pytest.fixture
def proxy() -> Any:
    """An environment; a dict of texts."""
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    return dict.fromkeys(names, dead_address())


async def test_dev_and_its_workers(tmp_path: Path, proxy: Any) -> None:
    work = (sys.executable, "-m", "nullworker", "work", "--", "true")
    async with Dev(tmp_path, "--", *work, **proxy) as dev, official(dev) as endpoint:
        assert (await reserve(endpoint))["released"] == "consumer_exit"


async def test_the_bash_example(tmp_path: Path, proxy: Any) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "job").write_text("true\n")
    async with WorkerProcess(tmp_path) as worker:
        env = {"NULL_CONTROL_PORT": str(worker.control_port), "JOB_FOLDER": str(tmp_path), "HEALTH_PORT": "0", **proxy}
        env["WAIT_SECONDS"] = "1"
        example = str(ROOT / "examples" / "bash" / "consumer.sh")
        async with Program(tmp_path, "bash", example, **env) as consumer, caller(worker) as asked:
            assert (await answered(asked))["result"] == {"exit_code": 0, "runs": 1, "failed": 0}
            consumer.process.terminate()
            await worker.terminate()  # for which it would wait until it answers


async def test_commands_and_the_consumer_library(tmp_path: Path, proxy: Any) -> None:
    async with WorkerProcess(tmp_path) as worker:
        control = {"NULL_CONTROL_PORT": str(worker.control_port), **proxy}
        async with caller(worker) as asked:
            await worker.line("reservation_held")
            await nullworker("status", **control)
            await nullworker("release", **control)
            await answered(asked)
        async with nullworker_work(worker, "--", "true", **proxy), caller(worker) as asked:
            assert (await answered(asked))["released"] == "consumer_exit"
        script = (
            "import asyncio, nullworker.consumer as consumer\n"
            "async def main():\n"
            "    async for reservation in consumer.reservations():\n"
            "        async with reservation:\n"
            "            reservation.result = 'done'\n"
            "        return\n"
            "asyncio.run(main())\n"
        )
        async with caller(worker) as asked:
            await asyncio.gather(run(sys.executable, "-c", script, **control), answered(asked))
            assert (await answered(asked))["result"] == "done"
