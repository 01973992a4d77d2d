"""`nullworker dispatch` as a process: a queue that is drained, kills, limits, and what it says."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from dispatching import Dispatch, fleet
from harness import PATIENCE, anew
from programs import Program, free_port, nullworker, python_path, run

from nullworker.testing import FakeAutoscaler

pytestmark = pytest.mark.slow

FAST = ("--interval", "0.5", "--settle", "2", "--attach", "0", "--lifetime", "20")


async def until(what: Any, seconds: float = 3 * PATIENCE) -> None:
    for _ in range(int(seconds / 0.1)):
        if what():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


async def test_a_queue_is_drained_with_one_hold_for_each_job_and_the_fleet_goes_to_zero(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (jobs, dev):
        jobs.put(8, 0.3)
        options = ("--queue", jobs.url, "--max", "3", "--metadata", '{"team": "blue"}', *FAST)
        async with Dispatch(tmp_path, dev, *options) as dispatch:
            await until(lambda: jobs.states() == {"done": 8} and not dispatch.rows("SELECT * FROM open_claims"))
            status, told = await dispatch.ask("/status")  # its last decision may be of before the last job was taken
            assert status == 200
            assert (told["claims"], told["endpoint"]) == ([], "null")
            assert (await dispatch.ask("/readyz"))[0] == 200
            metrics = (await dispatch.ask("/metrics"))[1]
            await until(lambda: not dev.running("serve"))
            assert await dispatch.terminate() == 0
        held = [row for row in dispatch.rows() if row["held_at"]]
        assert len(held) == 8
        assert {row["reason"] for row in held} == {"consumer_exit"}
        assert {(row["state"], row["result"]) for row in held} == {("ended", '{"exit_code":0}')}
        assert all(f'"team":"blue","claim":"{row["id"]}"' in row["metadata"] for row in held)
        assert all(row["instance"] for row in held)
        assert 0.4 in {row["price"] for row in held}
        (day,) = dispatch.rows("SELECT * FROM daily")
        assert (day["held"], day["open"]) == (8, 0)
        assert day["hours"] > 0
        logs = [dev.sql(int(n), "SELECT id FROM reservations") for n in _workers(tmp_path)]
        assert {row["session_id"] for row in held} == {id_ for rows in logs for (id_,) in rows}
    assert 'nullworker_dispatch_ended_total{reason="consumer_exit"} 8.0' in metrics
    assert 'nullworker_dispatch_claims{state="held"} 0.0' in metrics
    assert await run("sh", "-c", f"printf '%s' {_quoted(metrics)} | promtool check metrics") == ""


async def test_a_killed_dispatcher_goes_on_and_sigterm_leaves_what_is_held(tmp_path: Path) -> None:
    # a worker that is gone before the next start could not tell of what it had held
    async with fleet(tmp_path, "--inactivity", "30") as (jobs, dev):
        jobs.put(2, 6.0)
        jobs.put(4, 0.3)
        async with Dispatch(tmp_path, dev, "--queue", jobs.url, "--max", "3", *FAST) as dispatch:
            await dispatch.line("claim_held", nth=2)
            await dispatch.kill()
            await dispatch.start()
            await dispatch.line("claim_adopted", nth=2, where=lambda line: line["state"] == "held")
            assert await dispatch.terminate() == 0
            assert (await dispatch.line("dispatcher_stopped"))["message"] == "sessions stay held"
            await dispatch.start()
            await until(lambda: jobs.states() == {"done": 6} and not dispatch.rows("SELECT * FROM open_claims"))
        held = [row for row in dispatch.rows() if row["held_at"]]
        assert len(held) == 6
        with jobs.opened() as conn:
            assert conn.execute("SELECT DISTINCT runs FROM jobs").fetchall() == [(1,)]


async def test_a_signal_as_soon_as_the_port_is_open_is_a_stop_in_order(tmp_path: Path) -> None:
    path = python_path(
        tmp_path,
        "import os, signal, nullworker.http.sockets as sockets\n"
        "listen = sockets.listen\n"
        "def stopped_at_once(*arguments, **named):\n"
        "    listener = listen(*arguments, **named)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return listener\n"
        "sockets.listen = stopped_at_once\n",
    )
    queue = ("--command", "echo 0 0", "--max", "1")
    dispatch = Dispatch(tmp_path, "http://127.0.0.1:1", *queue, PYTHONPATH=path)
    await dispatch.spawn()
    assert await dispatch.exit_code() == 0
    assert dispatch.lines[-1]["event"] == "dispatcher_stopped"


async def test_end_all_ends_what_is_held_and_a_second_dispatcher_is_refused(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (jobs, dev):
        jobs.put(2, 60.0)
        async with Dispatch(tmp_path, dev, "--queue", jobs.url, "--max", "2", *FAST) as dispatch:
            await dispatch.line("claim_held", nth=2)
            common = ("dispatch", "--endpoint", "null", "--autoscaler", dev.url, "--ledger", str(dispatch.ledger))
            said = await nullworker(*common, "--end-all", code=1)
            assert f"belongs to a dispatcher that is running: pid {dispatch.process.pid}" in said
            assert await dispatch.terminate() == 0
        await nullworker(*common, "--end-all")
        assert [(row["state"], row["reason"]) for row in dispatch.rows()] == [("ended", "end_all")] * 2
        assert dispatch.rows("SELECT * FROM credentials") == []
        await nullworker(*common, "--end-all")  # there is nothing to end


async def test_consumers_that_release_at_once_do_not_cost_a_machine_after_another(tmp_path: Path) -> None:
    """`echo 0 1`: one stale entry in `jobs:busy`, and `echo 5 0`: jobs that no consumer takes."""
    async with fleet(tmp_path, max_workers=2) as (jobs, dev):
        for name, command in (("stale", "echo 0 1"), ("untaken", "echo 5 0")):
            folder = tmp_path / name
            folder.mkdir()
            fast = ("--interval", "0.5", "--settle", "1", "--attach", "0")
            async with Dispatch(folder, dev, "--command", command, "--max", "2", *fast) as dispatch:
                await dispatch.line("decided", where=lambda line: line["pause_seconds"] >= 2)
                held = [row for row in dispatch.rows() if row["held_at"]]
            # of one, or of two, that pause for 0.5, 1 and 2 s
            assert len(held) <= (3 if name == "stale" else 6)
        assert jobs.states() == {}


async def test_a_limit_opens_nothing_more_and_says_when_it_will(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (jobs, dev):
        jobs.put(3, 30.0)
        limit = ("--max-hours-per-day", "0.006", "--lifetime", "20", "--interval", "0.5", "--attach", "0")  # 22 s
        async with Dispatch(
            tmp_path, dev, "--queue", jobs.url, "--max", "3", "--price", "36", "--at-limit", "end", *limit
        ) as dispatch:
            line = await dispatch.line("limit_reached")
            assert line["why"] == "--max-hours-per-day"
            assert line["opens_again_at"] == "when a claim that waits for a worker is over"
            await until(lambda: dispatch.rows() and not dispatch.rows("SELECT * FROM open_claims"))
            held = [row for row in dispatch.rows() if row["held_at"]]
            assert {row["reason"] for row in held} == {"limit"}
            assert all(row["dollars"] == pytest.approx(row["held_seconds"] / 100, rel=0.01) for row in held)
            assert 20 <= sum(row["held_seconds"] for row in held) <= 32
            limit_now = (await dispatch.ask("/status"))[1]["limit"]
            assert limit_now["reached"] == "hours"
            assert re.match(r"20\d\d-", limit_now["opens_again_at"])


async def test_a_queue_that_cannot_be_read_opens_nothing_and_ends_nothing(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (jobs, dev):
        jobs.put(1, 5.0)
        async with Dispatch(tmp_path, dev, "--queue", jobs.url, "--max", "3", *FAST) as dispatch:
            await dispatch.line("claim_held")
            jobs.hide()
            line = await dispatch.line("queue_unreadable")
            assert "no such table: counts" in line["why"]
            status, ready = await dispatch.ask("/readyz")
            assert (status, ready["checks"]["queue"]["ok"]) == (503, False)
            assert len(dispatch.rows("SELECT * FROM open_claims")) == 1
            jobs.show()
            await dispatch.line("queue_unreadable_over")
            await until(lambda: jobs.states() == {"done": 1})
            assert len(dispatch.rows()) == 1


async def test_an_autoscaler_that_is_down_is_waited_for_and_a_claim_without_a_worker_is_an_alarm(
    tmp_path: Path,
) -> None:
    port = free_port()
    options = ("--command", "echo 1", "--max", "2", "--interval", "0.3", "--stall", "1")
    async with Dispatch(tmp_path, f"http://127.0.0.1:{port}", *options) as dispatch:
        await dispatch.line("autoscaler_unreachable")
        await dispatch.line("claim_pending")
        stalled = await dispatch.line("stalled")
        assert "max_workers or min_load" in stalled["message"]
        assert "nullworker_dispatch_stalled 1.0" in (await dispatch.ask("/metrics"))[1]
        async with FakeAutoscaler(port):
            await dispatch.line("endpoint_found")
        assert await dispatch.terminate() == 0
    assert [row["state"] for row in dispatch.rows()] == ["pending"]
    async with FakeAutoscaler(port):
        said = await nullworker(
            *("dispatch", "--endpoint", "nul", "--autoscaler", f"http://127.0.0.1:{port}", "--port", "0"),
            *("--command", "echo 1", "--max", "1", "--ledger", str(tmp_path / "other.db")),
            code=1,
        )
    assert "no endpoint named 'nul'" in said.splitlines()[-1]


async def test_the_queue_comes_from_the_environment_and_no_secret_is_said(tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://me:hunter2@127.0.0.1:{port}/0?list=jobs"
    async with FakeAutoscaler(api_key="sesame") as vast:
        env = {"NULL_QUEUE": url, "NULL_DISPATCH_MAX": "1", "VAST_API_KEY": "sesame", "NULL_DISPATCH_INTERVAL": "0.2"}
        env["NULL_DISPATCH_MAX_HOURS_A_DAY"] = "8"
        async with anew(Dispatch(tmp_path, vast.url, **env)) as dispatch:
            line = await dispatch.line("queue_unreadable")
            assert line["why"].startswith(f"redis://127.0.0.1:{port}/0?list=jobs cannot be read")
            shown = (await dispatch.ask("/status"))[1]
            assert shown["queue"] == f"redis://127.0.0.1:{port}/0?list=jobs"
            misspelled = await dispatch.line("unknown_setting")
            assert (misspelled["level"], misspelled["nearest"]) == ("warning", "NULL_DISPATCH_MAX_HOURS_PER_DAY")
            argv = await run("cat", f"/proc/{dispatch.process.pid}/cmdline")
            for text in (str(dispatch.lines), str(shown), argv):
                assert "hunter2" not in text
                assert "sesame" not in text
    assert b"hunter2" not in dispatch.ledger.read_bytes()


async def test_only_this_machine_reads_the_port(tmp_path: Path) -> None:
    async with FakeAutoscaler() as vast, Dispatch(tmp_path, vast.url, "--command", "echo 0", "--max", "1") as dispatch:
        port = (await dispatch.line("dispatcher_started"))["port"]
        for header in ("Host: evil.example", "Origin: https://evil.example"):
            command = ("curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-H", header)
            assert await run(*command, f"http://127.0.0.1:{port}/status") == "403"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "missing: an API key (VAST_API_KEY, or --api-key), --max N, --queue URL or --command CMD"),
        (("--command", "echo 1", "--max", "1"), "missing: an API key (VAST_API_KEY, or --api-key)"),
        (("--autoscaler", "x", "--command", "echo 1", "--max", "1"), "--autoscaler must be as http://HOST:PORT"),
        (("--autoscaler", "http://h", "--command", "echo 1"), "missing: --max N"),
        (("--autoscaler", "http://h", "--max", "1"), "missing: --queue URL or --command CMD"),
        (("--autoscaler", "http://h", "--max", "1", "--queue", "x", "--command", "x"), "not both"),
        (("--autoscaler", "http://h", "--max", "1", "--queue", "x://h"), "must begin with one of redis://"),
        (("--autoscaler", "http://h", "--max", "1", "--min", "2", "--command", "x"), "--min 2 is more than --max 1"),
        (("--autoscaler", "http://h", "--max", "0", "--command", "x"), "--max"),
        (("--autoscaler", "http://h", "--max", "1", "--command", "x", "--interval", "0"), "more than 0"),
        (("--autoscaler", "http://h", "--max", "1", "--command", "x", "--price", "nan"), "'nan' is not a number"),
        (("--autoscaler", "http://h", "--max", "1", "--command", "x", "--cost", "1000001"), "0<x<=1000000"),
        (("--autoscaler", "http://h", "--max", "1", "--command", "x", "--lifetime", "soon"), "15m, 6h or 30d"),
        (("--autoscaler", "http://h", "--max", "1", "--command", "x", "--metadata", "[]"), "not a JSON object"),
        (
            ("--autoscaler", "http://h", "--max", "1", "--command", "x", "--metadata", '{"a": "%s"}' % ("x" * 5000)),
            "4032",
        ),
    ],
)
async def test_wrong_use_is_exit_code_2_and_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    ledger = str(tmp_path / "ledger.db")
    told = await nullworker("dispatch", "--endpoint", "null", "--ledger", ledger, *arguments, code=2)
    assert said in told
    assert len(told.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def _workers(folder: Path) -> list[str]:
    found = (re.fullmatch(r"nullworker-(\d+)\.db", path.name) for path in (folder / "logs").iterdir())
    return [match[1] for match in found if match]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


async def test_it_may_open_as_many_files_as_the_machine_lets_it_for_each_session_has_a_connection(
    tmp_path: Path,
) -> None:
    words = (
        "--endpoint",
        "null",
        "--command",
        "echo 0",
        "--max",
        "1",
        "--port",
        "0",
        "--autoscaler",
        "http://127.0.0.1:1",
    )
    limited = ("sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh", sys.executable, "-m", "nullworker", "dispatch", *words)
    async with Program(tmp_path, *limited, NULL_LOG_FORMAT="json", PYTHONWARNINGS="default") as dispatch:
        await dispatch.line("dispatcher_started")
        soft, hard = psutil.Process(dispatch.process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert soft == hard > 256
