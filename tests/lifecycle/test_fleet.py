"""A worker and a collector, as processes: what outlives the machine, and what the sink never costs the worker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from collectors import CollectorProcess, event, hold
from harness import ROOT, WorkerProcess
from programs import Program, caller, dead_address, nullworker, session, until
from receivers import Receiver

from nullworker.clock import wall

TOKEN = "t0ken-of-the-fleet"


def fleet_worker(folder: Path, sink: str, **env: str) -> WorkerProcess:
    """A worker that sends its events there."""
    own: Any = {"CONTAINER_ID": "7", "UNSECURED": "true", "REPORT_ADDR": dead_address(), "NULL_SINK": sink, **env}
    return WorkerProcess(folder, **own)


async def hold_once(worker: WorkerProcess, **metadata: Any) -> None:
    """A reservation that is held and released."""
    async with caller(worker, metadata=metadata) as answer:
        await worker.get("/reservation?wait=20")
        await worker.release(result={"exit_code": 0}, reservation_id=(await worker.get("/reservation"))["id"])
        await answer


def told(collector: CollectorProcess) -> list[tuple[Any, ...]]:
    return collector.sql("SELECT log_seq, at, reservation_id, kind, reason FROM events ORDER BY seq")


async def test_fleet_database_has_what_the_worker_had_when_its_machine_is_gone(tmp_path: Path) -> None:
    machine = tmp_path / "machine"
    machine.mkdir()
    async with CollectorProcess(tmp_path, NULL_COLLECT_TOKEN=TOKEN) as collector:
        env = {"NULL_SINK_TOKEN": TOKEN, "NULL_SINK_RESULTS": "true"}
        async with fleet_worker(machine, collector.sink, **env) as worker:
            await hold_once(worker, job="a-7")
            left = await session(worker, metadata={"job": "b-8"})
            began = asyncio.get_running_loop().time()
            assert await worker.terminate() == 0
            assert asyncio.get_running_loop().time() - began < 4, "nothing is owed, so nothing is waited for"
            columns = ", ".join(name for _, name, *_ in worker.sql("PRAGMA table_info(reservations)"))
            own = worker.sql(f"SELECT {columns} FROM reservations")
            assert told(collector) == worker.sql(
                "SELECT seq, at, reservation_id, kind, reason FROM events ORDER BY seq"
            )
            assert TOKEN.encode() not in worker.db.read_bytes()
        assert collector.sql(f"SELECT {columns} FROM reservations") == own
        [(instance, state, holding, version)] = collector.sql("SELECT instance, state, holding, version FROM workers")
        assert (instance, state, holding, version) == ("7", "stopped", left, "0.1.0")
        assert collector.sql("SELECT job, seconds > 0 FROM (SELECT metadata ->> 'job' AS job, held_seconds AS seconds"
                             " FROM cost) ORDER BY job") == [("a-7", 1), ("b-8", 1)]  # fmt: skip


async def test_worker_whose_collector_is_down_works_stops_in_time_and_delivers_later(tmp_path: Path) -> None:
    collector = CollectorProcess(tmp_path)
    async with fleet_worker(tmp_path, collector.sink, NULL_DRAIN_SECONDS="1") as worker:
        await hold_once(worker)
        await worker.line("sink_not_reached")
        status = await worker.get("/status")
        assert status["sink"]["backlog"] == 3
        assert "connection refused" in status["sink"]["trouble"]
        assert await worker.metric("nullworker_sink_backlog") == 3
        assert await worker.metric("nullworker_sink_deliveries_total", result="failed") >= 1
        shown = await nullworker("status", NULL_CONTROL_PORT=str(worker.control_port))
        assert f"{collector.sink}; connection refused, 3 events owed" in shown
        began = asyncio.get_running_loop().time()
        assert await worker.terminate() == 0
        assert asyncio.get_running_loop().time() - began < 4 + 1
        assert [line for line in worker.lines if line["event"] == "sink_backlog_left"]
        async with collector:
            await worker.start()
            await worker.release()
            await worker.terminate()
            assert told(collector) == worker.sql(
                "SELECT seq, at, reservation_id, kind, reason FROM events ORDER BY seq"
            )


async def test_last_events_arrive_when_the_collector_comes_back_during_the_stop(tmp_path: Path) -> None:
    collector = CollectorProcess(tmp_path)
    async with fleet_worker(tmp_path, collector.sink, NULL_DRAIN_SECONDS="10") as worker:
        await hold_once(worker)
        stop = asyncio.ensure_future(worker.terminate())
        async with collector:
            assert await stop == 0
            assert len(told(collector)) == 3


async def test_log_that_is_replaced_is_another_source_of_the_same_instance(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            async with fleet_worker(tmp_path / name, collector.sink) as worker:
                await hold_once(worker)
                await worker.terminate()
        assert collector.sql("SELECT count(*), count(DISTINCT worker), min(instance) FROM workers") == [(2, 2, "7")]
        assert collector.sql("SELECT count(*) FROM conflicts") == [(0,)]


async def test_log_restored_from_a_backup_loses_nothing_and_is_flagged(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector, fleet_worker(tmp_path, collector.sink) as worker:
        await hold_once(worker, job="before")
        await worker.terminate()
        backup = worker.db.read_bytes()
        for job in ("lost", "after"):
            await worker.start()
            await hold_once(worker, job=job)
            await worker.terminate()
            worker.db.write_bytes(backup)
            os.unlink(f"{worker.db}.lock")  # it notes how far the log had come: on another machine it is not there
        jobs = collector.sql("SELECT metadata ->> 'job' FROM reservations ORDER BY id")
        assert sorted(jobs) == [("after",), ("before",), ("lost",)]
        assert collector.sql("SELECT conflicts FROM workers") == [(3,)]


async def test_another_worker_cannot_write_under_a_log_it_does_not_know_the_key_of(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path, NULL_COLLECT_TOKEN=TOKEN) as collector:
        async with fleet_worker(tmp_path, collector.sink, NULL_SINK_TOKEN=TOKEN) as worker:
            await hold_once(worker)
            await worker.terminate()
        [(source,)] = collector.sql("SELECT source FROM sources")
        forged = {"specversion": "1.0", "id": "4-ab", "source": source, "type": "nullworker.reservation.queued"}
        answer = await collector.send(json.dumps([forged]).encode(), token=TOKEN, key="0" * 64)
        assert answer.status == 403
        assert len(told(collector)) == 3


async def test_wrong_path_loses_nothing(tmp_path: Path) -> None:
    collector = CollectorProcess(tmp_path)
    wrong = f"{collector.url}/event"
    async with collector, fleet_worker(tmp_path, wrong, NULL_DRAIN_SECONDS="0") as worker:
        await hold_once(worker)
        await worker.terminate()
        assert worker.sql("SELECT count(*) FROM settled WHERE name LIKE 'sink:%'") == [(0,)]
        worker.env["NULL_SINK"] = collector.sink
        await worker.start()
        await worker.terminate()
        assert len(told(collector)) == 3


async def test_json_lines_name_the_instance_and_the_job_once(tmp_path: Path) -> None:
    async with Receiver() as receiver, fleet_worker(tmp_path, receiver.url) as worker:
        await hold_once(worker, job="a-7")
        await worker.terminate()
        assert {line["instance"] for line in worker.lines} == {7}
        assert [line["event"] for line in worker.lines if line.get("metadata") == {"job": "a-7"}] == [
            "reservation_held"
        ]


async def test_gpu_is_told_when_nvidia_smi_answers(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n[ \"$1\" = --query-gpu=name ] && printf 'NVIDIA H100\\nNVIDIA H100\\n'\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    async with CollectorProcess(tmp_path) as collector:
        async with fleet_worker(tmp_path, collector.sink, PATH=path) as worker:
            await worker.terminate()
        assert collector.sql("SELECT gpu, instance FROM workers") == [("2 x NVIDIA H100", "7")]


@pytest.mark.parametrize("sink", ["http://fleet.example.com/events", "http://8.8.8.8/e", "ftp://127.0.0.1/", "events"])
async def test_sink_that_would_send_in_the_clear_ends_the_start(sink: str) -> None:
    said = await nullworker("serve", code=2, UNSECURED="true", NULL_SINK=sink)
    assert "NULL_SINK=" in said
    assert "an https URL, or an http one of a loopback or private address" in said
    assert said.count("\n") == 1


async def test_password_of_a_sink_is_shown_nowhere(tmp_path: Path) -> None:
    secret = "https://user:passw0rd@127.0.0.1:9/e?key=k3y"
    async with fleet_worker(tmp_path, secret, NULL_DRAIN_SECONDS="0") as worker:
        async with aiohttp.ClientSession() as http, http.get(f"{worker.control}/status") as answer:
            text = await answer.text()
        assert "https://***@127.0.0.1:9/e?***" in text
        await worker.terminate()
        text += json.dumps(worker.lines)
    assert "passw0rd" not in text
    assert "k3y" not in text
    assert not any(word in worker.db.read_bytes() for word in (b"passw0rd", b"k3y"))


def test_worker_without_a_sink_does_not_import_one() -> None:
    script = "import sys, nullworker.worker; print(sorted(m for m in sys.modules if 'sink' in m or 'cloudevents' in m))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_history_and_events_read_the_fleet_and_say_of_which_worker_each_row_is(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        now = wall()
        odd = [
            event("nullworker/9/c", 1, "queued", "r3", now),
            event("nullworker/9/c", 2, "held", "r3", now, None, ends_at=-1),
        ]
        await collector.send(odd, key="c")
        await collector.send(
            hold("nullworker/7/a", 1, "r1", now - 60, ends_at=now + 60, metadata={"job": "a-7"}), key="a"
        )
        ended = event("nullworker/8/b", 3, "released", "r2", now - 30, "explicit")
        await collector.send([*hold("nullworker/8/b", 1, "r2", now - 90, ends_at=now), ended], key="b")
        log = ("--log", str(collector.db))
        rows = [json.loads(line) for line in (await nullworker("history", *log, "--json")).splitlines()]
        assert [(row["worker"], row["id"], row["state"]) for row in rows] == [
            ("9/c", "r3", "held"), ("7/a", "r1", "held"), ("8/b", "r2", "released"),
        ]  # fmt: skip
        newest = await nullworker("history", *log, "--limit", "1", "--json")
        assert json.loads(newest)["id"] == "r3", "not the one whose events came last"
        assert "r1" in await nullworker("history", *log, "--state", "held", "--json")
        shown = await nullworker("history", *log, COLUMNS="80")
        assert re.search(r"^7 .* held .* job=a-7$", shown, re.MULTILINE)
        assert all(len(line) <= 80 for line in shown.splitlines())
        shown = await nullworker("events", *log, "--json")
        assert [json.loads(line)["reservation_id"] for line in shown.splitlines()] == [
            "r2",
            "r2",
            "r1",
            "r1",
            "r2",
            "r3",
            "r3",
        ]
        assert "held" in await nullworker("events", *log)
        following = Program(tmp_path, sys.executable, "-m", "nullworker", "events", *log, "--follow", "--json")
        async with following:
            await until(lambda: len(following.out.read_text().splitlines()) == 7)
            await collector.send([event("nullworker/7/a", 3, "released", "r1", now, "explicit")], key="a")
            await until(lambda: len(following.out.read_text().splitlines()) == 8)


@pytest.mark.parametrize("command", [("serve",), ("prune", "--keep", "1d")])
async def test_no_worker_writes_into_the_database_of_a_fleet(tmp_path: Path, command: tuple[str, ...]) -> None:
    async with CollectorProcess(tmp_path) as collector:
        await collector.terminate()
    said = await nullworker(*command, code=1, UNSECURED="true", NULL_EVENT_LOG=str(collector.db), WORKER_PORT="0")
    assert "is a database of another program" in said
