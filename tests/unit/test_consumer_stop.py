"""nullworker.consumer.run in this process: signals, bodies that block, forks, and what the program had before."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time

import pytest
from programs import run as run_program
from strangers import answering

from nullworker.consumer import current, run, stopping


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the process would be ended in the middle of a job; a body is taken for blocked after 50 ms."""
    would_exit = threading.Event()
    monkeypatch.setattr(stopping, "BLOCKED_SECONDS", 0.05)
    monkeypatch.setattr(stopping, "_exit_blocked", would_exit.set)
    return would_exit


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def listeners() -> list[threading.Thread]:
    """The threads that wait for signals."""
    return [thread for thread in threading.enumerate() if thread.name == "signals"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_the_body_and_afterwards_all_is_as_before(number: signal.Signals) -> None:
    before, seen = handlers(), list[bool]()

    async def body() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(current.stopping.is_set())

    run(body())
    assert seen == [True]
    assert not current.stopping.is_set()
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1
    for thread in listeners():
        thread.join(10)
        assert not thread.is_alive()


def test_what_the_body_raises_is_raised_and_afterwards_all_is_as_before() -> None:
    before = handlers()

    async def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(body())
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_body_that_takes_its_time_to_stop_is_not_blocked(exits: threading.Event) -> None:
    done: list[bool] = []

    async def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)
            done.append(True)

    run(body())
    assert done == [True]
    assert not exits.is_set()


def test_a_body_that_blocks_the_loop_is_ended_in_the_middle_of_its_job(exits: threading.Event) -> None:
    async def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits.wait(10)

    run(body())


def test_a_signal_of_the_programs_own_is_no_stop() -> None:
    seen: list[str] = []

    async def body() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.05)
        seen.append("goes on")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("handled"))
    try:
        run(body())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["handled", "goes on"]


@pytest.mark.parametrize("answers", [True, False], ids=["a worker that answers", "a worker that does not"])
async def test_in_the_middle_of_a_job_each_reservation_is_released_by_its_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    asked: list[tuple[bytes, object]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        asked.append((head.split(b" HTTP")[0], json.loads(await reader.readexactly(length))))
        if not answers:
            await asyncio.Event().wait()
        writer.write(b'HTTP/1.1 200 OK\r\nServer: nullworker\r\nContent-Length: 18\r\n\r\n{"released": true}')
        await writer.drain()

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stopping, "RELEASE_SECONDS", 5.0 if answers else 0.2)
    result = {"error": "the consumer was stopped in the middle of a job"}
    async with answering(answer) as place:
        for name in ("r1", "r2"):
            current.entered(f"http://{place}", name)
        try:
            began = time.perf_counter()
            await asyncio.to_thread(stopping._exit_blocked)
            assert time.perf_counter() - began < 4
        finally:
            for name in ("r1", "r2"):
                current.left(name)
    assert asked == [(b"POST /release", {"reservation_id": name, "result": result}) for name in ("r1", "r2")]
    assert codes == [1]
    assert [message.partition(":")[0] for message in caplog.messages] == ["reservation r1", "reservation r2"]


@pytest.mark.process
async def test_a_forked_child_has_signals_of_its_own_from_its_first_moment_on() -> None:
    """Before it can reset its handlers, a signal to it is kept, and not written to its parent's pipe."""
    script = """
import os, signal
child_hears = []
os.register_at_fork(after_in_child=lambda: child_hears and os.kill(os.getpid(), signal.SIGTERM))  # before all others
import asyncio
from nullworker.consumer import run

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

async def main():
    child_hears.append(True)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    print(end(pid))
    await asyncio.sleep(0.1)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(1000)

own = lambda *_: None
signal.signal(signal.SIGTERM, own)
pid = os.fork()
if pid == 0:
    os._exit(7 if signal.getsignal(signal.SIGTERM) is own else 1)
print(end(pid))
run(main())
"""
    # with a hash seed it is a new interpreter, in which nullworker is not imported yet; from 3.12 on a fork beside a
    # thread is warned of
    said = await run_program(sys.executable, "-c", script, PYTHONHASHSEED="0", PYTHONWARNINGS="ignore")
    assert said.split("\n") == [
        "7",
        "-15",
        "goes on",
        "",
    ]
