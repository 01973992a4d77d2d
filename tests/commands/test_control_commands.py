"""`nullworker status, release, extend, wait`: output for people, JSON and exit codes for scripts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import click
import pytest
from harness import PATIENCE, ROOT, WorkerProcess
from programs import Program, answered, caller, free_port, nullworker, until
from strangers import answering

from nullworker.cli.commands import cli, main

COMMANDS_HERE = ("work", "status", "release", "extend", "wait", "history", "events")


async def command(worker: WorkerProcess, *arguments: str, code: int = 0) -> str:
    """A command of `nullworker` for a worker."""
    return await nullworker(*arguments, code=code, NULL_CONTROL_PORT=str(worker.control_port))


async def as_json(worker: WorkerProcess, *arguments: str) -> list[Any]:
    """What it prints with --json."""
    return [json.loads(line) for line in (await command(worker, *arguments, "--json")).splitlines()]


async def test_status_is_a_table_or_the_workers_json(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker):
        await worker.line("reservation_held")
        (told,) = await as_json(worker, "status")
        assert told["state"] == "ready"
        table = dict(line.split(maxsplit=1) for line in (await command(worker, "status")).splitlines())
        assert table["worker"].startswith("ready, ")
        assert table["held"].startswith(f"{told['held']['id']}, a request")
        assert "the last event is 2" in table["log"]
        assert str(tmp_path) in str(told["log"]["path"])
        assert table["consumer"] == "not asked: BACKEND_HEALTH_URL is unset"
        assert (told["consumer"]["healthy"], told["instance"]) == (None, None)
        assert math.isnan(await worker.metric("nullworker_consumer_healthy"))
        assert told["settings"].items() >= {"UNSECURED": True, "NULL_LOG_FORMAT": "json"}.items()
        assert "UNSECURED=true" in table["settings"].split()


async def test_release_hands_the_result_to_the_caller(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker) as asked:
        held = (await worker.line("reservation_held"))["reservation_id"]
        (told,) = await as_json(worker, "release", held, "--result", '{"pages": 3}')
        assert told == {"released": True, "reservation_id": held}
        assert (await answered(asked))["result"] == {"pages": 3}


async def test_a_late_release_by_id_does_nothing_and_says_why(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        async with caller(worker):
            late = (await worker.line("reservation_held"))["reservation_id"]
        await worker.line("reservation_cancelled")
        async with caller(worker) as second:
            held = (await worker.line("reservation_held", nth=2))["reservation_id"]
            said = await command(worker, "release", late, code=1)
            assert said == (
                "nullworker: nothing was released: the reservation has ended: cancelled, client_disconnect\n"
            )
            assert (await worker.get("/reservation"))["id"] == held
            assert not second.done()


async def test_a_late_release_without_an_id_ends_whatever_is_held(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        async with caller(worker):
            await worker.line("reservation_held")
        await worker.line("reservation_cancelled")
        async with caller(worker) as second:
            await worker.line("reservation_held", nth=2)
            assert await command(worker, "release") == "released\n"
            assert (await answered(second))["released"] == "explicit"


async def test_release_takes_the_id_from_the_environment_of_nullworker_work(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker):
        await worker.line("reservation_held")
        env = {"NULL_CONTROL_PORT": str(worker.control_port), "NULLWORKER_RESERVATION_ID": "another"}
        assert "there is no reservation another" in await nullworker("release", code=1, **env)


async def test_a_release_that_released_nothing_has_failed(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        said = await command(worker, "release", code=1)
        assert said == "nullworker: nothing was released: no active reservation\n"


async def test_extend_moves_the_deadline(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker, duration=10):
        held = (await worker.line("reservation_held"))["reservation_id"]
        (told,) = await as_json(worker, "extend", "1000", "--id", held)
        assert told == {"reservation_id": held, "ends_at": (await worker.get("/reservation"))["ends_at"]}
        assert await command(worker, "extend", "--seconds", "5") != ""
        assert (await worker.get("/reservation"))["ends_at"] < told["ends_at"]


async def test_extend_with_nothing_held_has_failed(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        assert await command(worker, "extend", "5", code=1) == "nullworker: nothing is held\n"


async def test_wait_gives_the_reservation_when_it_comes(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        waiting = asyncio.ensure_future(as_json(worker, "wait"))
        async with caller(worker, metadata={"job": 1}):
            (told,) = await asyncio.wait_for(waiting, PATIENCE)
        assert (told["state"], told["metadata"]) == ("held", {"job": 1})


async def test_wait_outlives_a_restart_of_the_worker(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port())) as worker:
        port = str(worker.control_port)
        waits = Program(tmp_path, sys.executable, "-m", "nullworker", "wait", "--json", NULL_CONTROL_PORT=port)
        async with waits:
            await _in_a_long_poll(worker)
            await worker.kill()
            await worker.start()
            async with caller(worker):
                assert await asyncio.wait_for(waits.process.wait(), PATIENCE) == 0
        assert json.loads(waits.out.read_text())["state"] == "held"


async def test_wait_with_a_timeout_fails_when_nothing_came(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        said = await command(worker, "wait", "--timeout", "0.1", code=1)
        assert said == "nullworker: no reservation came within 0.1 s\n"


@pytest.mark.parametrize("arguments", [("status",), ("release",), ("extend", "1"), ("wait",)])
async def test_no_worker_is_one_line_that_says_what_to_do(arguments: tuple[str, ...]) -> None:
    port = free_port()
    assert await nullworker(*arguments, "--control-url", f"http://127.0.0.1:{port}", code=1) == (
        f"nullworker: no worker answers on 127.0.0.1:{port}: is it running? set NULL_CONTROL_PORT or --control-url\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("release", "--result", "{"), "--result: it is not JSON"),
        (("release", "--control-url", "https://127.0.0.1:1"), "must be http://HOST:PORT"),
        (("release", "--control-port", "0"), "--control-port"),
        (("extend",), "SECONDS is missing"),
        (("extend", "-1"), "-1"),
        (("history", "--since", "yesterday"), "must be an age"),
        (("events", "--state", "lost"), "'lost' is not one of"),
    ],
)
async def test_wrong_use_is_exit_2_and_one_line(arguments: tuple[str, ...], says: str) -> None:
    said = await nullworker(*arguments, code=2)
    assert says in said
    assert len(said.splitlines()) == 1


STATUS = ("state", "url", "version", "held", "queue", "consumer", "autoscaler", "log")
STRANGE = {
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    **{
        name: b"HTTP/1.1 %s Well\r\nConnection: close\r\n\r\n%s" % (status, body)
        for name, status, body in [
            ("html", b"200", b"<!doctype html>"),
            ("list", b"200", b"[]"),
            ("string", b"200", b'"released"'),
            ("number", b"200", b"7"),
            ("null", b"200", b"null"),
            ("nothing", b"200", b""),
            ("bytes", b"200", b"\xff"),
            ("deep", b"200", b"[" * 100_000),
            ("empty", b"200", b"{}"),
            ("other", b"200", b'{"id": 7, "status": "ok", "released": "1.0", "reservation_id": 7}'),
            ("alike", b"200", json.dumps(dict.fromkeys(STATUS)).encode()),
            ("moved", b"301", b""),
            ("not found", b"404", b'{"detail": "Not Found"}'),
            ("wrong", b"500", b"null"),
        ]
    },
}


@pytest.mark.parametrize("told", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["", "json"])
@pytest.mark.parametrize(
    "arguments", [("status",), ("release",), ("extend", "1"), ("wait", "--timeout", "0")], ids=lambda words: words[0]
)
async def test_another_program_on_the_control_port_is_recognized(
    arguments: tuple[str, ...], options: tuple[str, ...], told: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"Content-Length: (\d+)", head):
            await reader.readexactly(int(length[1]))
        writer.write(told)

    async with answering(answer) as place:
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main, [*arguments, *options, "--control-port", place.partition(":")[2]])
    assert ended.value.code == 1
    assert capsys.readouterr() == (
        "",
        f"nullworker: {place} answers, but it is not nullworker's control port:"
        " set NULL_CONTROL_PORT or --control-url\n",
    )


def test_release_imports_neither_the_server_nor_the_log() -> None:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nullworker", "release", "--control-port", "1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    ).stderr
    imported = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert "nullworker.control_client" in imported
    heavy = (
        "aiohttp",
        "asyncio",
        "msgspec",
        "structlog",
        "transitions",
        "sqlite3",
        "nullworker.eventlog.log",
        "nullworker.fsm",
    )
    assert not [name for name in imported if name.startswith(heavy)]


async def test_no_command_at_all_shows_the_help_as_it_is() -> None:
    assert await nullworker(code=2) == await nullworker("--help")


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon", ""])
async def test_invalid_seconds_are_wrong_use(seconds: str) -> None:
    said = await nullworker("extend", "--seconds", seconds, code=2)
    assert said == f"nullworker: Invalid value for '--seconds': {seconds!r} is not a number of seconds, 0 or more" + (
        ", as 90, 15m, 6h or 30d (see nullworker extend --help)\n"
    )


async def test_giving_the_seconds_twice_is_wrong_use() -> None:
    assert "give the time once" in await nullworker("extend", "5", "--seconds", "90", code=2)


async def test_every_command_is_in_the_help() -> None:
    listed = await nullworker("--help")
    for name in COMMANDS_HERE:
        assert f"\n  {name} " in listed
        assert "Usage: nullworker " + name in await nullworker(name, "--help")


def test_every_option_is_in_the_documentation() -> None:
    words = set(re.findall(r"[-\w]+", (ROOT / "docs" / "consumers.md").read_text()))
    for name in COMMANDS_HERE:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        options = {word for param in command.params if isinstance(param, click.Option) for word in param.opts}
        assert {word for word in options if word.startswith("--")} <= words


async def _in_a_long_poll(worker: WorkerProcess) -> None:
    """Wait until somebody waits for a reservation: the first question is answered, and there is a connection."""
    ours = f":{worker.control_port:04X}"

    def connected() -> bool:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(row[1].endswith(ours) and row[3] == "01" for row in rows)  # 01: established

    async with aiohttp.ClientSession() as http:
        while 'route="/reservation",status="204"' not in await (await http.get(worker.control + "/metrics")).text():
            pass
    await until(connected)
