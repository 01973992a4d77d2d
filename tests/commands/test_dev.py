"""`nullworker dev` as a process: real workers, the official client, and the failures of a fleet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import sqlite3
import sys
from functools import partial
from pathlib import Path

import click
import pytest
from fleets import Dev, health, official, reserve
from harness import PATIENCE, ROOT
from programs import nullworker, until

from nullworker.cli.dev import dev as dev_command

pytestmark = pytest.mark.slow

SLEEP = (sys.executable, "-m", "nullworker", "work", "--", "sleep")


# ---- on demand ----


async def test_twenty_reservations_by_the_official_client_on_five_workers_and_back_to_zero(tmp_path: Path) -> None:
    most = 0
    async with Dev(tmp_path, "--max-workers", "5", "--inactivity", "1", "--", *SLEEP, "0.1") as dev:
        async with official(dev) as endpoint:
            asked = [asyncio.ensure_future(reserve(endpoint, metadata={"job": job})) for job in range(20)]
            while not all(each.done() for each in asked):
                await asyncio.wait(asked, timeout=0.1)
                most = max(most, len(dev.running("serve")))
            answers = [each.result() for each in asked]
        started = sum(line.endswith(": starting") for line in dev.lines)
        await dev.line(r"worker \d+: gone", nth=started)
        await until(lambda: not dev.running("serve"))
        held = [
            job
            for worker in range(1, started + 1)
            for (job,) in dev.sql(worker, "SELECT metadata ->> 'job' FROM reservations WHERE state = 'released'")
        ]
        open_ones = [dev.sql(worker, "SELECT * FROM open_reservations") for worker in range(1, started + 1)]
    assert {answer["released"] for answer in answers} == {"consumer_exit"}
    assert sorted(held) == list(range(20))
    assert not any(open_ones)
    assert 1 < most <= 5


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("1.5", 1.5), ("15m", 900), ("-1", -1), ("x", None), ("inf", None)]
)
def test_an_inactivity_timeout_is_seconds_or_never(text: str, seconds: float | None) -> None:
    parse = partial(dev_command.make_context, "dev", ["--inactivity-timeout", text])
    if seconds is None:
        with pytest.raises(click.BadParameter, match="number of seconds"):
            parse()
    else:
        assert parse().params["inactivity_timeout"] == seconds


async def test_min_load_keeps_workers_without_any_request(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--min-load", "200", "--inactivity", "0") as dev:
        await dev.line("worker 1: ready")
        await dev.line("worker 2: ready")
        assert len(dev.running("serve")) == 2


async def test_a_cold_worker_comes_back_with_its_number_and_its_log(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--cold-workers", "1", "--inactivity", "0.5", "--", *SLEEP, "0") as dev:
        async with official(dev) as endpoint:
            await reserve(endpoint)
            await dev.line("worker 1: stopped, and kept as cold")
            await reserve(endpoint)
        assert dev.sql(1, "SELECT count(*) FROM reservations WHERE state = 'released'") == [(2,)]


# ---- what goes wrong ----


async def test_a_worker_that_is_killed_in_the_middle_is_started_again_and_the_client_is_served(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--max-workers", "1", "--", *SLEEP, "2") as dev:
        async with official(dev) as endpoint:
            asked = asyncio.ensure_future(reserve(endpoint))
            await dev.line("worker 1: held")
            (worker,) = dev.running("serve")
            os.kill(worker, signal.SIGKILL)
            await dev.line(re.escape("worker 1: dead (killed by SIGKILL; it is started again)"))
            assert (await asked)["released"] == "consumer_exit"
        await dev.line("worker 1: request 1 Cancelled")
        await dev.line("worker 1: request 1 Success")
        ends = dev.sql(1, "SELECT state, reason FROM reservations")
        assert ends == [("cancelled", "worker_restart"), ("released", "consumer_exit")]


async def test_a_worker_that_never_gets_healthy_is_replaced(tmp_path: Path) -> None:
    async with (
        health(lambda worker, _: 503 if worker == 1 else 200) as url,
        Dev(
            tmp_path,
            *("--max-workers", "1", "--loading-timeout", "4", "--", *SLEEP, "0"),
            BACKEND_HEALTH_URL=url,
            NULL_HEALTH_INTERVAL="0.2",
        ) as dev,
        official(dev) as endpoint,
    ):
        asked = asyncio.ensure_future(reserve(endpoint))
        await dev.line(re.escape("worker 1: stopping (not ready after 4 s, and replaced: see "))
        await dev.line("worker 2: ready")
        assert (await asked)["released"] == "consumer_exit"
        assert "worker 1: ready" not in dev.lines


async def test_an_errored_worker_is_replaced(tmp_path: Path) -> None:
    async with (
        health(lambda worker, nth: 503 if (worker, nth > 1) == (1, True) else 200) as url,
        Dev(tmp_path, "--min-load", "100", BACKEND_HEALTH_URL=url, NULL_HEALTH_INTERVAL="0.5") as dev,
    ):
        await dev.line(r"worker 1: errored \(.* answered 503\)")
        await dev.line(re.escape("worker 1: stopping (errored, and replaced)"))
        await dev.line("worker 2: ready")


async def test_an_errored_worker_may_finish_what_it_holds(tmp_path: Path) -> None:
    sick = asyncio.Event()
    async with (
        health(lambda worker, _: 503 if worker == 1 and sick.is_set() else 200) as url,
        Dev(tmp_path, "--", *SLEEP, "2", BACKEND_HEALTH_URL=url, NULL_HEALTH_INTERVAL="0.2") as dev,
        official(dev) as endpoint,
    ):
        asked = asyncio.ensure_future(reserve(endpoint))
        await dev.line("worker 1: held")
        sick.set()
        await dev.line("worker 1: errored")
        assert (await asked)["released"] == "consumer_exit"
        assert dev.sql(1, "SELECT state FROM reservations") == [("released",)], "here, and not elsewhere after a retry"
        await dev.line(re.escape("worker 1: stopping (errored, and replaced)"))


async def test_a_worker_that_cannot_start_is_replaced_and_its_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "logs" / "nullworker-1.db")) as conn:
        conn.execute("CREATE TABLE somebody_elses (a)")
    async with Dev(tmp_path, "--min-load", "100") as dev:
        gone = await dev.line("worker 1: gone")
        log = tmp_path / "logs" / "worker-1.log"
        assert gone == f"worker 1: gone (exit code 1 before it was ready: see {log})"
        assert "database of another program" in log.read_text()
        await dev.line("worker 2: ready")


async def test_a_consumer_that_ends_by_itself_is_started_again_and_that_is_said_once(tmp_path: Path) -> None:
    starts, script = tmp_path / "starts", "echo $NULL_CONTROL_PORT $HEALTH_PORT >> starts; exit 3"
    async with Dev(tmp_path, "--min-load", "100", "--", "/bin/sh", "-c", script) as dev:
        await until(lambda: starts.exists() and len(starts.read_text().splitlines()) >= 3)
        said = [line for line in dev.lines if "consumer" in line and "worker 1" in line]
    (ports,) = set(starts.read_text().splitlines())
    assert len(set(map(int, ports.split()))) == 2
    log = tmp_path / "logs" / "consumer-1.log"
    (once,) = [line.partition("(")[2] for line in said]
    assert once == f"its consumer has ended, exit code 3, and is started again: see {log})"


async def test_a_consumer_is_found_from_where_dev_was_called(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/sh\n")
    (tmp_path / "job.sh").chmod(0o755)
    work = (sys.executable, "-m", "nullworker", "work", "--", "./job.sh")
    async with Dev(tmp_path, "--", *work) as dev, official(dev) as endpoint:
        assert (await reserve(endpoint))["released"] == "consumer_exit"


# ---- the end ----


async def test_the_first_ctrl_c_lets_what_is_held_finish(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--", *SLEEP, "2", NULL_DRAIN_SECONDS="30") as dev, official(dev) as endpoint:
        asked = asyncio.ensure_future(reserve(endpoint))
        await dev.line("worker 1: held")
        assert await dev.end(signal.SIGINT) == 0
        assert (await asked)["released"] == "consumer_exit"
        assert dev.running() == []


async def test_the_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--", *SLEEP, "600", NULL_DRAIN_SECONDS="600") as dev, official(dev) as endpoint:
        asked = asyncio.ensure_future(reserve(endpoint))
        await dev.line("worker 1: held")
        dev.process.send_signal(signal.SIGINT)
        await dev.line("worker 1: stopping")
        assert await dev.end(signal.SIGINT) == 0
        asked.cancel()
        assert dev.sql(1, "SELECT state, reason FROM reservations") == [("cancelled", "draining")]
        assert dev.running() == []


async def test_nothing_outlives_it_when_it_is_killed(tmp_path: Path) -> None:
    async with Dev(tmp_path, "--min-load", "200", "--", *SLEEP, "600") as dev:
        await dev.line("worker 2: ready")
        dev.process.kill()
        await dev.process.wait()
        await until(lambda: not dev.running())


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (("--port", "PORT"), {}, 1, "port PORT is not free"),
        (("--port", "0"), {"MAX_RESERVATION_SECONDS": "soon"}, 2, "MAX_RESERVATION_SECONDS='soon' is not allowed"),
        (("--port", "0", "--", "no-such-command"), {}, 2, "there is no command 'no-such-command'"),
        (("--port", "0", "--target-util", "0"), {}, 2, "target-util"),
    ],
)
async def test_a_failed_start_is_one_line(
    arguments: tuple[str, ...], env: dict[str, str], code: int, words: str
) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = str(server.sockets[0].getsockname()[1])
    err = await nullworker("dev", *(argument.replace("PORT", port) for argument in arguments), code=code, **env)
    server.close()
    assert len(err.splitlines()) == 1, err
    assert words.replace("PORT", port) in err


# ---- what it shows ----


async def test_in_a_terminal_there_is_a_live_table(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            shown.extend(os.read(ours, 65536))
        except OSError:  # the last one who had it open has gone
            loop.remove_reader(ours)

    loop.add_reader(ours, read)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nullworker", "dev", "--port", "0", "--worker-port", "0", "--control-port", "0"),
        *("--min-load", "100"),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    await until(lambda: re.search(rb"\n1 +ready +\d+ s", shown) is not None)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    loop.remove_reader(ours)
    os.close(ours)
    text = shown.decode()
    assert re.search(r"worker +state +for +held by +queue +control port", text)
    assert "production scaling is done by Vast" in text
    assert os.listdir(tmp_path) == []
