"""Somebody else's lock on the log is waited out before anybody hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import changed, post, secured, signed
from test_log import queue

from nullworker.errors import LogUnavailable
from nullworker.eventlog.opening import open_log
from nullworker.testing import FakeAutoscaler


@contextlib.contextmanager
def locked(db: Path, seconds: float | None = None) -> Iterator[None]:
    """A SQLite shell with an open transaction."""
    shell = sqlite3.connect(db, isolation_level=None, check_same_thread=False)
    shell.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(seconds or 0.0, shell.rollback)
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        if seconds is not None:
            timer.join()
        shell.close()


def test_an_append_waits_for_a_lock_of_a_moment(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log, locked(path, 0.3):
        assert queue(log, "a") == 1


def test_after_a_lock_that_lasts_writes_do_not_wait_until_one_has_worked(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        with locked(path):
            took = []
            for _ in range(3):
                started = time.perf_counter()
                with pytest.raises(LogUnavailable, match="locked") as refusal:
                    queue(log, "a")
                took.append(time.perf_counter() - started)
                assert refusal.value.momentary
        assert took[0] > 0.4
        assert max(took[1:]) < 0.2
        queue(log, "a")
        with locked(path, 0.3):
            queue(log, "b")


@pytest.mark.process
async def test_a_lock_of_a_moment_and_a_vacuum_are_told_to_nobody(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        for shell in ("lock", "vacuum"):
            if shell == "lock":
                with locked(worker.db, 0.3):
                    answer = await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": 0}))
            else:
                vacuum = asyncio.ensure_future(asyncio.to_thread(worker.sql, "VACUUM"))
                answer = await post(worker.url + "/reserve", signed(vast, worker.url, {"duration": 0}))
                await vacuum
            assert answer.status == 200
            assert (await worker.get("/readyz"))["ready"]
        assert not any(status["error_msg"] for status in vast.statuses)
        assert worker.sql("PRAGMA auto_vacuum") == [(2,)]


@pytest.mark.process
async def test_a_lock_that_lasts_refuses_claims_at_once_and_is_told_when_it_has_lasted(
    tmp_path: Path, vast: FakeAutoscaler
) -> None:
    worker = secured(tmp_path, vast, module=changed(nullworker__service__PATIENCE_SECONDS=1.5))
    async with worker:
        await worker.line("key_loaded")
        with locked(worker.db):
            refused = await post(worker.url + "/reserve", signed(vast, worker.url))
            assert (refused.status, refused.body["reason"]) == (503, "log_unavailable")
            assert (await worker.get("/readyz"))["ready"], "not yet"
            await vast.wait_for(lambda: "locked" in vast.statuses[-1]["error_msg"])
            assert not (await worker.get("/readyz"))["ready"]
        await worker.line("event_log_recovered")
        await vast.wait_for(lambda: vast.statuses[-1]["error_msg"] == "")
