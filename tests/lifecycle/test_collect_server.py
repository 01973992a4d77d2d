"""`nullworker collect`, as a process: who may write, what is served where, and what a sender is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import aiohttp
import pytest
from collectors import CollectorProcess, event, hold
from programs import free_port, listens, nullworker, run

from nullworker.clock import wall
from nullworker.eventlog import cloudevents

SOURCE = "nullworker/7/ab12"
TOKEN = "t0ken-of-the-fleet"


async def get(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def test_batch_is_on_disk_when_it_is_answered_even_if_the_collector_is_killed(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        batch = hold(SOURCE, 1, "r1", wall(), ends_at=wall() + 60, metadata={"job": 1})
        answer = await collector.send(batch)
        assert (answer.status, answer.body) == (200, {"stored": 2, "duplicates": 0, "conflicts": 0})
        await collector.kill()
        await collector.start()
        assert (await collector.send(batch)).body == {"stored": 0, "duplicates": 2, "conflicts": 0}
        assert collector.sql("SELECT id, state, worker FROM reservations") == [("r1", "held", "7/ab12")]
        assert {path.stat().st_mode & 0o777 for path in collector.files()} == {0o600}
        assert await collector.terminate() == 0


async def test_one_malformed_event_leaves_nothing_of_a_batch(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        good = cloudevents.encode(event(SOURCE, 1, "queued", "r1", wall()))
        for body, words in ((b"[" + good + b",5]", "event 1"), (good, "not a JSON array"), (b"", "not a JSON array")):
            answer = await collector.send(body)
            assert answer.status == 422
            assert words in answer.body["error"]
        answer = await collector.send(good, **{"Content-Type": "application/cloudevents+json"})
        assert answer.body["stored"] == 1
        assert collector.sql("SELECT count(*) FROM received") == [(1,)]


async def test_bodies_that_are_not_taken(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        assert (await collector.send(b"[" + b" " * (4 << 20) + b"]")).status == 413
        assert (await collector.send(b"[" + b",".join([b"0"] * 10_001) + b"]")).status == 413
        assert (await collector.send(b"{}\n{}", **{"Content-Type": "application/x-ndjson"})).status == 415
        assert (await collector.send(b"[]", **{"Content-Encoding": "gzip"})).status == 415
        assert (await collector.send(b"[]")).body["stored"] == 0
        assert collector.sql("SELECT count(*) FROM sources") == [(0,)]


async def test_token_and_key_are_asked_for(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path, NULL_COLLECT_TOKEN=TOKEN) as collector:
        batch = [event(SOURCE, 1, "queued", "r1", wall())]
        for token in (None, "", "wrong", TOKEN + "x"):
            assert (await collector.send(batch, token=token)).status == 401
        for authorization, status in ((TOKEN, 401), (f"Basic {TOKEN}", 401), (f"bearer {TOKEN}", 200)):
            assert (await collector.send(batch, Authorization=authorization)).status == status
        assert (await collector.send(batch, token=TOKEN)).status == 200
        forged = [event("nullworker/8/cd34", 1, "queued", "r9", wall()), event(SOURCE, 2, "held", "r1", wall())]
        answer = await collector.send(forged, token=TOKEN, key="of another worker")
        assert (answer.status, answer.body["source"]) == (403, SOURCE)
        assert collector.sql("SELECT source, count(*) FROM received JOIN sources ON source_id = sources.id") == [
            (SOURCE, 1)
        ]
        _, metrics = await get(f"{collector.url}/metrics")
        assert 'nullworker_collect_auth_failures_total{reason="token"} 6.0' in metrics
        assert 'nullworker_collect_auth_failures_total{reason="key"} 1.0' in metrics
        assert TOKEN not in json.dumps(collector.lines)
    assert TOKEN.encode() not in collector.db.read_bytes()


async def test_page_and_metrics_stand_on_a_port_of_their_own_when_others_can_reach_the_first(tmp_path: Path) -> None:
    for options in (("--public",), ("--host", "0.0.0.0")):
        async with CollectorProcess(tmp_path, *options, NULL_SINK_TOKEN=TOKEN) as collector:
            page = f"http://127.0.0.1:{collector.page_port}"
            for path in ("/", "/status", "/metrics", "/readyz", "/assets/fleet.js"):
                assert (await get(collector.url + path))[0] == 404
                assert (await get(page + path))[0] == 200
                assert (await get(page + path, Host="fleet.example.com"))[0] == 403
            assert (await collector.send([event(SOURCE, 1, "queued", "r1", wall())], token=TOKEN)).status == 200
            async with aiohttp.ClientSession() as http, http.post(f"{page}/events", data=b"[]") as answer:
                assert answer.status == 404


async def test_what_others_can_reach_needs_a_token(tmp_path: Path) -> None:
    for options in (("--public",), ("--host", "0.0.0.0"), ("--host", "::"), ("--host", "fleet.example.com")):
        said = await nullworker("collect", "--db", str(tmp_path / "f.db"), *options, code=2)
        assert "needs a token" in said
        assert said.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--price", "x"), "dollars an hour"), (("--price", "=1"), "dollars an hour"), (("--price", "a=-1"), "dollars"),
     (("--price", "nan"), "dollars an hour"), (("--keep", "soon"), "not a number of seconds"),
     (("--keep", "0"), "more than 0"), (("--silence", "-1"), "more than 0"), (("--silence", "0"), "more than 0"),
     (("--token", "a\nb"), "printable text in one line"), (("--port", "70000"), "--port")],
)  # fmt: skip
async def test_wrong_options_are_named(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    said = await nullworker("collect", "--db", str(tmp_path / "f.db"), *options, code=2)
    assert words in said
    assert said.count("\n") == 1


async def test_second_collector_on_a_file_or_a_port_says_what_to_do(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        said = await nullworker("collect", "--db", str(collector.db), "--port", "0", code=1)
        assert re.search(rf"belongs to a collector that is running: pid {collector.process.pid}\b", said)
        said = await nullworker("collect", "--db", str(tmp_path / "o.db"), "--port", str(collector.port), code=1)
        assert f"--port: 127.0.0.1:{collector.port} is taken" in said


async def test_file_that_cannot_be_written_answers_503_and_is_taken_up_again(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        await collector.send([event(SOURCE, 1, "queued", "r1", wall())])
        moved = tmp_path / "moved"
        moved.mkdir()
        for name in ("fleet.db", "fleet.db-wal", "fleet.db-shm"):
            os.rename(tmp_path / name, moved / name)
        answer = await collector.send([event(SOURCE, 2, "held", "r1", wall())])
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "moved or removed" in answer.body["error"]
        assert (await get(f"{collector.url}/readyz"))[0] == 503
        assert "nullworker_collect_writable 0.0" in (await get(f"{collector.url}/metrics"))[1]
        for name in ("fleet.db", "fleet.db-wal", "fleet.db-shm"):
            os.rename(moved / name, tmp_path / name)
        assert (await collector.send([event(SOURCE, 2, "held", "r1", wall())])).status == 200
        assert (await get(f"{collector.url}/readyz"))[0] == 200
        assert [line["event"] for line in collector.lines] == [
            "collector_started", "database_not_writable", "database_writable",
        ]  # fmt: skip


async def test_damaged_file_is_neither_used_nor_changed(tmp_path: Path) -> None:
    damaged = tmp_path / "fleet.db"
    async with CollectorProcess(tmp_path) as collector:
        await collector.send([event(SOURCE, n, "queued", f"r{n}", wall()) for n in range(1, 200)])
        await collector.terminate()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100] + b"\xa5" * 4000 + content[4100:])
    said = await nullworker("collect", "--db", str(damaged), "--port", "0", code=1)
    assert "move it away" in said
    assert damaged.read_bytes()[100:4100] == b"\xa5" * 4000


async def test_metrics_of_the_fleet_are_clean_and_count_what_was_received(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path, "--price", "0.4", "--price", "8=1", "--silence", "1s") as collector:
        now = wall()
        await collector.send(hold(SOURCE, 1, "r1", now - 7200, ends_at=now + 60), key="a")
        ended = event("nullworker/8/c", 3, "cancelled", "r2", now - 3600, "consumer_lost")
        await collector.send([*hold("nullworker/8/c", 1, "r2", now - 7200, ends_at=now), ended], key="b")
        await asyncio.sleep(1.1)
        _, text = await get(f"{collector.url}/metrics")
        found = dict(re.findall(r"^nullworker_collect_(\S+) (\S+)$", text, re.MULTILINE))
        assert float(found["holding"]) == float(found["silent_while_holding"]) == 1
        assert float(found['workers{state="silent_while_holding"}']) == float(found['workers{state="silent"}']) == 1
        assert float(found["held_seconds_total"]) == pytest.approx(7200 + 3600, abs=5)
        assert float(found["dollars_total"]) == pytest.approx(2 * 0.4 + 1, abs=0.01)
        assert float(found["consumers_lost_total"]) == 1
        assert float(found['events_total{result="stored"}']) == 5
        await collector.send([ended], key="b")
        _, text = await get(f"{collector.url}/metrics")
        assert 'events_total{result="duplicate"} 1.0' in text
        promtool = shutil.which("promtool")
        assert promtool, "apt-get install prometheus"
        (tmp_path / "metrics").write_text(text)
        await run("sh", "-c", f"{promtool} check metrics < {tmp_path / 'metrics'} 2>&1")


async def test_old_reservations_are_removed_and_the_sums_stay(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        now = wall()
        for n in range(3):
            ended = event(SOURCE, 3 * n + 3, "released", f"r{n}", now - 9000, "explicit")
            await collector.send([*hold(SOURCE, 3 * n + 1, f"r{n}", now - 9100, ends_at=now), ended])
        await collector.send(hold(SOURCE, 10, "open", now - 9000, ends_at=now + 60))
        await collector.terminate()
    async with CollectorProcess(tmp_path, "--keep", "1h") as collector:
        await collector.line("pruned")
        assert collector.sql("SELECT id FROM reservations") == [("open",)]
        assert "nullworker_collect_held_seconds_total 9" in (await get(f"{collector.url}/metrics"))[1]


async def test_sender_that_never_finishes_its_body_hinders_nobody(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        writers = []
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", collector.port)
            writer.write(
                b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                b"Content-Type: application/cloudevents-batch+json\r\n\r\n["
            )
            writers.append(writer)
        await asyncio.sleep(0.2)
        answer = await asyncio.wait_for(collector.send([event(SOURCE, 1, "queued", "r1", wall())]), 5)
        assert answer.status == 200
        for writer in writers:
            writer.close()


async def test_stops_at_once_and_frees_its_port(tmp_path: Path) -> None:
    async with CollectorProcess(tmp_path) as collector:
        _, writer = await asyncio.open_connection("127.0.0.1", collector.port)
        assert await asyncio.wait_for(collector.terminate(signal.SIGINT), 5) == 0
        assert not listens(collector.port)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    assert free_port()
