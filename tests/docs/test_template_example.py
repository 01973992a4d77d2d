"""examples/template: its commands taken by the real `vastai`, its install steps run, its programs under supervisord."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from harness import PATIENCE, ROOT, post
from programs import free_port, run, until
from queues import RedisQueue

from nullworker.control_client import ControlClient
from nullworker.errors import WorkerUnreachable
from nullworker.settings import Settings

TEMPLATE = ROOT / "examples" / "template"
BIN = Path(sys.executable).parent
ENV = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONWARNINGS": "ignore",
    "IMAGE": "you/consumer",
    "PYWORKER_REPO": "https://github.com/you/nullworker",
    "MAX_RESERVATION_SECONDS": "7200",
    "DOCKER_OPTIONS": "-e REDIS_URL=redis://queue.example.com",
}


# -- deploy.sh ---------------------------------------------------------------------------------------------------------


def deploy(*arguments: str, code: int = 0, **env: str) -> str:
    done = subprocess.run(
        [TEMPLATE / "deploy.sh", *arguments], env={**ENV, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stderr if code else done.stdout


@pytest.fixture
def vast(tmp_path: Path) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """Vast's web server as far as the CLI needs it: its address, and what it was asked."""
    asked: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server calls
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.command, self.path.partition("?")[0], body))
            answer = json.dumps({"success": True, "template": {"id": 1, "hash_id": "c0ffee"}, "result": 1}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_commands_are_shown_and_not_run_with_dry_run() -> None:
    lines = [shlex.split(line) for line in deploy("--dry-run", PATH=os.environ["PATH"]).splitlines()]
    assert [line[:3] for line in lines] == [
        ["vastai", "create", "template"],
        ["vastai", "create", "endpoint"],
        ["vastai", "create", "workergroup"],
        ["nullworker", "doctor", "--endpoint"],
    ]


def test_the_real_cli_sends_what_the_script_means(vast: tuple[str, list[tuple[str, str, Any]]], tmp_path: Path) -> None:
    url, asked = vast
    (tmp_path / "nullworker").write_text("#!/bin/sh\necho doctor: $*\n")
    (tmp_path / "nullworker").chmod(0o755)
    path = f"{tmp_path}:{ENV['PATH']}"
    told = deploy(PATH=path, HOME=str(tmp_path), VASTAI_OPTIONS=f"--url {url} --api-key key --retry 1")
    assert "doctor: doctor --endpoint my-endpoint" in told
    (_, template_at, template), (_, endpoint_at, endpoint), (_, group_at, group) = asked
    assert (template_at, endpoint_at, group_at) == ("/api/v0/template/", "/api/v0/endptjobs/", "/api/v0/autojobs/")
    assert template["image"] == "you/consumer"
    words = shlex.split(template["env"])
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert pairs[0] == ("-p", "3000:3000")
    env = dict(value.split("=", 1) for flag, value in pairs if flag == "-e")
    assert env["MAX_RESERVATION_SECONDS"] == "7200"
    ours = {name for name in env if name.lower() in Settings.__dataclass_fields__}
    assert env.keys() - ours == {"PYWORKER_REPO", "PYWORKER_REF", "REDIS_URL"}
    assert (endpoint["endpoint_name"], endpoint["target_util"], endpoint["max_queue_time"]) == ("my-endpoint", 1.0, 1.0)
    assert (group["endpoint_name"], group["template_hash"]) == ("my-endpoint", "c0ffee")


def test_what_is_missing_is_named_and_a_refused_template_makes_nothing_else(tmp_path: Path) -> None:
    for name in ("IMAGE", "PYWORKER_REPO", "MAX_RESERVATION_SECONDS"):
        assert f"set {name} to" in deploy("--dry-run", code=1, **{name: ""})
    (tmp_path / "vastai").write_text("#!/bin/sh\necho refused $2\n")
    (tmp_path / "vastai").chmod(0o755)
    assert "no template was made" in deploy(code=1, PATH=f"{tmp_path}:{os.environ['PATH']}")
    deploy("--wet-run", code=2)


# -- the image ---------------------------------------------------------------------------------------------------------


def test_the_dockerfile_copies_what_is_there_and_runs_nothing_but_the_consumer() -> None:
    text = (TEMPLATE / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == ["consumer.conf", "consumer.py", "consumer.sh", "install.sh", "requirements.txt"]
    assert all((TEMPLATE / name).exists() for name in copied)
    assert "useradd --system --create-home consumer" in text
    assert program()["user"] == "consumer"


def program() -> dict[str, str]:
    parser = configparser.RawConfigParser()
    parser.read(TEMPLATE / "consumer.conf")
    return dict(parser["program:consumer"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The virtual environment as install.sh makes it, with nullworker from here."""
    folder = tmp_path_factory.mktemp("image")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    env = {**os.environ, "NULLWORKER": f"{wheel}"}
    done = subprocess.run([TEMPLATE / "install.sh", venv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"nullworker, version \d", done.stdout)
    return venv


# -- the programs ------------------------------------------------------------------------------------------------------

SUPERVISOR = """\
[supervisord]
nodaemon=true
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
childlogdir={folder}
[unix_http_server]
file={folder}/sock
[supervisorctl]
serverurl=unix://{folder}/sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:pyworker]
command={venv}/bin/nullworker serve
"""


class Supervised:
    """A supervisord with both programs, as on an instance; Vast's own attributes for the worker's."""

    def __init__(self, folder: Path, control_port: int, worker_port: int, redis: str) -> None:
        self.folder, self.redis = folder, redis
        self.url = f"http://127.0.0.1:{worker_port}"
        self.control = ControlClient(f"http://127.0.0.1:{control_port}")

    def ctl(self, *words: str) -> str:
        command = [str(BIN / "supervisorctl"), "-c", str(self.folder / "supervisord.conf"), *words]
        return str(subprocess.run(command, capture_output=True, text=True, env={"PATH": ENV["PATH"]}).stdout)

    def pid(self, name: str) -> int:
        return int(self.ctl("pid", name))

    def ready(self) -> bool:
        try:
            return bool(self.control.ask("GET", "/status")["state"] == "ready")
        except WorkerUnreachable:
            return False


@pytest_asyncio.fixture
async def supervised(tmp_path: Path, installed: Path) -> AsyncIterator[Supervised]:
    control, worker, health = free_port(), free_port(), free_port()
    with RedisQueue.run(tmp_path) as queue:
        own = program()
        mine = {**own, "command": str(TEMPLATE / "consumer.sh"), "stdout_logfile": f"{tmp_path}/consumer.log"}
        del mine["user"]  # of the image; a test may run as anybody
        common = {name: own[name] for name in own if name not in ("environment", "command", "user", "stdout_logfile")}
        conf = SUPERVISOR.format(folder=tmp_path, venv=installed)
        conf += "".join(f"{name}={value}\n" for name, value in common.items())
        conf += f"stdout_logfile={tmp_path}/pyworker.log\n[program:consumer]\n"
        conf += "".join(f"{name}={value}\n" for name, value in mine.items())
        (tmp_path / "supervisord.conf").write_text(conf)
        env = {
            "PATH": ENV["PATH"],
            "UNSECURED": "true",
            "WORKER_PORT": str(worker),
            "WORKER_HTTP_PORT": str(free_port()),
            "NULL_CONTROL_PORT": str(control),
            "NULL_HEALTH_INTERVAL": "1",
            "NULL_EVENT_LOG": f"{tmp_path}/nullworker.db",
            "BACKEND_HEALTH_URL": f"http://127.0.0.1:{health}/health",
            "HEALTH_PORT": str(health),
            "CONSUMER_VENV": str(installed),
            "CONSUMER": str(TEMPLATE / "consumer.py"),
            "REDIS_URL": queue.env["REDIS_URL"],
        }
        command = [str(BIN / "supervisord"), "-c", str(tmp_path / "supervisord.conf")]
        process = await asyncio.create_subprocess_exec(*command, env=env, cwd=tmp_path)
        try:
            made = Supervised(tmp_path, control, worker, queue.env["REDIS_URL"])
            await until(made.ready)
            yield made
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(300)  # it installs
async def test_both_programs_start_work_come_back_and_stop_in_time(supervised: Supervised) -> None:
    redis = ("redis-cli", "-u", supervised.redis)
    await run(*redis, "lpush", "jobs", "0.2")
    answer = await asyncio.wait_for(post(f"{supervised.url}/reserve", {"duration": 60}), PATIENCE)
    assert (answer.status, answer.body["released"], answer.body["result"]["exit_code"]) == (200, "consumer_exit", 0)
    assert await run(*redis, "lrange", "jobs:done", "0", "-1") == "slept for 0.2 s\n"

    before = supervised.pid("consumer")
    os.kill(before, 9)
    await until(lambda: supervised.pid("consumer") not in (0, before))
    await until(supervised.ready)

    await run(*redis, "lpush", "jobs", "60")
    held = asyncio.ensure_future(post(f"{supervised.url}/reserve", {"duration": 600}))
    await asyncio.to_thread(supervised.control.ask, "GET", "/reservation?wait=20", seconds=30)
    began = time.monotonic()
    said = await asyncio.to_thread(supervised.ctl, "stop", "all")
    assert time.monotonic() - began < 10
    assert said.count("stopped") == 2
    assert (await asyncio.wait_for(held, PATIENCE)).status in (200, 503)
