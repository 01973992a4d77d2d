"""A dispatcher whose disk is really full, under a real fleet."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatching import Dispatch, fleet
from harness import PATIENCE
from troubles import can_mount, fill, mount, size_of, unmount

pytestmark = pytest.mark.slow

FAST = ("--interval", "0.3", "--settle", "2", "--lifetime", "20")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For the ledger: a small file system where one can be mounted."""
    if not can_mount():
        yield tmp_path
        return
    small = tmp_path / "small"
    small.mkdir()
    mount(small)
    yield small
    unmount(small)


@contextlib.contextmanager
def full(dispatch: Dispatch) -> Iterator[None]:
    """A file system of one megabyte, filled to the last byte by somebody else."""
    filler = dispatch.ledger.parent / "filler"
    fill(filler)
    yield
    filler.unlink()


@contextlib.contextmanager
def limited(dispatch: Dispatch) -> Iterator[None]:
    """A quota: no file may grow beyond what the write-ahead log has now."""
    pid, unlimited = dispatch.process.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_of(f"{dispatch.ledger}-wal"), resource.RLIM_INFINITY))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


async def test_a_full_disk_opens_nothing_loses_nothing_and_is_said_in_one_line(tmp_path: Path, folder: Path) -> None:
    trouble = full if folder != tmp_path else limited
    async with fleet(tmp_path, max_workers=4) as (jobs, dev):
        jobs.put(2, 3.0)
        options = ("--queue", jobs.url, "--max", "4", "--ledger", str(folder / "ledger.db"), *FAST)
        async with Dispatch(tmp_path, dev, *options) as dispatch:
            dispatch.ledger = folder / "ledger.db"
            await dispatch.line("claim_attached", nth=2)
            with trouble(dispatch):
                jobs.put(6, 0.2)
                await dispatch.line("ledger_unwritable")
                for _ in range(int(PATIENCE * 10)):
                    if jobs.states().get("done") == 2:
                        break
                    await asyncio.sleep(0.1)
                await asyncio.sleep(1.5)
                assert jobs.states() == {"new": 6, "done": 2}
                status, ready = await dispatch.ask("/readyz")
                assert (status, ready["checks"]["ledger"]["ok"]) == (503, False)
            await dispatch.line("ledger_unwritable_over")
            await dispatch.line("claim_ended", nth=8)
            assert jobs.states() == {"done": 8}
            said = [line["event"] for line in dispatch.lines if str(line.get("event")).startswith("ledger_")]
            assert said == ["ledger_unwritable", "ledger_unwritable_over"]
            assert await dispatch.terminate() == 0
        held = [row["reason"] for row in dispatch.rows() if row["held_at"]]
        assert held == ["consumer_exit"] * 8
