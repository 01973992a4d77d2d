"""`nullworker reserve` as a process, against the fake autoscaler and a fake worker."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import forks
import pytest
from fake_worker import FakeWorker, Json

from nullworker.cli.reserve import HoldError, hold
from nullworker.testing import FakeAutoscaler
from nullworker.testing.faults import How

ROOT = Path(__file__).parents[2]
RELEASED: Json = {"released": "explicit", "reservation_id": "r1", "held_seconds": 1.5}


def of_the_worker(answer: Json) -> Json:
    """What of a ledger line the worker has said."""
    return {name: answer[name] for name in RELEASED}


started: list[Command] = []


@pytest.fixture(autouse=True)
async def no_command_is_left() -> AsyncIterator[None]:
    yield
    while started:
        process = started.pop().process
        if process.returncode is None:
            process.kill()
            await process.communicate()


class Command:
    """One run of `python -m workers.null.client`."""

    def __init__(self, process: asyncio.subprocess.Process | forks.ForkedProcess) -> None:
        self.process = process
        self.said = ""

    @classmethod
    async def start(cls, *args: str, env: dict[str, str] | None = None) -> Command:
        argv = [sys.executable, "-W", "error", "-m", "workers.null.client", *args]
        env = {"PATH": "/usr/bin:/bin", **(env or {})}
        command = cls(await forks.start(argv, cwd=ROOT, env=env))
        started.append(command)
        return command

    async def until(self, words: str) -> None:
        """Returns once a line on stderr has these words."""
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode():
            self.said += line
            if words in line:
                return
        pytest.fail(f"{words!r} was not said, but: {self.said}")

    async def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = await asyncio.wait_for(self.process.communicate(), 30)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), self.said + err.decode()


async def run(*args: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    return await (await Command.start(*args, env=env)).end()


@pytest.fixture
async def vast() -> AsyncIterator[FakeAutoscaler]:
    async with FakeAutoscaler() as vast:
        yield vast


@pytest.fixture
async def worker(vast: FakeAutoscaler) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(vast.url) as worker:
        yield worker


def at(vast: FakeAutoscaler, *more: str) -> tuple[str, ...]:
    return ("--endpoint", "null", "--autoscaler", vast.url, *more)


async def test_it_holds_until_the_release_and_says_each_stage(vast: FakeAutoscaler, worker: FakeWorker) -> None:
    command = await Command.start(*at(vast, "--duration", "3.5", "--metadata", '{"job": 7}'))
    known_as = await worker.held.get()
    await command.until(f"held on {worker.url}, reservation {known_as}")
    worker.release(known_as, **RELEASED)
    code, out, err = await command.end()
    assert (code, of_the_worker(json.loads(out))) == (0, RELEASED)
    assert err.splitlines() == [
        f"looking for endpoint 'null' at {vast.url}",
        f"asking {worker.url}",
        f"held on {worker.url}, reservation r1",
        "ended: explicit after 1.5 s",
    ]
    (body,) = worker.bodies
    assert body["payload"] == {"duration": 3.5, "metadata": {"job": 7}, "stream": True}
    assert body["auth_data"]["cost"] == 100


async def test_json_prints_the_answer_in_one_line_and_nothing_else(vast: FakeAutoscaler, worker: FakeWorker) -> None:
    command = await Command.start(*at(vast, "--json"))
    worker.release(await worker.held.get(), **RELEASED)
    code, out, err = await command.end()
    assert (code, of_the_worker(json.loads(out)), out.count("\n"), err) == (0, RELEASED, 1, "")


@pytest.mark.parametrize("args", [(), ("--no-stream",)])
async def test_a_worker_without_streams_answers_with_one_body(vast: FakeAutoscaler, args: tuple[str, ...]) -> None:
    async with FakeWorker(vast.url, streams=False) as worker:
        command = await Command.start(*at(vast, "--json", *args))
        worker.release(await worker.held.get(), **RELEASED)
        code, out, err = await command.end()
        assert (code, of_the_worker(json.loads(out)), err) == (0, RELEASED, "")
        assert ("stream" in worker.bodies[0]["payload"]) == (not args)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("args", [(), ("--no-stream",)])
async def test_a_signal_closes_the_connection_and_says_so(
    vast: FakeAutoscaler, worker: FakeWorker, number: int, code: int, args: tuple[str, ...]
) -> None:
    command = await Command.start(*at(vast, *args))
    known_as = await worker.held.get()
    command.process.send_signal(number)
    exit_code, out, err = await command.end()
    assert (exit_code, out) == (code, "")
    gone = "closed the connection, which ends the reservation as cancelled (client_disconnect) at"
    assert err.splitlines()[-1] == f"interrupted: {gone} {worker.url}"
    assert await worker.ended.get() == (known_as, "Cancelled")


async def test_a_signal_while_it_waits_says_that_nothing_was_held(vast: FakeAutoscaler) -> None:
    command = await Command.start(*at(vast))
    await command.until("waiting for a worker (")
    command.process.send_signal(signal.SIGINT)
    code, _, err = await command.end()
    assert (code, err.splitlines()[-1]) == (130, "interrupted: no worker was held")


async def test_an_unknown_endpoint_is_named_with_those_there_are(vast: FakeAutoscaler) -> None:
    code, out, err = await run("--endpoint", "nul", "--autoscaler", vast.url, "--json")
    assert (code, out) == (1, "")
    assert err == f"nullworker reserve: no endpoint named 'nul' at {vast.url}; there is: null\n"


async def test_a_busy_worker_is_asked_again_and_the_refusal_is_said(vast: FakeAutoscaler, worker: FakeWorker) -> None:
    worker.refusals = [(429, {"error": "the queue is full", "reason": "queue_full"})]
    command = await Command.start(*at(vast))
    await command.until(f"{worker.url} answered 429 the queue is full: trying again")
    worker.release(await worker.held.get(), **RELEASED)
    code, _, _ = await command.end()
    assert (code, len(worker.bodies)) == (0, 2)
    assert {body["auth_data"]["request_idx"] for body in worker.bodies} == {1}


async def test_a_final_refusal_is_not_repeated_and_its_body_is_printed(
    vast: FakeAutoscaler, worker: FakeWorker
) -> None:
    worker.refusals = [(422, {"error": "duration: 0 or more"})]
    code, out, err = await run(*at(vast, "--json"))
    assert (code, json.loads(out), len(worker.bodies)) == (1, {"error": "duration: 0 or more"}, 1)
    assert err == f"nullworker reserve: {worker.url} answered 422 duration: 0 or more; correct the named fields\n"


async def test_a_reservation_that_the_worker_ends_fails_with_its_reason(
    vast: FakeAutoscaler, worker: FakeWorker
) -> None:
    command = await Command.start(*at(vast, "--json"))
    worker.release(await worker.held.get(), error="the worker is draining", reason="draining")
    code, out, err = await command.end()
    assert (code, json.loads(out)["reason"]) == (3, "draining")
    assert err == f"nullworker reserve: {worker.url} ended it: the worker is draining\n"
    assert len(worker.bodies) == 1


async def test_a_stream_that_ends_without_an_answer_fails_and_is_not_repeated(
    vast: FakeAutoscaler, worker: FakeWorker
) -> None:
    command = await Command.start(*at(vast, "--json"))
    worker.release(await worker.held.get())
    code, out, err = await command.end()
    assert (code, out) == (1, "")
    assert "went away before the reservation had ended" in err
    first, *again = (body["payload"].get("duration") for body in worker.bodies)
    assert (first, set(again)) == (None, {0}), "asked for its last word, and for no further time"


async def test_no_worker_within_the_timeout_is_an_error_with_advice(vast: FakeAutoscaler) -> None:
    code, _, err = await run(*at(vast, "--timeout", "0.5"))
    assert code == 1
    assert err.splitlines()[-1] == (
        "nullworker reserve: no worker within 0.5 s; raise --timeout, or the endpoint's max_workers"
    )


async def test_a_worker_that_never_confirms_the_hold_times_out(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url, streams=False) as worker:
        with pytest.raises(HoldError, match=f"{worker.url} was asked, and did not begin to hold.*--no-stream"):
            await hold("null", autoscaler=vast.url, timeout=2)
        assert (await worker.ended.get())[1] == "Cancelled"


async def test_a_connection_that_breaks_while_held_is_not_repeated(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url) as worker:
        holding = asyncio.create_task(hold("null", autoscaler=vast.url))
        await worker.held.get()
    with pytest.raises(HoldError, match=f"{worker.url} broke off while it was held|{worker.url} went away"):
        await holding
    assert len(worker.bodies) == 1


async def test_a_dead_worker_is_asked_with_a_backoff(vast: FakeAutoscaler) -> None:
    async with FakeWorker(vast.url) as gone:
        pass
    with pytest.raises(HoldError, match=f"within 1.2 s .last: {gone.url} cannot be reached"):
        await hold("null", autoscaler=vast.url, timeout=1.2)
    assert 2 <= sum(call.call == "route" for call in vast.seen) <= 4


@pytest.mark.parametrize("how", [500, 429, "down"])
async def test_a_failed_routing_call_is_tried_again(vast: FakeAutoscaler, worker: FakeWorker, how: How) -> None:
    vast.fail("route", how, times=2)
    said: list[str] = []
    holding = asyncio.create_task(hold("null", autoscaler=vast.url, say=said.append))
    worker.release(await worker.held.get(), **RELEASED)
    assert of_the_worker(await holding) == RELEASED
    assert any(line.startswith("Failed to route endpoint") and line.endswith("trying again") for line in said)


async def test_a_wrong_key_is_refused_at_once_and_never_shown() -> None:
    async with FakeAutoscaler(api_key="right") as vast:
        code, _, err = await run(*at(vast), env={"VAST_API_KEY": "wrong-secret"})
    assert code == 1
    assert err.endswith("; check VAST_API_KEY\n")
    assert "wrong-secret" not in err


async def test_a_url_needs_no_sdk(tmp_path: Path) -> None:
    (tmp_path / "vastai.py").write_text("raise ImportError('not here')")
    async with FakeWorker() as worker:
        command = await Command.start("--url", worker.url, "--duration", "9", env={"PYTHONPATH": str(tmp_path)})
        known_as = await worker.held.get()
        await command.until(f"held on {worker.url}, reservation {known_as}")
        worker.release(known_as, **RELEASED)
        code, out, _ = await command.end()
    assert (code, of_the_worker(json.loads(out))) == (0, RELEASED)
    assert worker.bodies == [{"duration": 9.0, "stream": True}]


async def test_a_url_of_a_busy_worker_fails_at_once(tmp_path: Path) -> None:
    async with FakeWorker() as worker:
        worker.refusals = [(429, {"error": "busy"})]
        code, out, err = await run("--url", worker.url, "--json")
    assert (code, json.loads(out)) == (1, {"error": "busy"})
    assert err.startswith(f"nullworker reserve: {worker.url} answered 429 busy; every worker is taken")


async def test_a_url_where_nothing_listens_cannot_be_reached() -> None:
    async with FakeWorker() as gone:
        pass
    code, _, err = await run("--url", gone.url, "--json")
    assert (code, err) == (1, f"nullworker reserve: {gone.url} cannot be reached: connection refused\n")


async def test_without_the_sdk_it_says_what_to_install(vast: FakeAutoscaler, tmp_path: Path) -> None:
    (tmp_path / "vastai.py").write_text("raise ImportError('not here')")
    code, _, err = await run(*at(vast), env={"PYTHONPATH": str(tmp_path)})
    assert code == 1
    assert err.splitlines() == [
        "nullworker reserve: the official client is not installed: pip install 'nullworker[client]'"
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give either --endpoint NAME or --url URL"),
        (("--endpoint", "a", "--url", "http://b"), "give either --endpoint NAME or --url URL"),
        (("--url", "http://b", "--session"), "need --endpoint"),
        (("--url", "nope"), "--url must be as http://HOST:PORT, not 'nope'"),
        (("--endpoint", "a"), "no API key: set VAST_API_KEY, or give --api-key"),
        (("--endpoint", "a", "--duration", "nan"), "'nan' is not a number of seconds, 0 or more"),
        (("--endpoint", "a", "--duration", "-1"), "'-1' is not a number of seconds, 0 or more"),
        (("--endpoint", "a", "--metadata", "[1]"), "'[1]' is not a JSON object"),
        (("--endpoint", "a", "--metadata", "job=1"), 'write it as \'{"job": "42"}\''),
    ],
)
async def test_wrong_use_exits_2_and_says_why(args: tuple[str, ...], words: str) -> None:
    code, _, err = await run(*args)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
