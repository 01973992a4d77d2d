"""The architecture, as imports: each room may use those below it, never those above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nullworker"

#: From the bottom up. A room imports from its own rank or a lower one; the lowest three have no way up at all.
RANKS = (
    {"errors", "clock", "settings", "bell", "logs", ""},
    {"fsm"},
    {
        "condition",
        "service",
        "alarm",
        "journal",
        "migrations",
        "schema",
        "transaction",
        "log",
        "rehearsal",
        "history",
        "retention",
        "autoscaler",
        "publickey",
        "control_client",
    },
    {"link", "http", "metrics", "health", "webhooks", "ports", "testing"},
    {"app", "sites"},
    {"process"},
)
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
COMMANDS = len(RANKS)  # everything else is a command: the top

#: What the pure core may use of the world, and no more.
PURE = {"__future__", "collections", "itertools", "typing", "msgspec", "transitions", "nullworker"}


def imports(file: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(name: str) -> str:
    """The room of an import; "" for the package itself."""
    first = name.split(".")[1] if "." in name else ""
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() else ""


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_room_uses_only_those_below_it(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    rank = RANK_OF.get(own if own != "__init__" else "", COMMANDS)
    for name in imports(file):
        if name.startswith("nullworker"):
            assert RANK_OF.get(room(name), COMMANDS) <= rank, f"{own} (rank {rank}) must not use {name}"
            assert room(name) != "testing" or own == "testing" or rank == COMMANDS, "the worker uses no fakes"


@pytest.mark.parametrize("file", sorted((PACKAGE / "fsm").glob("*.py")), ids=lambda file: file.name)
def test_the_state_machine_is_pure(file: Path) -> None:
    for name in imports(file):
        assert name.split(".")[0] in PURE, f"{file.name} must not use {name}"
        assert not name.startswith("nullworker") or room(name) in ("fsm", "errors", "")


def test_time_is_asked_in_one_file() -> None:
    worker = [file for file in FILES if file.relative_to(PACKAGE).with_suffix("").parts[0] in RANK_OF]
    assert len(worker) > 20
    for file in worker:
        if file.name != "clock.py" and "testing" not in file.parts:
            for name in imports(file):
                assert name.split(".")[0] != "time", f"{file}: the time comes from clock.py"


def test_a_new_log_does_not_pay_for_migrations(tmp_path: Path) -> None:
    script = "import sys, pathlib, nullworker.log as log; log.open_log(pathlib.Path(sys.argv[1])); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log.db")], capture_output=True, text=True, check=True
    )
    assert "sqlite3" in loaded.stdout.split()
    assert "sqlite_utils" not in loaded.stdout.split()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("nullworker.process", ("vastai", "requests", "rich", "cryptography", "sqlite_utils")),
        (
            "nullworker.commands",
            ("aiohttp", "cryptography", "prometheus_client", "sqlite_utils", "transitions", "vastai"),
        ),
    ],
)
def test_a_command_does_not_pay_for_what_it_does_not_use(module: str, heavy: tuple[str, ...]) -> None:
    script = f"import sys, nullworker.cli, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not set(heavy) & set(loaded)
