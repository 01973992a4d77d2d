"""What one cycle, one hand-over and one start cost, counted and not timed. Whoever raises a number says why.

A cycle is `POST /reserve`, held, `POST /release`, both answered. The callers are in threads of their own and speak over
plain sockets, so that what is counted in the loop's thread is the worker's alone.
"""

from __future__ import annotations

import asyncio
import asyncio.selector_events
import contextlib
import io
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from harness import PATIENCE

import nullworker
from nullworker import logs
from nullworker.eventlog.opening import open_log
from nullworker.http.ports import Ports
from nullworker.settings import read_settings
from nullworker.worker import Worker

PACKAGE = str(Path(nullworker.__file__).parent)
SETTINGS = {"UNSECURED": "true", "WORKER_PORT": "0", "WORKER_HTTP_PORT": "0", "NULL_CONTROL_PORT": "0"}
#: Of a page of the write-ahead log (https://www.sqlite.org/fileformat2.html#the_write_ahead_log).
FRAME_BYTES, WAL_HEAD_BYTES = 4096 + 24, 32

#: At most so many. Commits are of the event log: the claim with its hold, and the release; statements are all that
#: SQLite runs, those of triggers too; pages are written to the write-ahead log; calls are of this package's functions,
#: with room for a timer that falls into the count.
CYCLE = {"commits": 2, "statements": 28, "pages": 6, "sends": 2, "lines": 3, "calls": 228}
HAND_OVER = {"commits": 1, "statements": 20, "pages": 3, "sends": 2, "lines": 2, "calls": 143}
#: Of a start with a log that is there: SQL statements of its open; modules of nullworker, and all that are imported.
START = {"statements": 26, "ours": 50, "modules": 480}


class Counted:
    """Counts what the worker does between `begin` and `end`, in the thread of the loop."""

    def __init__(self, worker: Worker, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
        self._worker, self._lines = worker, lines
        self._wal = Path(f"{worker.log.path}-wal")
        self._counts: Counter[str] = Counter()
        self._on = False
        worker.log.conn.set_trace_callback(self._statement)
        worker.log.on_append.append(self._commit)
        transport: Any = asyncio.selector_events._SelectorSocketTransport  # type: ignore[attr-defined]  # no public one
        for name in ("write", "writelines"):
            monkeypatch.setattr(transport, name, self._counting(getattr(transport, name)))

    def _counting(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self._counts["sends"] += self._on
            return send(*args)

        return counted

    def _statement(self, sql: str) -> None:
        self._counts["statements"] += self._on and not sql.startswith("--")  # those of triggers are comments

    def _commit(self, _: int, __: float) -> None:
        self._counts["commits"] += self._on

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self._counts["calls"] += 1

    def begin(self) -> None:
        self._counts.clear()
        self._pages, self._line_count = self._wal.stat().st_size, self._lines.getvalue().count("\n")
        self._on = True
        sys.setprofile(self._call)

    def end(self) -> dict[str, int]:
        sys.setprofile(None)
        self._on = False
        self._counts["lines"] = self._lines.getvalue().count("\n") - self._line_count
        self._counts["pages"] = (self._wal.stat().st_size - self._pages) // FRAME_BYTES
        return dict(self._counts)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[tuple[Worker, io.StringIO]]:
    lines = io.StringIO()
    logs.configure("console", "info", lines)
    with contextlib.closing(open_log(tmp_path / "log.db")) as log, Ports(read_settings(SETTINGS)) as ports:
        worker = Worker(log, ports)
        await worker.start()
        yield worker, lines
        await worker.stop()


class Caller:
    """A kept connection over which one request after another goes, in threads."""

    def __init__(self, port: int, pool: ThreadPoolExecutor) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._pool = pool

    def post(self, path: str) -> Awaitable[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._pool, self._post, path)

    def _post(self, path: str) -> bytes:
        self._socket.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        return self._socket.recv(65536)

    def close(self) -> None:
        self._socket.close()


async def until(worker: Worker, true: Callable[[], bool]) -> None:
    """Let the loop go on until something is so."""
    end = asyncio.get_running_loop().time() + PATIENCE
    while not true():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0)


def too_much(counted: dict[str, int], allowed: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What is above its number: counted, and allowed."""
    return {name: (counted.get(name, 0), most) for name, most in allowed.items() if counted.get(name, 0) > most}


async def test_a_cycle_and_a_hand_over_cost_no_more_than_they_did(
    worker: tuple[Worker, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, lines = worker
    counted = Counted(it, lines, monkeypatch)
    book = it.service.book
    with ThreadPoolExecutor(3) as pool:
        first, second, consumer = (
            Caller(port, pool)
            for port in (it.settings.worker_port, it.settings.worker_port, it.settings.null_control_port)
        )
        try:
            for _ in range(3):  # the last one counts: caches are warm then
                counted.begin()
                answer = first.post("/reserve")
                await until(it, lambda: book.held is not None)
                assert b'{"released":true}' in await consumer.post("/release")
                assert b'"released":"explicit"' in await answer
                cycle = counted.end()
            answers = [first.post("/reserve")]
            await until(it, lambda: book.held is not None)
            answers.append(second.post("/reserve"))
            await until(it, lambda: len(book.queue) == 1)
            counted.begin()
            await consumer.post("/release")
            await answers[0]
            hand_over = counted.end()
            await consumer.post("/release")
            await answers[1]
        finally:
            for caller in (first, second, consumer):
                caller.close()
    assert not too_much(cycle, CYCLE), cycle
    assert not too_much(hand_over, HAND_OVER), hand_over


def test_a_start_with_a_log_that_is_there_imports_and_asks_no_more_than_it_did(tmp_path: Path) -> None:
    script = """
import pathlib, sqlite3, sys

from nullworker.eventlog.opening import open_log
from nullworker.settings import read_settings
from nullworker.worker import Worker

asked = []
connect = sqlite3.connect


def traced(*args, **kw):
    conn = connect(*args, **kw)
    conn.set_trace_callback(asked.append)
    return conn


open_log(pathlib.Path(sys.argv[1])).close()
sqlite3.connect = traced
open_log(pathlib.Path(sys.argv[1])).close()
print(len(asked), sum(name.startswith("nullworker") for name in sys.modules), len(sys.modules))
"""
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log.db")], capture_output=True, text=True, check=True
    )
    start = dict(zip(START, map(int, told.stdout.split()), strict=True))
    assert not too_much(start, START), start


def test_the_counter_counts() -> None:
    assert too_much({"commits": 3, "sends": 1}, {"commits": 2, "sends": 1}) == {"commits": (3, 2)}
    assert sqlite3.threadsafety >= 1
