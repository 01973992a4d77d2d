"""POST /attach with real workers: its answers, and what the end of a connection does to a hold."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import PATIENCE, Answer, WorkerProcess, changed, post
from programs import Program, answered, caller, free_port, session

#: Attaches with a raw socket and says so; then does what its argument says.
PROGRAM = """
import os, socket, sys, time
port, reservation, extend, then = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
sock = socket.create_connection(("127.0.0.1", port))
path = f"/attach?reservation_id={reservation}&extend={extend}"
sock.sendall(f"POST {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
assert sock.recv(12) == b"HTTP/1.1 200", "refused"
print('{"event": "attached"}', file=sys.stderr, flush=True)
exec(then)
time.sleep(1000)
"""


class Attached:
    """One liveness connection in this process. `events` of its reservation, as far as they have been read."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def text(self) -> str:
        """What comes to the end of the answer."""
        return await asyncio.wait_for(self.answer.text(), PATIENCE)

    async def until(self, word: str) -> None:
        async for line in self.answer.content:
            if word in line.decode():
                return
        raise AssertionError(f"the answer ended without {word}")


@contextlib.asynccontextmanager
async def attached(worker: WorkerProcess, reservation: str, extend: str = "1") -> AsyncIterator[Attached]:
    url = f"{worker.control}/attach?reservation_id={reservation}&extend={extend}"
    timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        yield Attached(answer)


async def refused(worker: WorkerProcess, query: str) -> Answer:
    return await post(f"{worker.control}/attach{query}", None)


async def held(worker: WorkerProcess) -> str:
    return str((await worker.get("/reservation?wait=20"))["id"])


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    async with WorkerProcess(
        tmp_path, NULL_CONSUMER_GRACE_SECONDS="0.2", NULL_MAX_QUEUE_SECONDS="2", NULL_CONTROL_PORT=str(free_port())
    ) as process:
        yield process


async def test_it_tells_the_events_of_its_reservation_and_ends_after_the_last(worker: WorkerProcess) -> None:
    async with caller(worker):
        first = await held(worker)
        async with attached(worker, first) as line:
            await line.until('"held"')
            async with caller(worker):  # another's events are not in it
                await worker.line("reservation_queued", nth=2)
                await worker.release(result=[7])
                told = await line.text()
    assert [json.loads(each[6:])["kind"] for each in told.splitlines() if each.startswith("data: ")] == ["released"]
    assert line.answer.headers["Connection"] == "close"


async def test_an_idle_one_is_kept_alive(tmp_path: Path) -> None:
    module = changed(nullworker__http__sse__KEEPALIVE_SECONDS=0.05)
    async with WorkerProcess(tmp_path, module=module) as worker, attached(worker, await session(worker)) as line:
        for _ in range(2):
            await line.until(": keepalive")


async def test_what_cannot_be_attached_to_is_told(worker: WorkerProcess) -> None:
    assert (await refused(worker, "?reservation_id=nobody")).status == 404
    for query, field in (("", "reservation_id"), ("?reservation_id=x&extend=2", "extend")):
        answer = await refused(worker, query)
        assert (answer.status, field in answer.body) == (422, True)
        assert "Nullworker-Reservation" not in answer.headers
    async with aiohttp.ClientSession() as http, http.get(f"{worker.control}/attach?reservation_id=x") as page:
        assert page.status == 405  # a page's <img> can only GET

    async with caller(worker), caller(worker):
        first = await held(worker)
        waits = (await worker.line("reservation_queued", nth=2))["reservation_id"]
        answer = await refused(worker, f"?reservation_id={waits}")
        assert (answer.status, answer.body["state"], answer.body["reason"]) == (409, "queued", None)
        await worker.release(result={"pages": 3})
        answer = await refused(worker, f"?reservation_id={first}")
    assert answer.status == 409
    fields = {name: answer.body[name] for name in ("state", "reason", "result")}
    assert fields == {"state": "released", "reason": "explicit", "result": {"pages": 3}}
    assert {"held_at", "ended_at", "held_seconds"} < answer.body.keys()


async def test_one_at_a_time_and_the_next_when_the_first_is_gone(worker: WorkerProcess) -> None:
    known_as = await session(worker)
    async with attached(worker, known_as):
        answer = await refused(worker, f"?reservation_id={known_as}")
        assert (answer.status, answer.body["state"], answer.headers["Retry-After"]) == (409, "attached", "1")
    await worker.line("consumer_detached")
    async with attached(worker, known_as):
        await worker.line("consumer_attached", nth=2)
        assert (await worker.get("/reservation"))["id"] == known_as


async def test_the_first_attachment_is_on_disk_when_the_answer_begins(worker: WorkerProcess) -> None:
    known_as = await session(worker)
    async with attached(worker, known_as):
        assert worker.story() == [("queued", None), ("held", None), ("extended", "attached")]
        status = (await worker.get("/status"))["consumer"]
        assert (status["attached"], status["attached_at"] is not None) == (True, True)
        assert await worker.metric("nullworker_consumer_attached") == 1
        assert await worker.metric("nullworker_attach_seconds_count") == 1
    await worker.line("consumer_detached")
    assert await worker.metric("nullworker_consumer_attached") == 0
    await worker.line("reservation_cancelled")
    assert worker.story()[-1] == ("cancelled", "consumer_lost")
    ((data, seconds),) = worker.sql(
        "SELECT e.data, r.attach_seconds FROM events e, reservations r ORDER BY seq DESC LIMIT 1"
    )
    assert json.loads(data)["attached_at"] > 0
    assert 0 <= seconds < PATIENCE


async def test_a_caller_hears_that_the_consumer_was_lost(worker: WorkerProcess) -> None:
    async with caller(worker) as asked:
        async with attached(worker, await held(worker)):
            pass
        answer = await answered(asked)
    assert (answer["reason"], "error" in answer) == ("consumer_lost", True)


async def test_a_caller_hears_that_no_consumer_came(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, NULL_ATTACH_TIMEOUT="0.2") as worker, caller(worker) as asked:
        assert (await answered(asked))["reason"] == "consumer_absent"


def program(worker: WorkerProcess, reservation: str, then: str = "pass", extend: str = "1") -> Program:
    return Program(worker.folder, sys.executable, "-c", PROGRAM, str(worker.control_port), reservation, extend, then)


async def graces(worker: WorkerProcess) -> None:
    """Let the grace of a consumer that is gone pass ten times: a claim waits for two seconds in vain."""
    assert (await post(worker.url + "/reserve", {})).body["reason"] == "queue_timeout"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_process_that_dies_ends_its_hold(worker: WorkerProcess, number: signal.Signals) -> None:
    known_as = await session(worker, lifetime=3600)
    async with program(worker, known_as) as consumer:
        await consumer.line("attached")
        consumer.process.send_signal(number)
        end = await worker.line("reservation_cancelled")
    assert (end["reason"], end["held_seconds"] < PATIENCE) == ("consumer_lost", True)


async def test_a_stopped_process_is_not_dead(worker: WorkerProcess) -> None:
    known_as = await session(worker, lifetime=3600)
    async with program(worker, known_as) as consumer:
        await consumer.line("attached")
        consumer.process.send_signal(signal.SIGSTOP)
        await graces(worker)
        assert (await worker.get("/reservation"))["id"] == known_as
        consumer.process.send_signal(signal.SIGCONT)


async def test_in_bash_the_hold_lasts_until_the_last_child_is_gone(worker: WorkerProcess) -> None:
    known_as = await session(worker, lifetime=3600)
    os.mkfifo(worker.folder / "gate")
    script = f"""
exec 3<>/dev/tcp/127.0.0.1/{worker.control_port}
printf 'POST /attach?reservation_id=%s HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 0\\r\\n\\r\\n' {known_as} >&3
read -r line <&3
echo "{{\\"event\\": \\"$(echo $line | cut -c1-12)\\"}}" >&2
(read _ <gate) 2>/dev/null &
exit
"""
    async with Program(worker.folder, "bash", "-c", script) as shell:
        await shell.line("HTTP/1.1 200")
        assert await asyncio.wait_for(shell.process.wait(), PATIENCE) == 0
        await graces(worker)
        assert (await worker.get("/reservation"))["id"] == known_as
        (worker.folder / "gate").write_text("\n")
        assert (await worker.line("reservation_cancelled"))["reason"] == "consumer_lost"


async def test_the_stop_of_the_worker_is_not_the_death_of_the_consumer(tmp_path: Path) -> None:
    port = str(free_port())
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=port, NULL_CONSUMER_GRACE_SECONDS="0") as worker:
        known_as = await session(worker)
        async with attached(worker, known_as) as line:
            await line.until('"held"')
            assert await worker.terminate() == 0
            await line.text()
        await worker.start()
        assert (await worker.get("/reservation"))["id"] == known_as
        assert worker.story()[-1] == ("extended", "attached")


async def test_after_a_restart_the_consumer_attaches_again_or_is_lost(tmp_path: Path) -> None:
    module = changed(nullworker__fsm__book__RESTART_GRACE_SECONDS=1.0)
    port = str(free_port())
    async with WorkerProcess(
        tmp_path, module=module, NULL_CONTROL_PORT=port, NULL_CONSUMER_GRACE_SECONDS="0.1"
    ) as worker:
        known_as = await session(worker)
        for _ in range(2):
            async with attached(worker, known_as) as line:
                await line.until('"held"')
                await worker.kill()
                await worker.start()
        end = await worker.line("reservation_cancelled")
        assert (end["reservation_id"], end["reason"]) == (known_as, "consumer_lost")


async def test_while_the_consumer_is_attached_a_short_session_goes_on_in_few_commits(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path, MAX_RESERVATION_SECONDS="2") as worker:
        known_as = await session(worker, lifetime=2)
        async with attached(worker, known_as):
            await worker.line("reservation_extended", nth=5)
            assert (await worker.get("/reservation"))["id"] == known_as
        ends = worker.sql("SELECT at, data ->> 'ends_at' FROM events WHERE reason = 'attached' ORDER BY seq")
        gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(ends)]
        assert all(0.5 < gap < 2 for gap in gaps), gaps
        assert all(ends_at - at <= 2.001 for at, ends_at in ends)


async def test_what_a_consumer_sends_with_it_is_read_and_ignored(worker: WorkerProcess) -> None:
    """An unread body would keep the end of the connection from being noticed, up to the next keepalive."""
    known_as = await session(worker)
    body: Any = b"x" * 500_000
    url = f"{worker.control}/attach?reservation_id={known_as}"
    async with aiohttp.ClientSession() as http, http.post(url, data=body) as answer:
        assert answer.status == 200
    end = await worker.line("reservation_cancelled")
    assert (end["reason"], end["held_seconds"] < 10) == ("consumer_lost", True)
