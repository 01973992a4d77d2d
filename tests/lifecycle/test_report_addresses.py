"""A list of REPORT_ADDR with an address that is down, silent, or refuses everything: nobody is missed for long."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from claims import reserve
from harness import WorkerProcess, post
from programs import dead_address
from strangers import answering

from nullworker.testing import FakeAutoscaler


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 400 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")


def reporting(folder: Path, *addresses: str, **env: Any) -> WorkerProcess:
    return WorkerProcess(folder, CONTAINER_ID="7", MASTER_TOKEN="master-secret", REPORT_ADDR=",".join(addresses), **env)


async def test_an_outcome_waits_for_an_address_that_is_down_while_another_refuses_it(tmp_path: Path) -> None:
    address = dead_address()
    async with answering(refusing) as refuses:
        async with reporting(tmp_path, address, f"http://{refuses}", UNSECURED="true") as worker:
            envelope = {"auth_data": grant(worker), "payload": {"duration": 0}}
            assert (await post(worker.url + "/reserve", envelope)).status == 200
            await worker.line("report_not_delivered", where=lambda line: line["call"] == "delete_requests")
            assert worker.sql("SELECT * FROM settled") == []
            async with FakeAutoscaler(int(address.rpartition(":")[2])) as vast:
                assert await vast.wait_for(lambda: [each for each in vast.outcomes if each["request_idx"] == 5])
        assert worker.sql("SELECT * FROM settled") == []


async def test_an_outcome_that_every_address_refuses_is_set_aside(tmp_path: Path) -> None:
    async with (
        answering(refusing) as one,
        answering(refusing) as other,
        reporting(tmp_path, f"http://{one}", f"http://{other}", UNSECURED="true") as worker,
    ):
        envelope = {"auth_data": grant(worker), "payload": {"duration": 0}}
        assert (await post(worker.url + "/reserve", envelope)).status == 200
        await worker.line("outcome_refused")
        assert worker.sql("SELECT outcome FROM settled") == [("refused",)]


async def test_a_first_address_that_never_answers_costs_little(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with answering(silent) as never, reporting(tmp_path, f"http://{never}", vast.url) as worker:
        started = time.monotonic()
        await vast.wait_for(lambda: [status for status in vast.statuses if status["max_perf"] == 100])
        assert time.monotonic() - started < 5, "with 10 s a call it took 21.8 s"
        claim = await reserve(worker, vast)
        await claim.held()
        await worker.release()
        await claim.answer()
        assert await worker.terminate() == 0
        assert await claim.outcome() == "Success"
        assert worker.lines[-1]["event"] == "worker_stopped"
        assert [line for line in worker.lines if line["event"] == "last_reports_unsent"] == []


def grant(worker: WorkerProcess) -> dict[str, object]:
    return {"cost": 1, "endpoint": "e", "reqnum": 1, "request_idx": 5, "signature": "", "url": worker.url}
