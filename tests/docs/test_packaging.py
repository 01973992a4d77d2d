"""The packages, the environment that make creates, and CONTRIBUTING.md."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from harness import ROOT
from pages import rows

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True)


# -- the wheel and the source distribution -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "hatchling", "build", "-d", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_installs_the_package_nullworker_and_nothing_else(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    uv = Path(sys.executable).parent / "uv"
    done = run(uv, "pip", "install", "--no-deps", "--offline", "--target", tmp_path / "site", wheel, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    installed = {path.name for path in (tmp_path / "site").iterdir() if not path.name.startswith(".")}
    assert installed == {"nullworker", "bin", f"{wheel.name.partition('-py3')[0]}.dist-info"}
    assert {path.name for path in (tmp_path / "site" / "bin").iterdir()} == {"nullworker"}


def test_the_wheel_has_the_files_that_are_no_python(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "nullworker").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names


def test_the_source_distribution_has_rules_dashboards_runbooks_docs_and_examples(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("monitoring", "examples", "docs", "tests", "stress", "bench", "workers"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names
    assert {"worker.py", "requirements.txt", "Makefile", "README.md", "CONTRIBUTING.md", "LICENSE"} <= names


# -- the environment ---------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) echo {version} ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") ;;
esac
"""


def python(folder: Path, version: str) -> Path:
    """A program that is a Python of this version as far as .ci/venv sees."""
    path = folder / f"python{version}"
    path.write_text(PYTHON.format(version=version))
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old_is_refused_and_makes_no_environment(tmp_path: Path) -> None:
    done = run(ROOT / ".ci" / "venv", tmp_path / "venv", python(tmp_path, "3.9"))
    assert done.returncode == 1
    assert "needs Python 3.10 or newer" in done.stderr
    assert "make PYTHON=python3.11 install" in done.stderr
    assert not (tmp_path / "venv").exists()
    assert run(ROOT / ".ci" / "venv", tmp_path / "venv", "/bin/false").returncode == 1


def test_an_environment_of_another_python_is_made_anew_and_one_of_the_same_is_kept(tmp_path: Path) -> None:
    venv, mark = tmp_path / "venv", tmp_path / "venv" / "mark"
    for version, kept in (("3.11", False), ("3.11", True), ("3.12", False)):
        assert run(ROOT / ".ci" / "venv", venv, python(tmp_path, version)).returncode == 0
        assert (venv / ".installed").exists()
        assert mark.exists() == kept
        mark.touch()
    assert run(ROOT / ".ci" / "venv", venv, f"{venv}/bin/python").returncode == 0
    assert mark.exists()


@pytest.mark.slow  # of make: the Python that runs the test must be that of .venv
def test_make_installs_again_only_for_another_python(tmp_path: Path) -> None:
    other = run("make", "-n", f"PYTHON={python(tmp_path, '3.99')}", "install", MAKEFLAGS="")
    assert ".ci/venv .venv" in other.stdout
    usual, same = (run("make", "-n", *more, "install", MAKEFLAGS="") for more in ((), (f"PYTHON={sys.executable}",)))
    assert (".ci/venv .venv" in same.stdout) == (".ci/venv .venv" in usual.stdout)


# -- CONTRIBUTING.md ---------------------------------------------------------------------------------------------


def test_contributing_lists_every_target_of_make() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = {cells[0].strip("`").removeprefix("make ") for cells in rows(CONTRIBUTING, "| command |")}
    assert listed | {"help", "install"} == targets


def test_every_path_in_contributing_exists() -> None:
    text = CONTRIBUTING.read_text()
    for path in re.findall(r"`((?!\S*NAME)(?:nullworker|tests|docs|examples|stress|\.ci)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    (tree,) = re.findall(r"```\n(nullworker/.*?)```", text, re.DOTALL)
    rooms = re.findall(r"^  ([\w./]+)", tree, re.MULTILINE)
    public = {path.name for path in (ROOT / "nullworker").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {room.rstrip("/") for room in rooms if room.endswith("/")} == public
    assert all((ROOT / "nullworker" / room).exists() for room in rooms)
