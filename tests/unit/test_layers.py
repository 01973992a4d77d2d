"""The import rule: a room imports only from lines below its own; rooms on one line do not know each other."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from pages import rows

PACKAGE = Path(__file__).parents[2] / "nullworker"

#: From the top down. Each room of the package stands here once.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("local", "doctor", "dispatch", "collector"),
    ("worker", "testing", "client", "consumer"),
    ("http",),
    ("autoscaler", "metrics", "session_callbacks", "consumer_health", "sink", "deadline_timer"),
    ("service",),
    ("eventlog", "readiness"),
    ("fsm", "outgoing"),
    ("settings", "logs", "processes", "control_client"),
    ("aio", "clock", "errors"),
)
LINE_OF = {room: line for line, rooms in enumerate(LAYERS) for room in rooms}

#: What users may import, by package.
FACES = {
    "nullworker.client": {
        *("HoldError", "NoAnswer", "Refused", "SessionEnded", "SessionLost", "WorkerSession"),
        *("hold", "hold_at", "hold_session"),
    },
    "nullworker.consumer": {
        *("ChildDied", "Job", "Lost", "Reservation", "ResultRefused"),
        *("drain", "health_endpoint", "reservations", "run"),
    },
    "nullworker.testing": {"FakeAutoscaler", "Fault", "Parameters", "Seen", "Totals"},
}

#: What the pure core may use of the world.
PURE = {"__future__", "collections", "itertools", "typing", "msgspec", "transitions", "nullworker"}


def imports(file: Path) -> list[str]:
    """Every import of a file as `module.name`; `nullworker.x` for `from nullworker import x`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(name: str) -> str | None:
    """The room of an import; None for the package itself and for everything else."""
    parts = name.split(".")
    return parts[1] if parts[0] == "nullworker" and len(parts) > 1 and parts[1] in LINE_OF else None


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def faults(own: str, names: list[str]) -> list[str]:
    """The imports of a file of room `own` that the layers forbid."""
    used = {name: room(name) for name in names}
    return [name for name, other in used.items() if other and other != own and LINE_OF[other] <= LINE_OF[own]]


def test_the_table_in_the_docs_is_this_one() -> None:
    lines = [tuple(re.findall(r"`(\w+)`", cells[1])) for cells in rows(ROOT / "docs" / "design.md", "| line |")]
    assert tuple(lines) == LAYERS[1:]


def test_every_room_stands_on_a_line_and_every_line_is_there() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(LINE_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_room_uses_only_the_lines_below_it(file: Path) -> None:
    names = imports(file)
    assert all(room(name) or name == "nullworker.__version__" for name in names if name.startswith("nullworker"))
    assert not faults(room_of(file), names)


@pytest.mark.parametrize(
    ("own", "name"),
    [("fsm", "nullworker.service.Service"), ("client", "nullworker.testing.keys"), ("errors", "nullworker.clock.iso")],
)
def test_an_upward_or_sideward_import_is_a_fault(own: str, name: str) -> None:
    assert faults(own, [name, "json", f"nullworker.{own}.other"]) == [name]


def test_no_room_is_part_of_a_circle_of_modules() -> None:
    """Within a room, too: imports at the top of a file, of files that import it again, depend on their order."""
    modules = {".".join(("nullworker", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    uses = {
        module: {other for name in imports(file) for other in modules if (name + ".").startswith(other + ".")}
        - {module}
        for module, file in modules.items()
    }
    while leaves := {module for module, others in uses.items() if not others & uses.keys()}:
        uses = {module: others for module, others in uses.items() if module not in leaves}
    assert not uses, f"a circle among {sorted(uses)}"


@pytest.mark.parametrize("package", FACES)
def test_a_public_package_exports_only_its_documented_names(package: str) -> None:
    assert set(importlib.import_module(package).__all__) == FACES[package]


@pytest.mark.parametrize("file", sorted((PACKAGE / "fsm").glob("*.py")), ids=lambda file: file.name)
def test_the_state_machine_is_pure(file: Path) -> None:
    for name in imports(file):
        assert name.split(".")[0] in PURE, f"{file.name} must not use {name}"
        assert not name.startswith("nullworker") or room(name) in ("fsm", "errors", None)


def test_time_is_asked_in_one_file() -> None:
    for file in FILES:
        if file.name != "clock.py" and room_of(file) not in ("testing", "cli"):
            for name in imports(file):
                assert name.split(".")[0] != "time", f"{file}: the time comes from clock.py"


@pytest.mark.process
def test_a_new_log_does_not_pay_for_migrations(tmp_path: Path) -> None:
    script = """
import pathlib, sys
from nullworker.eventlog.opening import open_log

open_log(pathlib.Path(sys.argv[1]))
print(*sys.modules)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log.db")], capture_output=True, text=True, check=True
    )
    assert "sqlite3" in loaded.stdout.split()
    assert "sqlite_utils" not in loaded.stdout.split()


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("nullworker.worker", ("vastai", "requests", "rich", "cryptography", "sqlite_utils")),
        (
            "nullworker.cli.control",
            ("aiohttp", "cryptography", "prometheus_client", "sqlite_utils", "transitions", "vastai"),
        ),
    ],
)
def test_a_command_does_not_pay_for_what_it_does_not_use(module: str, heavy: tuple[str, ...]) -> None:
    script = f"import sys, nullworker.cli.commands, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not set(heavy) & set(loaded)
