"""The sink on a real log against a real receiver: in order, at least once, never lost for a wrong answer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from programs import until
from receivers import Receiver

from nullworker import sink as module
from nullworker.clock import wall
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held, Queued, SessionTerms
from nullworker.sink import Sink, Target, cursor_name

_numbers = itertools.count()


def append(log: EventLog, number: int = 1, metadata: dict[str, Any] | None = None, result: Any = "done") -> None:
    """So many reservations, of three events each."""
    for _ in range(number):
        rid, at, seq = f"r{next(_numbers)}", wall(), log.last_seq
        terms = SessionTerms(60, on_close_route="http://10.0.0.9/x", on_close_payload={"token": "t0ken"})
        queued = Queued("session", 60, at, metadata=metadata, session=terms, auth_sha256="f" * 64)
        log.append(
            [
                (seq + 1, Event(at, rid, "queued", None, queued)),
                (seq + 2, Event(at, rid, "held", None, Held(at + 60))),
                (seq + 3, Event(at, rid, "released", "explicit", Ended(result))),
            ]
        )


@contextlib.asynccontextmanager
async def sink_of(log: EventLog, url: str, **target: Any) -> AsyncIterator[tuple[Sink, Counter[str]]]:
    """A sink that runs."""
    counts: Counter[str] = Counter()
    told = Target(url, **{"token": None, "form": "cloudevents", "with_results": False, "with_metadata": True, **target})
    made = Sink(told, log, wall, lambda name, n: counts.update({name: n}), instance="7", own_url="http://w")
    log.on_append.append(made.appended)
    task = asyncio.ensure_future(made.run())
    try:
        yield made, counts
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        log.on_append.remove(made.appended)
        await made.close()


def order(number: int) -> list[int]:
    return list(range(1, number + 1))


async def test_what_is_in_the_log_is_sent_in_order_and_once(log: EventLog) -> None:
    append(log, 5)
    async with Receiver() as receiver, sink_of(log, receiver.url) as (sink, counts):
        await receiver.until(lambda it: it.seqs == order(15))
        append(log, 3)
        await receiver.until(lambda it: it.seqs == order(24) and sink.backlog == 0)
        assert (sink.trouble, receiver.told) == (None, ["started"])
        assert counts["accepted"] == len(receiver.got)
        [key] = {got.headers["Nullworker-Log-Key"] for got in receiver.got}
        assert key == log.sink_key
        assert receiver.accepted[-1]["source"] == f"nullworker/7/{log.log_id}"


async def test_cursor_goes_on_over_a_restart_and_belongs_to_the_url(log: EventLog, path: Path) -> None:
    append(log, 5)
    async with Receiver() as receiver, Receiver() as other:
        async with sink_of(log, receiver.url) as (sink, _):
            await receiver.until(lambda it: it.seqs == order(15) and sink.backlog == 0)
        log.close()
        log = open_log(path)
        append(log)
        async with sink_of(log, receiver.url):
            await receiver.until(lambda it: len(it.seqs) >= 18)
        assert receiver.seqs == order(18)
        async with sink_of(log, other.url):
            await other.until(lambda it: it.seqs == order(18))
        log.close()


async def test_many_events_go_in_batches_and_few_at_most_five_times_a_second(log: EventLog) -> None:
    append(log, 250)
    async with Receiver() as receiver, sink_of(log, receiver.url):
        await receiver.until(lambda it: len(it.seqs) == 750)
        assert max(len(got.events) for got in receiver.got) == 500
        posts = len(receiver.got)
        began = asyncio.get_running_loop().time()
        for _ in range(60):
            append(log)
            await asyncio.sleep(0.01)
        await receiver.until(lambda it: len(it.seqs) == 930)
        assert len(receiver.got) - posts <= 2 + (receiver.got[-1].at - began) / 0.2


async def test_event_after_a_quiet_moment_is_sent_at_once(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACE_SECONDS", 4.0)
    async with Receiver() as receiver, sink_of(log, receiver.url):
        await receiver.until(lambda it: it.told == ["started"])
        await asyncio.sleep(4.1)
        append(log)
        appended = asyncio.get_running_loop().time()
        await receiver.until(lambda it: it.seqs == order(3))
        assert receiver.got[-1].at - appended < 2


async def test_batch_stays_below_a_mebibyte(log: EventLog) -> None:
    append(log, 60, result="x" * 60_000)
    async with Receiver() as receiver, sink_of(log, receiver.url, with_results=True):
        await receiver.until(lambda it: it.seqs == order(180))
        assert max(len(got.body) for got in receiver.got) < 1 << 20
        assert sum(len(got.body) for got in receiver.got) > 3 << 20


@pytest.mark.parametrize("status", [301, 401, 403, 404, 408, 409, 415, 429, 500, 503])
async def test_answer_that_says_nothing_of_the_body_loses_nothing(
    log: EventLog, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.01))
    answers = iter([200, status, status])
    append(log)
    async with Receiver(lambda events: next(answers, 200)) as receiver, sink_of(log, receiver.url) as (_, counts):
        await receiver.until(lambda it: it.seqs == order(3))
        append(log)
        await receiver.until(lambda it: it.seqs == order(6))
        assert counts["failed"] == 2
        assert counts["dead_lettered"] == 0
        assert receiver.told == ["started"]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_one_event_that_is_refused_is_set_aside_and_the_others_arrive(log: EventLog, status: int) -> None:
    append(log, 3)

    def refuse(events: list[dict[str, Any]]) -> int:
        return status if any(event["id"].startswith("5-") for event in events) else 200

    async with Receiver(refuse) as receiver, sink_of(log, receiver.url) as (sink, counts):
        await receiver.until(lambda it: it.seqs == [1, 2, 3, 4, 6, 7, 8, 9] and sink.backlog == 0)
        assert counts["dead_lettered"] == 1
    [(name, seq, outcome, detail)] = log.conn.execute("SELECT name, seq, outcome, detail FROM settled").fetchall()
    assert (name, seq, outcome, detail) == (
        cursor_name(receiver.url, log.sink_key),
        5,
        "refused",
        f"it answered {status}",
    )


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_nothing_is_set_aside_by_a_receiver_that_takes_nothing(
    log: EventLog, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.01))
    append(log, 2)
    async with Receiver(lambda events: status) as receiver, sink_of(log, receiver.url) as (sink, counts):
        await receiver.until(lambda it: len([got for got in it.got if len(got.events) == 1]) > 4)
        assert (sink.backlog, counts["dead_lettered"]) == (6, 0)
        receiver.answer = lambda events: 200
        await receiver.until(lambda it: it.seqs == order(6))
    assert log.conn.execute("SELECT count(*) FROM settled").fetchone() == (0,)


async def test_first_event_that_is_refused_is_set_aside_once_another_was_taken(log: EventLog) -> None:
    append(log)
    first = lambda events: 422 if any(event["id"].startswith("1-") for event in events) else 200  # noqa: E731  # short
    async with Receiver(first) as receiver, sink_of(log, receiver.url) as (_, counts):
        await receiver.until(lambda it: it.seqs == [2, 3])
        assert counts["dead_lettered"] == 1


async def test_receiver_that_is_down_gets_everything_when_it_is_back(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.01))
    async with Receiver() as receiver:
        url = receiver.url
    append(log, 2)
    async with sink_of(log, url) as (sink, counts):
        await until(lambda: counts["failed"] > 2)
        assert sink.backlog == 6
        assert sink.trouble is not None
        assert "connection refused" in sink.trouble


async def test_outage_is_said_when_it_begins_when_its_reason_changes_and_once_a_minute(
    log: EventLog, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    async def fails(status: int) -> int:
        failed, receiver.answer = counts["failed"], lambda events: status
        await until(lambda: counts["failed"] >= failed + 4)
        return len(logged())

    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(module, "PACE_SECONDS", 0.01)
    async with Receiver(lambda events: 503) as receiver, sink_of(log, receiver.url) as (sink, counts):
        assert await fails(503) == 1
        assert await fails(404) == 2
        receiver.answer = lambda events: 200
        append(log)
        await until(lambda: sink.backlog == 0)
        receiver.answer = lambda events: 404
        append(log)
        await until(lambda: len(logged()) == 3)  # another outage for the same reason
        monkeypatch.setattr(module, "WARN_SECONDS", 0.0)
        assert await fails(503) > 5


async def test_redirect_is_not_followed(log: EventLog) -> None:
    append(log)
    async with Receiver() as elsewhere, Receiver(lambda events: 307) as receiver:
        receiver.location = elsewhere.url
        async with sink_of(log, receiver.url) as (_, counts):
            await until(lambda: counts["failed"] > 1)
        assert elsewhere.got == []


async def test_last_events_and_the_stop_arrive_although_most_tries_fail(log: EventLog) -> None:
    tries = itertools.count(-10)  # ten failures, and then two of three: with growing pauses it would take a minute
    async with Receiver() as receiver, sink_of(log, receiver.url) as (sink, _):
        await receiver.until(lambda it: it.told == ["started"])
        receiver.answer = lambda events: 503 if (number := next(tries)) < 0 or number % 3 else 200
        append(log, 250)
        await asyncio.wait_for(sink.finish(12), 13)
        assert sink.backlog == 0
        assert receiver.seqs == order(750)
        assert receiver.told == ["started", "stopped"]
        assert receiver.accepted[-1]["type"] == "nullworker.worker.stopped"


async def test_end_does_not_wait_for_a_receiver_that_is_silent(log: EventLog, logged: Callable[[], list[str]]) -> None:
    async with Receiver(lambda events: 60.0) as receiver, sink_of(log, receiver.url) as (sink, _):
        append(log)
        await receiver.until(lambda it: bool(it.got))
        began = asyncio.get_running_loop().time()
        await sink.finish(1.0)
        assert 0.9 < asyncio.get_running_loop().time() - began < 1.5
        assert sink.backlog == 3
    assert logged() == ["sink_backlog_left"]


async def test_call_under_way_gives_way_to_another_try_when_the_worker_stops(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_CALL_SECONDS", 0.2)
    async with Receiver() as receiver, sink_of(log, receiver.url) as (sink, _):
        await receiver.until(lambda it: it.told == ["started"])
        receiver.answer = lambda events: 60.0
        append(log)
        await receiver.until(lambda it: it.got[-1].status == -1)
        receiver.answer = lambda events: 200
        await asyncio.wait_for(sink.finish(5), 2)
        assert receiver.seqs == order(3)


async def test_idle_worker_says_that_it_is_alive_and_what_its_clock_says(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALIVE_SECONDS", 0.1)
    async with Receiver() as receiver, sink_of(log, receiver.url):
        await receiver.until(lambda it: it.told[:3] == ["started", "alive", "alive"])
        assert abs(receiver.accepted[-1]["data"]["clock"] - wall()) < 5


async def test_ndjson_token_and_what_is_left_out(log: EventLog) -> None:
    append(log, metadata={"job": "a-7"}, result={"secret": "in the result"})
    kept = {"token": "t0ken", "form": "ndjson", "with_metadata": False}
    async with Receiver() as receiver, sink_of(log, receiver.url, **kept):
        await receiver.until(lambda it: it.seqs == order(3))
        assert {got.headers["Authorization"] for got in receiver.got} == {"Bearer t0ken"}
        assert {got.headers["Content-Type"] for got in receiver.got} == {"application/x-ndjson"}
        text = json.dumps(receiver.accepted)
        assert not any(word in text for word in ("fff", "10.0.0.9", "t0ken", "a-7", "in the result"))


async def test_pruning_waits_for_the_sink_and_what_was_pruned_without_it_is_said(
    log: EventLog, logged: Callable[[], list[str]]
) -> None:
    append(log, 3)
    for name in ("worker_status", "delete_requests"):
        log.move_cursor(name, 9)
    done = "SELECT count(*) FROM done_with"
    async with Receiver() as receiver:
        async with sink_of(log, receiver.url) as (sink, _):
            await receiver.until(lambda it: it.seqs == order(9))
            append(log, 2)
            await receiver.until(lambda it: it.seqs == order(15) and sink.backlog == 0)
        append(log, 2)
        log.settle("callbacks", range(22), wall(), "delivered")
        for name in ("worker_status", "delete_requests"):
            log.move_cursor(name, 21)
        assert log.conn.execute(done).fetchone() == (5,), "the last two have not been sent"
        log.set_sink(None)
        assert log.conn.execute(done).fetchone() == (6,), "all but the last of the log"
        log.prune([log.conn.execute("SELECT reservation_id FROM events WHERE seq = 16").fetchone()[0]])
        async with sink_of(log, receiver.url) as (_, counts):
            await receiver.until(lambda it: it.seqs == [*order(15), 19, 20, 21])
            assert counts["pruned"] == 3
    assert logged() == ["events_pruned_unsent"]


def test_no_secret_of_the_url_is_in_the_log(log: EventLog) -> None:
    name = cursor_name("https://user:passw0rd@fleet.example.com/events?token=t0ken", log.sink_key)
    assert name.startswith("sink:")
    assert not any(word in name for word in ("passw0rd", "t0ken", "fleet"))
    assert name != cursor_name("https://user:passw0rd@fleet.example.com/events?token=t0ken", "another log's key")
