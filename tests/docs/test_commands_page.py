"""docs/commands.md: each command is run as it stands there, and says what is shown, but for times, ids and figures."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness import ROOT, WorkerProcess
from pages import BOUNDARY, DOCS, blocks, shell
from programs import dead_address, free_port

PAGE = DOCS / "commands.md"
#: What is another in each run, and what stands in its place.
PASSING = {
    r"(?ms)^settings .*?(?=^\S|\Z)": "settings",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z": "<time>",
    r"until \d\d:\d\d:\d\d": "until <time>",
    r"\b[a-z2-7]{16}\b": "<id>",
    r"pid \d+": "pid <pid>",
    r"\b\d+h\d\dm\b|\b\d+m\d\ds\b|\b\d+\.\ds\b": "<duration>",
    r"(_seconds\"?:?\s+|after )[\d.]+": r"\1<seconds>",
    r"\d+ bytes|[\d.]+ MB": "<size>",
    r"[^ ]*/nullworker\.db": "<log>",
    r"127\.0\.0\.1:(?!1\b)\d+": "<address>",
    r"settings=\"?[^\"]*\"?|\w+_port=\d+": "<settings>",
    r" +": " ",
}


def alike(text: str) -> list[str]:
    for pattern, instead in PASSING.items():
        text = re.sub(pattern, instead, text)
    return [line.rstrip() for line in text.strip().splitlines()]


async def test_each_command_says_what_the_page_shows(tmp_path: Path) -> None:
    shown = [text for language, text in blocks(PAGE) if language == "console"]
    asked = [re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE) for text in shown]
    commands = [pair for pairs in asked for pair in pairs]
    assert len(commands) > 12
    script = ""
    for command, _ in commands:
        if command.endswith("&"):
            script += f"{command[:-1]} >reserve.txt 2>&1 &\n"
        else:
            script += f"{command} 2>&1 || true\n"
        script += f"echo '{BOUNDARY}'\n"
    async with WorkerProcess(tmp_path, NULL_LOG_FORMAT="json") as worker:
        env = {"NULL_CONTROL_PORT": str(worker.control_port), "COLUMNS": "80"}
        env["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
        told = (await shell(script.replace("127.0.0.1:3000", f"127.0.0.1:{worker.port}"), tmp_path, **env)).split(
            f"{BOUNDARY}\n"
        )
    assert told.pop() == ""
    for (command, expected), said in zip(commands, told, strict=True):
        assert alike(said) == alike(expected), command
        # neither a path nor a sentence that is an error is broken
        wide = [line for line in said.splitlines() if len(line) > 80 and "/" not in line and "nullworker: " not in line]
        assert not wide or command.startswith("nullworker prune"), (command, wide)


async def test_a_worker_says_at_its_start_what_the_page_shows(tmp_path: Path) -> None:
    (expected,) = [text for language, text in blocks(PAGE) if language == "console serve"]
    env = {"UNSECURED": "true", "WORKER_PORT": "0", "NULL_CONTROL_PORT": "0", "WORKER_HTTP_PORT": "0"}
    env["PATH"] = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    script = """
        nullworker serve 2>said & until [ "$(wc -l <said)" -ge 2 ]; do sleep 0.1; done
        kill %1; wait; head -n 2 said
    """
    told = await shell(script, tmp_path, **env)
    assert alike(told) == alike(expected)


async def test_the_doctor_looks_at_what_the_page_shows(tmp_path: Path) -> None:
    """What it finds is another on each machine; what does not depend on it is word for word."""
    (shown,) = [text for language, text in blocks(PAGE) if language == "console doctor"]
    command, _, expected = shown.partition("\n")
    ports = {name: str(free_port()) for name in ("WORKER_PORT", "WORKER_HTTP_PORT", "NULL_CONTROL_PORT")}
    env = {"COLUMNS": "80", "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "REPORT_ADDR": dead_address()}
    told = await shell(f"{command[2:]} || test $? = 1", tmp_path, **env, **ports)
    assert max(map(len, told.splitlines())) <= 80 or str(tmp_path) in told
    assert [line[9:27] for line in told.splitlines() if line[9:27].strip()] == [
        line[9:27] for line in expected.splitlines() if line[9:27].strip()
    ]
    for words in ("is NULL_DRAIN_SECONDS meant?", "MASTER_TOKEN is empty", "USE_SSL is not true", "4 warnings"):
        assert words in " ".join(told.split())
        assert words in " ".join(expected.split())


async def test_the_stand_in_says_at_its_start_what_the_page_shows(tmp_path: Path) -> None:
    (shown,) = [text for language, text in blocks(PAGE) if language == "console dev"]
    command, _, expected = shown.partition("\n")
    command = command[2:].replace(" dev ", " dev --port 0 --worker-port 0 --control-port 0 ")
    script = f"""
        {command} >said 2>&1 & until [ "$(wc -l <said)" -ge 7 ]; do sleep 0.1; done
        kill %1; wait; head -n 7 said
    """
    told = await shell(script, tmp_path, PATH=f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    assert [in_dev(line) for line in alike(told)] == [in_dev(line) for line in alike(expected)]


def in_dev(line: str) -> str:
    return re.sub(r"nullworker-dev-\S+", "<folder>", re.sub(r"^\d\d:\d\d:\d\d", "<time>", line))
