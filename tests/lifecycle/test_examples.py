"""The examples: jobs in and jobs done with the official client, and what belongs to each. Faults: the fault matrix."""

from __future__ import annotations

import asyncio
import configparser
from pathlib import Path

import pytest
from fault_matrix import JOBS, Pages
from harness import PATIENCE, ROOT, secured
from programs import Program, free_port
from queues import QUEUES

from nullworker.client import hold
from nullworker.testing import FakeAutoscaler

EXAMPLES = sorted(QUEUES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
async def test_one_reservation_of_the_official_client_does_all_jobs(
    name: str, vast: FakeAutoscaler, tmp_path: Path
) -> None:
    (tmp_path / "queue").mkdir()
    ports = {each: str(free_port()) for each in ("WORKER_PORT", "NULL_CONTROL_PORT", "HEALTH_PORT")}
    settings = {**ports, "BACKEND_HEALTH_URL": f"http://127.0.0.1:{ports['HEALTH_PORT']}/health"}
    with QUEUES[name](tmp_path / "queue") as queue:
        # the libraries of the queues may warn of what is theirs to fix
        env = {**ports, **queue.env, "PYTHONWARNINGS": "default", "WAIT_SECONDS": "1"}
        consumer = Program(tmp_path, *queue.example, **env)
        async with (
            Pages().serve() as pages,
            secured(tmp_path, vast, NULL_HEALTH_INTERVAL="0.2", **settings) as worker,
            consumer,
        ):
            await worker.line("consumer_healthy")
            for job in JOBS:
                await queue.put({"id": job, "url": f"{pages.url}/{job}"})
            answer = await asyncio.wait_for(hold("null", autoscaler=vast.url), 3 * PATIENCE)
            result = answer["result"]
            assert result.get("done", result.get("runs")) == len(JOBS)
            assert (result["failed"], "error" in result) == (0, False)
            assert pages.done == dict.fromkeys(JOBS, 1)
            assert await consumer.terminate() == 0
            assert await queue.left() == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_has_a_program_file_for_the_supervisor_and_a_readme(name: str) -> None:
    folder = ROOT / "examples" / name
    parsed = configparser.RawConfigParser()
    parsed.read(folder / "consumer.conf")
    program = parsed["program:consumer"]
    script = Path(program["command"].split()[-1])
    assert (folder / script.name).is_file()
    assert int(program["stopwaitsecs"]) == 10
    assert program["autorestart"] == "true"
    told = {pair.partition("=")[0] for pair in program["environment"].split(",")}
    assert told - {"PROC_NAME", "PYTHONPATH"} <= {
        word for word in told if word in (folder / script.name).read_text()
    } | {"AWS_DEFAULT_REGION"}
    readme = (folder / "README.md").read_text()
    for word in (script.name, "consumer.conf", "BACKEND_HEALTH_URL"):
        assert word in readme
