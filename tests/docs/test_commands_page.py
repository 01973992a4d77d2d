"""docs/commands.md: each command is run as it stands there, and says what is shown, but for times, ids and figures."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness import ROOT, WorkerProcess
from pages import BOUNDARY, DOCS, blocks, shell

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
