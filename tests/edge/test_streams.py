"""A log read that fails in the middle of a stream: the reader sees it, and no slot is lost."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from doors import ClaimTrace
from harness import PATIENCE

from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_log
from nullworker.http import sse
from nullworker.http.ports import Ports
from nullworker.settings import read_settings
from nullworker.worker import Worker

ANY_PORT = {"WORKER_PORT": "0", "WORKER_HTTP_PORT": "0", "NULL_CONTROL_PORT": "0"}


@pytest.fixture
async def worker(path: Path) -> AsyncIterator[Worker]:
    """A worker in the test's own loop, so that its log can be made to fail."""
    with contextlib.closing(open_log(path)) as log, Ports(read_settings({"UNSECURED": "true", **ANY_PORT})) as ports:
        worker = Worker(log, ports)
        await worker.start()
        yield worker
        await worker.stop()


@contextlib.asynccontextmanager
async def asked(port: int, line: bytes, body: bytes = b"") -> AsyncIterator[ClaimTrace]:
    wire = ClaimTrace(*await asyncio.open_connection("127.0.0.1", port))
    await wire.send(b"%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s" % (line, len(body), body))
    try:
        yield wire
    finally:
        await wire.close()


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """From now on the log cannot be read."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(queries, "events", fails)


async def test_what_waited_for_the_log_comes_into_the_streams_when_it_is_written(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_SECONDS", 1e6)
    reserve, port = b"POST /reserve", worker.settings.worker_port
    async with (
        asked(worker.settings.null_control_port, b"GET /events") as everything,
        asked(port, reserve, b"{}"),
        asked(port, reserve, b'{"stream": true}') as own,
    ):
        await asyncio.wait_for(everything.reader.readuntil(b'"seq":3'), PATIENCE)
        held = worker.service.book.held
        assert held is not None
        worker.log.conn.execute("PRAGMA query_only = ON")
        worker.service.release(held.id)
        assert worker.service.book.held is None, "nobody is held before that is in the log"
        worker.log.conn.execute("PRAGMA query_only = OFF")
        await asyncio.wait_for(everything.reader.readuntil(b'"released"'), PATIENCE)
        await asyncio.wait_for(own.reader.readuntil(b'"held"'), PATIENCE)


ERRORS = [sqlite3.OperationalError("disk I/O error"), ValueError("a bug")]


@pytest.mark.parametrize("error", ERRORS)
async def test_an_error_in_a_reservations_stream_cuts_it_off_and_frees_the_slot(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]], error: Exception
) -> None:
    async with asked(worker.settings.worker_port, b"POST /reserve", b'{"stream": true}') as wire:
        await asyncio.wait_for(wire.reader.readuntil(b'"held"'), PATIENCE)
        held = worker.service.book.held
        assert held is not None
        fail(monkeypatch, error)
        worker.service.extend(held.id, 60)  # news, to be read
        assert b"HTTP/1.1" not in await wire.end()
        assert (held.state, held.reason) == ("cancelled", "worker_error")
        assert "stream_cut_off" in logged()


@pytest.mark.parametrize("error", ERRORS)
async def test_an_error_in_the_stream_of_all_events_cuts_that_off_and_nothing_else(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]], error: Exception
) -> None:
    async with asked(worker.settings.null_control_port, b"GET /events") as wire:
        await asyncio.wait_for(wire.reader.readuntil(b": open"), PATIENCE)
        fail(monkeypatch, error)
        async with asked(worker.settings.worker_port, b"POST /reserve", b"{}"):
            assert b"HTTP/1.1" not in await wire.end()
            assert worker.service.book.held is not None, "who only watches ends nothing"
            assert "stream_cut_off" in logged()
