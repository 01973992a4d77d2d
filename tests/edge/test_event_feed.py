"""GET /events with many readers, and after the log was replaced."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path

import aiohttp
import pytest
from harness import WorkerProcess, post
from pruning import add

from nullworker.aio import AutoResetEvent
from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_log
from nullworker.http.sse import AT_ONCE, EventFeed

READERS = 100


async def test_others_have_their_turn_between_the_readers_and_each_event_is_encoded_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = queries.events

    def counted(*args: object, after: int, **kwargs: object) -> object:
        asked.append(after)
        return read(*args, after=after, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(queries, "events", counted)
    with contextlib.closing(open_log(path)) as log, contextlib.ExitStack() as readers:
        feed = EventFeed(log)
        reads: list[bytes] = []

        async def reader(wakeup: AutoResetEvent) -> None:
            seq = 0
            while True:
                await wakeup.wait()
                seq, text = feed.after(seq)
                reads.append(text)

        wakeups = [AutoResetEvent() for _ in range(READERS)]
        for wakeup in wakeups:
            readers.enter_context(feed.reader(wakeup))
        tasks = [asyncio.ensure_future(reader(wakeup)) for wakeup in wakeups]
        await asyncio.sleep(0)
        add(log, "a", 0.0)
        add(log, "b", 0.0)
        turns = [0]
        while len(reads) < READERS:
            await asyncio.sleep(0)
            turns.append(len(reads))
        most = max(later - earlier for earlier, later in itertools.pairwise(turns))
        assert most <= AT_ONCE
        assert len(set(reads)) == 1
        assert asked == [0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(log.on_append) == 1, "one wakes all"
    assert log.on_append == []


async def test_a_feed_whose_last_reader_has_gone_serves_the_next(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        feed = EventFeed(log)
        for number in range(3):
            wakeup = AutoResetEvent()
            with feed.reader(wakeup):
                await asyncio.sleep(0)
                add(log, f"r{number}", 0.0)
                assert await wakeup.wait(5.0)
                assert feed.after(4 * number)[0] == 4 * number + 4
            assert feed.after(4 * number + 4) == (4 * number + 4, b"")


async def test_a_reader_of_a_log_that_was_replaced_is_told_and_gets_the_new_one(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await post(worker.url + "/reserve", {"duration": 0})
        async with aiohttp.ClientSession() as http:
            for after, expected in (("99", b": open\n\nevent: log_replaced\ndata: "), ("3", b": open\n\n")):
                headers = {"Last-Event-ID": after}
                async with http.get(worker.control + "/events", headers=headers) as stream:
                    text = b""
                    while not text.startswith(expected) or (after == "99" and text.count(b"\n\n") < 5):
                        text += await asyncio.wait_for(stream.content.readany(), 5.0)
                    if after == "99":
                        assert b'"last_seq":3}' in text
                        assert [text.count(b"id: %d\n" % seq) for seq in (1, 2, 3)] == [1, 1, 1]
                    else:
                        assert text == expected, "one that is up to date hears nothing yet"
