"""docs/deploying.md, checked with the official CLI, our commands, and the programs its files are for."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from pages import DOCS, blocks
from programs import run

from nullworker.cli.commands import COMMANDS, cli
from nullworker.doctor.endpoint import judge
from nullworker.settings import Settings

PAGE = DOCS / "deploying.md"
COMMAND_LINES = [
    shlex.split(line) for language, text in blocks(PAGE) if language == "console" for line in text.splitlines()
]


def options(line: list[str]) -> set[str]:
    return {word for word in line if word.startswith("--")}


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line[0] == "vastai"], ids=" ".join)
async def test_each_command_of_vasts_cli_has_the_options_that_are_given(line: list[str]) -> None:
    words = [word for word in line[1:3] if not word.startswith("-")]
    vastai = str(Path(sys.executable).with_name("vastai"))
    told = await run(sys.executable, vastai, *words, "--help", PYTHONWARNINGS="ignore", COLUMNS="200")
    assert told.startswith(f"usage: vastai {' '.join(words)}")
    assert options(line) <= set(re.findall(r"--\w+", told))


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line[0] == "nullworker"], ids=" ".join)
def test_each_command_of_ours_has_the_options_that_are_given(line: list[str]) -> None:
    assert line[1] in COMMANDS
    told = CliRunner().invoke(cli, [line[1], "--help"]).output
    assert options(line) <= set(re.findall(r"--[\w-]+", told))


def test_the_parameters_that_it_gives_are_those_that_the_doctor_wants() -> None:
    (line,) = [line for line in COMMAND_LINES if line[:3] == ["vastai", "create", "endpoint"]]
    given = dict(zip(line[3::2], line[4::2], strict=True))
    config = {name.removeprefix("--"): float(value) for name, value in given.items() if name != "--endpoint_name"}
    assert {each.level for each in judge(config, 1, [], cost=100)} == {"ok"}


def test_its_docker_options_are_settings_or_vasts_own() -> None:
    (line,) = [line for line in COMMAND_LINES if line[:3] == ["vastai", "create", "template"]]
    env = shlex.split(line[line.index("--env") + 1])
    names = {each.partition("=")[0] for flag, each in zip(env[::2], env[1::2], strict=True) if flag == "-e"}
    ours = {name for name in names if name.lower() in Settings.__dataclass_fields__}
    assert names - ours == {"PYWORKER_REPO", "PYWORKER_REF"}


def test_the_supervisor_program_and_its_script_can_be_read(tmp_path: Path) -> None:
    (ini,) = [text for language, text in blocks(PAGE) if language == "ini"]
    parser = configparser.RawConfigParser()
    parser.read_string(ini)
    assert parser["program:consumer"]["stopwaitsecs"] == "10"
    (script,) = [text for language, text in blocks(PAGE) if language == "bash"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = shlex.split(script.splitlines()[-1])
    health = int(command[command.index("--health-port") + 1])
    assert f"BACKEND_HEALTH_URL=http://127.0.0.1:{health}/health" in PAGE.read_text()
