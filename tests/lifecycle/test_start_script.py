"""The steps of Vast's start_server.sh, without certificate and supervisor: clone, venv, requirements, SDK, `-m worker`.

The worker runs from the clone, with only what those steps have installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from harness import PATIENCE, ROOT, WorkerProcess

from nullworker.testing import FakeAutoscaler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # it downloads vastai and all that it needs, once


class Instance:
    """A rented machine after its start script: the clone, and the venv's Python."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "vast-pyworker"
        self.venv = folder / "worker-env"
        self.python = str(self.venv / "bin" / "python3")
        self.uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")

    def run(self, *command: str) -> str:
        """A step of the script. Fails with all that it said."""
        env = {**os.environ, "VIRTUAL_ENV": str(self.venv), "UV_LINK_MODE": "copy"}
        # not in the clone: what a requirements file names by a relative path is not found
        done = subprocess.run(command, cwd=self.clone.parent, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


def oldest_python() -> str:
    """The template's Python 3.10, or the oldest after it that this machine has."""
    for minor in range(10, sys.version_info.minor + 1):
        found = subprocess.run([ROOT / ".ci" / "find-python", f"3.{minor}"], capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return sys.executable


def copy_repository(to: Path) -> None:
    """What a clone would have: every file that git knows or would take, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Instance:
    instance = Instance(tmp_path_factory.mktemp("instance"))
    copy_repository(instance.clone)
    instance.run(instance.uv, "venv", "--quiet", "--python", oldest_python(), str(instance.venv))
    instance.run(instance.uv, "pip", "install", "--quiet", "-r", str(instance.clone / "requirements.txt"))
    instance.run(instance.uv, "pip", "install", "--quiet", "vastai")
    return instance


def worker_of(instance: Instance, vast: FakeAutoscaler, workspace: Path, *module: str) -> WorkerProcess:
    """The worker, with the environment that the template gives it."""
    worker = WorkerProcess(
        instance.clone,
        module=module,
        CONTAINER_ID="77",
        MASTER_TOKEN="master-secret",
        REPORT_ADDR=f"{vast.url},https://cloud.vast.ai/api/v0",
        WORKSPACE_DIR=str(workspace),
        PUBLIC_IPADDR="127.0.0.1",
        USE_SSL="false",
        NULL_EVENT_LOG="",
        PYTHONPATH="",
    )
    worker._command = (instance.python, *module)
    worker.db = workspace / "nullworker-77.db"
    return worker


@pytest.fixture(params=["worker", "workers.null.worker"])
async def worker(
    request: pytest.FixtureRequest, instance: Instance, vast: FakeAutoscaler, tmp_path: Path
) -> AsyncIterator[WorkerProcess]:
    async with worker_of(instance, vast, tmp_path, "-m", request.param) as worker:
        await worker.line("key_loaded")
        yield worker


def test_vastais_pins_and_our_requirements_agree(instance: Instance) -> None:
    version = instance.run(instance.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    instance.run(instance.uv, "pip", "check")  # it fails when they do not
    print(f"tested with Python {version}; the template has 3.10")
    installed = json.loads(instance.run(instance.uv, "pip", "list", "--format", "json"))
    names = {each["name"] for each in installed}
    assert "vastai" in names
    assert "nullworker" not in names, "the template runs the clone, and does not install it"


async def test_the_official_client_reserves_it_and_sigterm_ends_it_well(
    instance: Instance, vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    client = await asyncio.create_subprocess_exec(
        *(instance.python, "-m", "workers.null.client", "--endpoint", "null", "--duration", "600"),
        *("--autoscaler", vast.url, "--json"),
        cwd=instance.clone,
        env={"PATH": os.environ["PATH"]},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await worker.line("reservation_held")
    assert await worker.release() == {"released": True}
    out, err = await asyncio.wait_for(client.communicate(), PATIENCE)
    assert (client.returncode, err) == (0, b"")
    answer = json.loads(out)
    assert (answer["released"], answer["duration_cap"]) == ("explicit", 600)
    assert worker.story() == [("queued", None), ("held", None), ("released", "explicit")]
    assert await worker.terminate() == 0
    assert [(each["request_idx"], each["status"]) for each in vast.outcomes] == [(1, "Success")]


@pytest.fixture
def force_update() -> Iterator[Path]:
    """The file at which the start script looks; as it was before, afterwards."""
    path = Path("/.force_update")
    was_there = path.exists()
    yield path
    if not was_there:
        path.unlink(missing_ok=True)


async def test_a_rolling_update_leaves_the_mark_that_the_script_looks_for(
    worker: WorkerProcess, force_update: Path
) -> None:
    bearer = {"Authorization": "Bearer master-secret"}
    async with aiohttp.ClientSession(headers=bearer) as http, http.post(worker.url + "/pyworker/update") as answer:
        told = await answer.json()
    if os.access("/", os.W_OK):  # as on an instance
        assert (answer.status, told) == (200, {"ok": True})
        assert force_update.name in os.listdir("/")
    else:
        assert (answer.status, told["error"].partition(":")[0]) == (500, "/.force_update cannot be written")
    assert await worker.terminate() == 0
