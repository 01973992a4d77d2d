"""`nullworker history, events`: the log of a running and of a stopped worker, as tables and as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness import WorkerProcess
from programs import Program, answered, caller, free_port, nullworker, run, until

from nullworker.cli.commands import cli
from nullworker.cli.words import columns_of, fit, padded
from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Extended, Held, Queued


async def command(worker: WorkerProcess, *arguments: str, code: int = 0) -> str:
    """A command of `nullworker` for a worker."""
    return await nullworker(*arguments, code=code, NULL_CONTROL_PORT=str(worker.control_port))


async def as_json(worker: WorkerProcess, *arguments: str) -> list[Any]:
    """What it prints with --json."""
    return [json.loads(line) for line in (await command(worker, *arguments, "--json")).splitlines()]


async def three(worker: WorkerProcess) -> list[str]:
    """A released, an expired and a cancelled reservation; their ids."""
    async with caller(worker) as asked:
        await worker.line("reservation_held")
        await worker.release(result="done")
        await answered(asked)
    async with caller(worker, duration=0) as asked:
        await answered(asked)
    async with caller(worker):
        await worker.line("reservation_held", nth=3)
    await worker.line("reservation_cancelled")
    return [row["id"] for row in reversed((await worker.get("/reservations"))["reservations"])]


async def test_history_is_the_reservations_newest_first(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        ids = await three(worker)
        rows = await as_json(worker, "history")
        assert rows == (await worker.get("/reservations"))["reservations"]
        assert [row["id"] for row in await as_json(worker, "history", "--limit", "2")] == ids[:0:-1]
        assert [row["id"] for row in await as_json(worker, "history", "--state", "expired")] == [ids[1]]
        since = rows[0]["queued_at"]
        assert await as_json(worker, "history", "--since", since) == [row for row in rows if row["queued_at"] >= since]
        assert len(await as_json(worker, "history", "--since", "1h")) == 3
        table = (await command(worker, "history")).splitlines()
        assert table[0].split() == ["queued", "at", "(UTC)", "state", "held", "reason", "job"]
        assert [line.split()[-1] for line in table[1:]] == ids[::-1]


async def test_events_are_those_of_the_control_port(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await three(worker)
        events = await as_json(worker, "events")
        assert [event["seq"] for event in events] == list(range(1, 10))
        assert [(event["kind"], event["reason"]) for event in events] == worker.story()
        assert [event["seq"] for event in await as_json(worker, "events", "--limit", "2")] == [8, 9]
        assert [event["seq"] for event in await as_json(worker, "events", "--state", "held")] == [2, 5, 8]
        assert [event["seq"] for event in await as_json(worker, "events", "--since", events[7]["at"])][-2:] == [8, 9]
        assert len((await command(worker, "events")).splitlines()) == 10


@pytest.mark.parametrize("how", ["option", "variable", "place"])
async def test_the_log_of_a_worker_that_is_down_is_read(tmp_path: Path, how: str) -> None:
    async with WorkerProcess(tmp_path) as worker:
        ids = await three(worker)
        await worker.kill()
    where = {
        "option": (("--log", str(worker.db)), {}),
        "variable": ((), {"NULL_EVENT_LOG": str(worker.db)}),
        "place": ((), {"WORKSPACE_DIR": str(tmp_path), "CONTAINER_ID": "7"}),
    }
    if how == "place":
        for suffix in ("", "-wal", "-shm"):
            os.rename(f"{worker.db}{suffix}", f"{tmp_path}/nullworker-7.db{suffix}")
    arguments, env = where[how]
    dead = ("--control-port", str(free_port()))
    told = await nullworker("history", "--json", *arguments, *dead, code=0, **env)
    assert [json.loads(line)["id"] for line in told.splitlines()] == ids[::-1]
    assert len((await nullworker("events", "--json", *arguments, *dead, code=0, **env)).splitlines()) == 9


async def test_no_log_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    nowhere = ("--control-port", str(free_port()))
    said = await nullworker("history", *nowhere, code=1, WORKSPACE_DIR=str(tmp_path), CONTAINER_ID="7")
    assert f"there is no log {tmp_path}/nullworker-7.db: give --log PATH or NULL_EVENT_LOG\n" in said
    said = await nullworker("events", "--log", str(tmp_path / "none"), code=1)
    assert f"there is no event log to read at {tmp_path}/none" in said
    assert os.listdir(tmp_path) == []


async def test_a_log_that_is_read_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    open_log(path).close()
    before = path.read_bytes()
    assert await nullworker("history", "--json", "--log", str(path)) == ""
    assert path.read_bytes() == before


@pytest.mark.parametrize("at", [1_700_000_000.124, 1_700_000_000.1236, 1_700_000_000.1244])
async def test_the_time_of_a_row_as_it_was_shown_finds_that_row(tmp_path: Path, at: float) -> None:
    """Also of one that is finer than it is shown, as in logs of version 1."""
    path = tmp_path / "log.db"
    log = open_log(path)
    log.append([(1, Event(at, "a", "queued", None, Queued("request", 60.0, 1_700_000_030.0)))])
    log.close()
    (row,) = (await nullworker("history", "--json", "--log", str(path))).splitlines()
    shown = json.loads(row)["queued_at"]
    assert shown == "2023-11-14T22:13:20.124Z"
    assert (await nullworker("history", "--json", "--log", str(path), "--since", shown)) == row + "\n"


def test_a_state_that_is_asked_for_is_that_of_every_row_whatever_happens_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "log.db")
    terms = Queued("request", 60.0, 1_700_000_030.0)
    log.append([(1, Event(1_700_000_000.0, "a", "queued", None, terms))])
    read = queries.reservation

    def read_too_late(conn: sqlite3.Connection, reservation_id: str) -> queries.ReservationJson | None:
        log.append([(2, Event(1_700_000_001.0, "a", "expired", "queue_timeout", Ended()))])
        return read(conn, reservation_id)

    monkeypatch.setattr(queries, "reservation", read_too_late)
    said = CliRunner().invoke(cli, ["history", "--json", "--state", "queued", "--log", str(log.path)])
    assert json.loads(said.stdout)["state"] == "queued"
    log.close()


async def test_follow_goes_on_with_what_comes(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await three(worker)
        env = {"NULL_CONTROL_PORT": str(worker.control_port), "PYTHONUNBUFFERED": "1"}
        python = (sys.executable, "-m", "nullworker")
        (tmp_path / "events").mkdir()
        (tmp_path / "history").mkdir()
        async with (
            Program(tmp_path / "events", *python, "events", "-f", "--json", "--state", "held", **env) as events,
            Program(tmp_path / "history", *python, "history", "--follow", "--json", **env) as history,
        ):
            assert [event["seq"] for event in await _lines(events.out, 3)] == [2, 5, 8]
            await _lines(history.out, 3)
            async with caller(worker):
                assert [event["seq"] for event in await _lines(events.out, 4)][3:] == [11]
                rows = await _lines(history.out, 5)
                assert [row["state"] for row in rows] == ["released", "expired", "cancelled", "held", "held"]
            assert (await _lines(history.out, 6))[-1]["reason"] == "client_disconnect"


async def test_a_reader_that_goes_ends_a_command_that_follows(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await three(worker)
        first = f"{sys.executable} -m nullworker events --json --log {worker.db} | head -n 1"
        assert json.loads(await run("sh", "-c", first))["seq"] == 1


async def _lines(out: Path, count: int) -> list[Any]:
    """The lines of a file of JSON, once there are so many."""
    found: list[str] = []

    def enough() -> bool:
        found[:] = out.read_text().splitlines()
        return len(found) >= count

    await until(enough)
    return [json.loads(line) for line in found]


# -- what a person sees ------------------------------------------------------------------------------------------------

NOON = 1_767_268_800.0  # 2026-01-01T12:00:00Z
TABLE = """\
queued at (UTC)       state      held     reason         job
2026-01-01T12:01:00Z  queued     -        -              job=render-2 user=bob
2026-01-01T12:00:00Z  released   49m53s   explicit       job=render-1 user=ada
2026-01-01T11:59:00Z  expired    -        queue_timeout  aaaaaaaaaaaaaaaa
"""
WIDE_TABLE = """\
queued at (UTC)       state      held     reason         id                waited   job
2026-01-01T12:01:00Z  queued     -        -              cccccccccccccccc  -        job=render-2 user=bob
2026-01-01T12:00:00Z  released   49m53s   explicit       bbbbbbbbbbbbbbbb  2.0s     job=render-1 user=ada
2026-01-01T11:59:00Z  expired    -        queue_timeout  aaaaaaaaaaaaaaaa  30.0s    aaaaaaaaaaaaaaaa
"""
EVENTS = """\
seq    at (UTC)              event      what                 job
1      2026-01-01T11:59:00Z  queued     request up to 1m00s  aaaaaaaaaaaaaaaa
2      2026-01-01T11:59:30Z  expired    queue_timeout        aaaaaaaaaaaaaaaa
3      2026-01-01T12:00:00Z  queued     request up to 1h00m  job=render-1 user=…
4      2026-01-01T12:00:02Z  held       until 13:00:02       job=render-1 user=…
5      2026-01-01T12:10:00Z  extended   until 01-02T00:10    job=render-1 user=…
6      2026-01-01T12:49:55Z  released   explicit             job=render-1 user=…
7      2026-01-01T12:01:00Z  queued     request up to 1m00s  job=render-2 user=…
"""


def told_log(path: Path) -> Path:
    """A log with a reservation that waited too long, one that was released, and one that waits."""
    with contextlib.closing(open_log(path)) as log:
        history = [
            Event(NOON - 60, "a" * 16, "queued", None, Queued("request", 60.0, NOON - 30)),
            Event(NOON - 30, "a" * 16, "expired", "queue_timeout", Ended()),
            Event(NOON, "b" * 16, "queued", None, Queued("request", 3600.0, NOON + 30, metadata=METADATA)),
            Event(NOON + 2, "b" * 16, "held", None, Held(NOON + 3602)),
            Event(NOON + 600, "b" * 16, "extended", "extend", Extended(NOON + 43_800)),
            Event(NOON + 2995, "b" * 16, "released", "explicit", Ended(result={"pages": 3})),
            Event(NOON + 60, "c" * 16, "queued", None, Queued("request", 60.0, NOON + 90, metadata=OTHER)),
        ]
        log.append(list(enumerate(history, 1)))
    return path


METADATA, OTHER = {"job": "render-1", "user": "ada"}, {"job": "render-2", "user": "bob"}


async def test_the_tables_fit_their_terminal_and_name_the_job(tmp_path: Path) -> None:
    log = ("--log", str(told_log(tmp_path / "log.db")))
    assert await nullworker("history", *log) == TABLE
    assert await nullworker("history", *log, COLUMNS="130") == WIDE_TABLE
    assert await nullworker("events", *log) == EVENTS


async def test_a_table_of_wide_characters_fits_too(tmp_path: Path) -> None:
    job = Queued("request", 60.0, NOON, metadata={"job": "日本語" * 20})
    with contextlib.closing(open_log(tmp_path / "log.db")) as log:
        log.append([(1, Event(NOON, "a" * 16, "queued", None, job))])
    for command in ("history", "events"):
        row = (await nullworker(command, "--log", str(tmp_path / "log.db"))).splitlines()[1]
        (cut,) = re.findall("job=[日本語]+…", row)
        assert len(row) + len(cut) - len("job=…") in (79, 80)


@pytest.mark.parametrize(
    ("text", "columns", "cut"),
    [
        ("abcde", 5, "abcde"),
        ("abcdef", 5, "abcd…"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301e\u0301"),
        ("e\u0301e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301…"),
    ],
)
def test_a_cell_is_cut_and_filled_by_the_columns_that_a_terminal_gives_it(text: str, columns: int, cut: str) -> None:
    assert fit(text, columns) == cut
    assert padded(cut, 8) == cut + " " * (8 - columns_of(cut))
    assert columns_of(padded(cut, 8)) == 8


async def test_a_job_is_found_by_its_metadata(tmp_path: Path) -> None:
    log = ("--log", str(told_log(tmp_path / "log.db")))
    for text in ("render-1", "ada", "job=render-1 user", '"user": "ada"'):
        (line,) = (await nullworker("history", "--json", "--job", text, "--limit", "1", *log)).splitlines()
        assert json.loads(line)["id"] == "b" * 16
        seqs = [
            json.loads(each)["seq"] for each in (await nullworker("events", "--json", "--job", text, *log)).splitlines()
        ]
        assert seqs == [3, 4, 5, 6]
    assert await nullworker("history", "--json", "--job", "aaaa", *log) == ""


async def test_several_logs_are_one_table_and_a_column_says_which(tmp_path: Path) -> None:
    for name in ("nullworker-7.db", "nullworker-8.db"):
        told_log(tmp_path / name)
    logs = [word for name in ("nullworker-7.db", "nullworker-8.db") for word in ("--log", str(tmp_path / name))]
    rows = [json.loads(line) for line in (await nullworker("history", "--json", *logs, "--limit", "4")).splitlines()]
    assert [(row["log"], row["id"][0]) for row in rows] == [
        (name, each) for each in "cb" for name in ("nullworker-7.db", "nullworker-8.db")
    ]
    for command in ("history", "events"):
        lines = (await nullworker(command, *logs)).splitlines()
        assert lines[0].startswith("log         ")
        assert {line.split()[0] for line in lines[1:]} == {"…rker-7.db", "…rker-8.db"}
        assert max(map(len, lines)) <= 80
        assert sum("job=rend" in line for line in lines) == (4 if command == "history" else 10)
    folders = [word for each in "78" for word in ("--log", str(told_log(folder(tmp_path / each) / "log.db")))]
    told = await nullworker("history", "--json", *folders)
    assert {json.loads(line)["log"] for line in told.splitlines()} == {"7", "8"}


def folder(path: Path) -> Path:
    path.mkdir()
    return path


async def test_a_terminal_obeys_nothing_that_a_caller_has_sent(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker, metadata={"job": "\x1b]0;taken\x07\n\u202e"}):
        await worker.line("reservation_held")
        for command in ("history", "events", "status"):
            said = await nullworker(command, NULL_CONTROL_PORT=str(worker.control_port))
            assert "job=\N{REPLACEMENT CHARACTER}]0;taken" in said
            assert not set(said) & set("\x1b\x07\u202e")


async def test_a_log_that_is_replaced_is_followed_from_its_first_event(tmp_path: Path) -> None:
    path = told_log(tmp_path / "log.db")
    python = (sys.executable, "-m", "nullworker")
    (tmp_path / "events").mkdir()
    arguments = ("events", "-f", "--json", "--log", str(path))
    async with Program(tmp_path / "events", *python, *arguments, PYTHONUNBUFFERED="1") as events:
        await _lines(events.out, 7)
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{path}.before{suffix}")
        with contextlib.closing(open_log(path)) as log:
            log.append([(1, Event(NOON, "n" * 16, "queued", None, Queued("request", 60.0, NOON + 30)))])
            assert [event["reservation_id"][0] for event in (await _lines(events.out, 8))[6:]] == ["c", "n"]
            log.append([(2, Event(NOON, "n" * 16, "held", None, Held(NOON + 60)))])
            assert (await _lines(events.out, 9))[-1]["seq"] == 2


@pytest.mark.parametrize("unfolded", [False, True], ids=["closed", "killed"])
async def test_a_log_on_a_read_only_disk_is_read(tmp_path: Path, unfolded: bool) -> None:
    """Also one whose worker was killed: its last events are in the -wal."""
    (tmp_path / "disk").mkdir()
    path = tmp_path / "disk" / "log.db"
    if unfolded:
        async with WorkerProcess(tmp_path, NULL_EVENT_LOG=str(path)) as worker:
            async with caller(worker, metadata=METADATA):
                await worker.line("reservation_held")
            await worker.line("reservation_cancelled")
            await worker.kill()
        os.unlink(f"{path}-shm")
        assert os.stat(f"{path}-wal").st_size > 0
    else:
        told_log(path)
    before = sorted(os.listdir(path.parent))
    script = f"""
        cd {tmp_path}
        mount --bind disk disk && mount -o remount,bind,ro disk && ! touch disk/x 2>/dev/null
        exec {sys.executable} -m nullworker history --json --log disk/log.db --job ada
    """
    told = await run("unshare", "-rm", "sh", "-ec", script)
    assert json.loads(told)["metadata"] == METADATA
    assert sorted(os.listdir(path.parent)) == before
