"""The docs, checked against the code: commands run, and every setting, route, metric, kind and command is listed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness import ROOT, WorkerProcess
from pages import BOUNDARY, DOCS, README, blocks, check, files, rows, shell
from programs import caller, free_port, session

from nullworker.cli.commands import COMMANDS, cli
from nullworker.cli.serve import _option_name, _shown
from nullworker.errors import CannotStart
from nullworker.eventlog.opening import open_log
from nullworker.fsm.table import EDGES
from nullworker.settings import Settings, variable

OPENAPI: dict[str, Any] = json.loads((ROOT / "nullworker" / "http" / "openapi.json").read_text())
PAGES = [path for path in files() if path.suffix == ".md"]
#: Statuses that mean the same on every route; they stand in the table of errors alone.
COMMON = {"400", "403", "408", "413", "415", "422", "500"}


# -- commands that run -------------------------------------------------------------------------------------------


async def test_examples_of_the_http_api_answer_as_shown(tmp_path: Path) -> None:
    page = [block for block in blocks(DOCS / "http-api.md") if block.language in ("sh", "http", "json", "text")]
    script = "".join(f"{text}printf '\\n%s\\n' '{BOUNDARY}'\n" for language, text in page if language == "sh")
    async with WorkerProcess(tmp_path, WORKER_HTTP_PORT=str(free_port())) as worker:
        for shown, port in (
            ("3000", worker.port),
            ("3001", worker.env["WORKER_HTTP_PORT"]),
            ("18999", worker.control_port),
        ):
            script = script.replace(f"http://127.0.0.1:{shown}/", f"http://127.0.0.1:{port}/")
        told = (await shell(script, tmp_path)).split(f"\n{BOUNDARY}\n")
    answers = 0
    for block in page:
        if block.language == "sh":
            last = told.pop(0)
        else:
            check(block, last)
            answers += 1
    assert told == [""]
    assert answers > 20


async def test_commands_of_the_readme_run_as_written(tmp_path: Path) -> None:
    *first, log, page_end = "".join(text for language, text in blocks(README) if language == "sh").splitlines()
    assert log.startswith("sqlite3")
    external, control, session_end = free_port(), free_port(), free_port()
    script = "\n".join((*first, "wait %2", log, page_end))
    script = script.replace("nullworker serve", f"{sys.executable} -m nullworker serve")
    script = script.replace(":3000/", f":{external}/").replace(":18999/", f":{control}/")
    # what a person waits for, however long this machine takes for it
    waits = {"sleep 2": f"127.0.0.1:{control}/readyz", "sleep 1": f"127.0.0.1:{control}/reservation?wait=20"}
    for sleep, url in waits.items():
        assert script.count(sleep) == 1
        script = script.replace(sleep, f"curl -s -o waited --retry 40 --retry-connrefused --retry-delay 1 '{url}'")
    ports = {"WORKER_PORT": external, "NULL_CONTROL_PORT": control, "WORKER_HTTP_PORT": session_end}
    told = await shell(script, tmp_path, **{name: str(port) for name, port in ports.items()})
    answers, table = [], told
    while table.startswith("{"):  # the two that end at the same time come in either order
        answer, end = json.JSONDecoder().raw_decode(table)
        answers.append(answer)
        table = table[end:].lstrip()
    (held, *ends) = answers
    assert (held["state"], held["metadata"]) == ("held", {"job": "42"})
    (verdict,) = [answer for answer in ends if answer != {"released": True}]
    assert {"released": "explicit", "duration_cap": 600}.items() <= verdict.items()
    assert re.search(r"│ released │ explicit │ [\d.]+ +│ {\"job\":\"42\"} │", table)


# -- lists that are complete -------------------------------------------------------------------------------------


def test_readme_lists_every_setting_with_its_default() -> None:
    told = {name.strip("`"): default for name, default, _ in rows(README, "| variable |")}
    assert list(told) == [variable(field.name) for field in dataclasses.fields(Settings)]
    usage = " ".join(CliRunner().invoke(cli, ["serve", "--help"]).output.split())
    for field in dataclasses.fields(Settings):
        name = variable(field.name)
        default = "unset" if field.default is None else _shown(field.default)
        assert f"{_option_name(field.name)} {field.metadata['kind'].metavar} {field.metadata['help']}" in usage
        assert f"[env: {name}; default: {default}]" in usage
        if name not in ("NULL_EVENT_LOG", "WORKER_HTTP_PORT", "VAST_TCP_PORT_<WORKER_PORT>"):  # made from others
            assert told[name].strip("`") == {'""': "empty"}.get(default, default)


def test_readme_lists_every_command() -> None:
    assert sorted(cells[0].split()[1].strip("`") for cells in rows(README, "| command |")) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    told = CliRunner().invoke(cli, [command, "--help"])
    assert (told.exit_code, told.exception) == (0, None)
    assert told.output.startswith("Usage: ")


def test_http_api_has_every_route_with_every_status() -> None:
    page = (DOCS / "http-api.md").read_text()
    sections = dict(re.findall(r"^### ((?:GET|POST) /\S*)$(.*?)(?=^##+ |\Z)", page, re.MULTILINE | re.DOTALL))
    statuses = set()
    for path, item in OPENAPI["paths"].items():
        for method in item.keys() - {"servers"}:
            route = f"{method.upper()} {path}"
            text = sections.pop(route, "")
            assert text or re.search(rf"{re.escape(route)}\b", page), route
            answers = set(item[method]["responses"])
            statuses |= answers
            assert not text or answers - COMMON <= set(re.findall(r"\b\d{3}\b", text)), route
    assert not sections, "routes that are none"
    assert {status for status in statuses if status >= "400"} <= {
        cells[0] for cells in rows(DOCS / "http-api.md", "| status | when |")
    }


# -- the event log -----------------------------------------------------------------------------------------------


def test_event_log_has_every_kind_and_reason_with_its_edge() -> None:
    told = [
        tuple(cell.strip("`") or None for cell in cells[:6])
        for cells in rows(DOCS / "event-log.md", "| kind | reason |")
    ]
    edges = [(e.event, e.reason, e.source, e.target, e.status and str(e.status), e.outcome) for e in EDGES]
    assert sorted(map(str, told)) == sorted(map(str, [("queued", None, None, "queued", None, None), *edges]))


def test_event_log_has_every_table_and_column(tmp_path: Path) -> None:
    page = DOCS / "event-log.md"
    told = {cells[0].strip("`"): re.findall(r"`(\w+)`", cells[1]) for cells in rows(page, "| table |")}
    for heads in ("`events` and `timeline`", "`reservations` and `open_reservations`", "`daily`"):
        columns = [cells[0].strip("`") for cells in rows(page, f"| column of {heads} |")]
        told |= {name: columns for name in re.findall(r"\w+_?\w+", heads) if name != "and"}
    with contextlib.closing(open_log(tmp_path / "nullworker.db")) as log:
        names = [name for (name,) in log.conn.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")]
        assert told == {name: [row[1] for row in log.conn.execute(f"PRAGMA table_info({name})")] for name in names}


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.glob("nullworker.db*")}


async def test_what_event_log_asks_of_a_live_log_is_answered(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, NULL_LOG_SYNC="normal") as worker:
        async with caller(worker, metadata={"job": "42"}) as answer:
            await worker.get("/reservation?wait=20")
            await worker.release()
            await answer
        await session(worker)
        for language, text in blocks(DOCS / "event-log.md"):
            if language == "sql":
                with contextlib.closing(sqlite3.connect(f"{worker.db.as_uri()}?mode=ro", uri=True)) as conn:
                    assert conn.execute(text).fetchall(), text
            elif language == "sql refused":
                with contextlib.closing(sqlite3.connect(worker.db)) as conn, pytest.raises(sqlite3.IntegrityError):
                    conn.execute(text)
            elif language == "sh":
                await shell(text, tmp_path)
            else:
                assert language == "python"
                (tmp_path / "read.py").write_text(text)
                assert "explicit" in await shell(f"{sys.executable} read.py", tmp_path)
        with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
            assert copy.execute("SELECT count(*) FROM reservations").fetchone() == (2,)
        assert worker.story()[-1] == ("held", None)
        assert modes(tmp_path) == {f"nullworker.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", ".lock")}


# -- operating ---------------------------------------------------------------------------------------------------


async def test_a_log_that_is_restored_as_written_goes_on_from_the_copy(tmp_path: Path) -> None:
    page = dict(blocks(DOCS / "operating.md"))
    async with WorkerProcess(tmp_path) as worker:
        open_session = await session(worker)
        async with caller(worker) as answer:
            await worker.line("reservation_queued", nth=2)
            await shell(page["sh backup"], tmp_path)
            await worker.release()
            await worker.release()
            await answer
        await worker.kill()
        await shell(page["sh restore"], tmp_path)
        assert modes(tmp_path / "before").keys() > {"nullworker.db", "nullworker.db-wal"}
        await worker.start()
        assert worker.story() == [("queued", None), ("held", None), ("queued", None), ("cancelled", "worker_restart")]
        assert (await worker.get("/reservation"))["id"] == open_session
        assert set(modes(tmp_path).values()) | {(tmp_path / "copy.db").stat().st_mode & 0o777} == {0o600}


def test_a_log_of_a_newer_version_is_refused_in_the_words_that_are_shown(tmp_path: Path) -> None:
    (shown,) = [text for language, text in blocks(DOCS / "operating.md") if language == "text"]
    with contextlib.closing(open_log(tmp_path / "nullworker.db")) as log:
        log.conn.execute("PRAGMA user_version = 2")
    with pytest.raises(CannotStart) as refusal:
        open_log(tmp_path / "nullworker.db")
    assert str(refusal.value).replace(f"{tmp_path}/", "") == shown.strip()


# -- the repository ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a link may point to in a page, as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_no_page_and_no_docstring_has_a_ritual_heading() -> None:
    """House style: the first line says what a file is for, then its invariant, and no headings such as these."""
    headings = re.compile("|".join(("The one" + " rule", "One" + " rule", "What it leaves" + " out", "Left" + " out:")))
    for path in files():
        if path.suffix in (".py", ".md", ".js"):
            assert headings.search(path.read_text()) is None, path


def test_requirements_txt_and_pyproject_list_the_same_dependencies() -> None:
    (listed,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert re.findall(r'^ +"([^"]+)"', listed, re.MULTILINE) == [line for line in lines if not line.startswith("#")]


def test_no_file_contains_a_path_of_a_developers_machine() -> None:
    words = (
        re.escape(str(ROOT)),
        r"(?<![\w.$}])/(?:wo" + r"rk|op" + "t/pypi)/",
        "(?:extra-)?index-" + "url",
        "find-" + "links",
    )
    for path in files():
        found = re.search("|".join(words).encode(), path.read_bytes())
        assert found is None, (path, found)


def tools(folder: Path, **env: str) -> list[str]:
    """What .ci/tools says, and asks sudo for, on a new Debian machine."""
    for name in ("bash", "find", "sort", "comm"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, does in {"id": "echo 1000", "sudo": "echo sudo $* >&2", "apt-get": "", "systemctl": ""}.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    told = subprocess.run(
        [folder / "bash", ROOT / ".ci" / "tools"], env={"PATH": str(folder), **env}, capture_output=True, text=True
    )
    assert told.returncode == 0, told
    return told.stderr.splitlines()


def test_what_the_tests_need_is_named_before_it_is_installed(tmp_path: Path) -> None:
    what, how, *done = tools(tmp_path)
    assert {"redis-server", "prometheus", "chromium"} <= set(what.split())
    assert "make test TOOLS=no" in how
    asked = [line for line in done if "install" in line]
    assert [set(line.split()) & {"apt-get", "chromium"} for line in asked] == [{"apt-get", "chromium"}]
    if not Path("/usr/sbin/policy-rc.d").exists():  # one that is there already is left alone
        assert "exit 101" in "".join(done[: done.index("sudo apt-get update -qq")])
        assert done[-1] == "sudo rm -f /usr/sbin/policy-rc.d"


def test_nothing_is_installed_when_it_is_not_wanted(tmp_path: Path) -> None:
    assert not [line for line in tools(tmp_path, TOOLS="no") if line.startswith("sudo")]
