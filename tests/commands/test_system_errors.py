"""What the operating system refuses is one line on stderr, whatever the command; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, WorkerProcess, post
from programs import python_path

COMMANDS = (["history"], ["events"], ["history", "--json"], ["--help"], ["--version"], ["serve", "--help"])


def ran(folder: Path, *arguments: str, stdout: str | None = None, **env: str) -> tuple[int, str]:
    """Exit code and stderr of a command in a folder."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NULL_CONTROL_PORT": "1", **env}
    with Path(stdout or os.devnull).open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "nullworker", *arguments],
            cwd=folder,
            env=own,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
async def test_a_full_disk_under_the_output(tmp_path: Path, arguments: list[str]) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await post(worker.url + "/reserve", {"duration": 0})
    assert ran(tmp_path, *arguments, stdout="/dev/full") == (1, "nullworker: No space left on device\n")


def test_no_folder_for_what_is_temporary(tmp_path: Path) -> None:
    script = (
        "import tempfile\n"
        "def none(*_, **__): raise FileNotFoundError(2, 'No usable temporary directory found in [...]')\n"
        "tempfile._get_default_tempdir = none\n"
    )
    path = python_path(tmp_path, script)
    code, err = ran(tmp_path, "dev", "--port", "0", PYTHONPATH=path)
    assert (code, err) == (1, "nullworker: No usable temporary directory found in [...]\n")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, err = ran(tmp_path, "dev", "--port", "0", "--folder", "file/below")
    assert (code, err.count("\n"), err.startswith("nullworker: file/below: ")) == (1, 1, True)


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    command = f"{sys.executable} -m nullworker serve --help | true"
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
