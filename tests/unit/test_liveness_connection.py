"""What the liveness connection of a consumer makes of each answer of its worker."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from strangers import answering

from nullworker.consumer import liveness
from nullworker.consumer.liveness import LivenessConnection


class Worker:
    """Gives one answer after another, the last one again and again. `asked`: the lines that it was asked with."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode().partition(" HTTP")[0])
        writer.write(self.answers[0] if len(self.answers) == 1 else self.answers.pop(0))
        await writer.drain()


def refusal(status: int, **content: Any) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


ATTACHED = b"HTTP/1.1 200 OK\r\nNullworker-Max-Hold: 90\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n:\n\r\n"
TAKEN = refusal(409, state="attached", error="another consumer is attached")
NOT_HELD = refusal(404, error="it is not held")
ENDED = refusal(409, state="released", error="it is not held any more")
TROUBLE = refusal(500, error="a fault")


@pytest.mark.parametrize(
    ("answers", "states"),
    [
        ((NOT_HELD,), ["over"]),
        ((ENDED,), ["over"]),
        ((TAKEN, NOT_HELD), ["taken", "over"]),
        ((TAKEN, TAKEN, ATTACHED, NOT_HELD), ["taken", "attached", "connecting", "over"]),
        ((ATTACHED, TROUBLE, ATTACHED, ENDED), ["attached", "connecting", "attached", "connecting", "over"]),
        ((TROUBLE, b"no HTTP\r\n\r\n", refusal(503), NOT_HELD), ["over"]),
    ],
    ids=["not held", "ended", "taken", "attached after all", "broken", "trouble"],
)
async def test_it_attaches_again_until_the_reservation_is_over(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[bytes, ...], states: list[str]
) -> None:
    monkeypatch.setattr(liveness, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(liveness, "BUSY_SECONDS", 0.01)
    worker, seen = Worker(*answers), list[str]()
    async with answering(worker.answer) as place:

        def changed() -> None:
            if seen[-1:] != [connection.state]:
                seen.append(connection.state)

        connection = LivenessConnection(f"http://{place}", "r 1", extend="1", changed=changed)
        connection.start()
        await asyncio.to_thread(connection.join, 20)
        assert not connection.is_alive()
    assert seen == states
    assert worker.asked == ["POST /attach?reservation_id=r%201&extend=1"] * len(answers)
    assert connection.max_hold == (90.0 if ATTACHED in answers else None)
    assert not liveness._own


@pytest.mark.parametrize(
    ("answer", "pause"),
    [(TAKEN, liveness.BUSY_SECONDS), (TROUBLE, liveness.RETRY_SECONDS)],
    ids=["taken", "trouble"],
)
async def test_it_does_not_ask_without_a_pause_and_a_close_ends_it(answer: bytes, pause: float) -> None:
    worker = Worker(answer)
    async with answering(worker.answer) as place:
        connection = LivenessConnection(f"http://{place}", "r", extend="1", changed=lambda: None)
        connection.start()
        await asyncio.sleep(pause / 2)
        assert len(worker.asked) == 1
        connection.close()
        await asyncio.to_thread(connection.join, 20)
        assert not connection.is_alive()


async def test_an_attached_one_passes_events_on_and_ends_at_once_when_it_is_closed() -> None:
    head, _, first = ATTACHED.partition(b"2\r\n")
    asked, changes, event, ended = 0, list[str](), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        await event.wait()
        writer.write(b"2\r\n" + first)
        assert await reader.read() == b""
        ended.set()

    def changed() -> None:
        changes.append(connection.state)
        loop.call_soon_threadsafe(event.set)

    async with answering(answer) as place:
        connection = LivenessConnection(f"http://{place}", "r", extend="1", changed=changed)
        connection.start()
        while len(changes) < 2:  # noqa: ASYNC110  # another thread changes it
            await asyncio.sleep(0.01)
        connection.close()
        await asyncio.wait_for(ended.wait(), 10)
        await asyncio.to_thread(connection.join, 10)
        assert not connection.is_alive()
    assert changes[:2] == ["attached", "attached"]
    assert asked == 1


async def test_it_attaches_to_the_worker_whose_address_it_was_given() -> None:
    worker = Worker(NOT_HELD)
    async with answering(worker.answer, host="127.0.0.2") as place:
        connection = LivenessConnection(f"http://{place}", "r", extend="all", changed=lambda: None)
        connection.start()
        await asyncio.to_thread(connection.join, 10)
    assert (connection.state, worker.asked) == ("over", ["POST /attach?reservation_id=r&extend=all"])


async def test_a_close_in_the_moment_before_it_attaches_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be attached to what is released, with nobody left who ends it."""
    worker = Worker(ATTACHED)
    async with answering(worker.answer) as place:
        connection = LivenessConnection(f"http://{place}", "r", extend="1", changed=lambda: None)
        keep = liveness.keep_from_children

        def keep_and_close(sock: socket.socket) -> None:
            keep(sock)
            connection.close()

        monkeypatch.setattr(liveness, "keep_from_children", keep_and_close)
        connection.start()
        await asyncio.to_thread(connection.join, 10)
        assert not connection.is_alive()
    assert (worker.asked, liveness._own) == ([], set())
