"""A log whose newest part is gone is noticed, and what was refused while its disk failed is not in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from harness import WorkerProcess, leave_session, post
from test_log import queue
from troubles import TROUBLES, Injected

from nullworker.clock import SystemClock, iso
from nullworker.errors import CannotStart, LogUnavailable
from nullworker.eventlog import opening
from nullworker.eventlog.lock import Lock
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from stress.faulty_disk import FaultyDisk

# -- a -wal that was lost or harmed ----------------------------------------------------------------------------------


def removed(wal: Path) -> None:
    wal.unlink()


def removed_with_its_index(wal: Path) -> None:
    wal.unlink()
    Path(str(wal).replace("-wal", "-shm")).unlink()


def emptied(wal: Path) -> None:
    os.truncate(wal, 0)


def cut(wal: Path) -> None:
    os.truncate(wal, wal.stat().st_size - 4096 - 24)


def flipped_in_its_header(wal: Path) -> None:
    flip(wal, 17)


def flipped_in_its_first_frame(wal: Path) -> None:
    flip(wal, 32 + 24 + 100)


def flip(wal: Path, at: int) -> None:
    content = bytearray(wal.read_bytes())
    content[at] ^= 1
    wal.write_bytes(content)


HARMS = [removed, removed_with_its_index, emptied, cut, flipped_in_its_header, flipped_in_its_first_frame]


def killed(path: Path, events: int = 5) -> bytes:
    """A log as a worker leaves it that was killed; its -wal."""
    disk = FaultyDisk(path.parent, Random(1))
    disk.install()
    with contextlib.closing(open_log(path)) as log:
        for number in range(events):
            queue(log, f"r{number}")
        disk.kill()
    disk.remove()
    return Path(f"{path}-wal").read_bytes()


@pytest.mark.parametrize("harm", HARMS)
def test_a_log_whose_newest_part_is_gone_is_set_aside(
    path: Path, harm: Callable[[Path], None], logged: Callable[[], list[str]]
) -> None:
    whole = killed(path)
    if harm is removed_with_its_index:
        Path(f"{path}-shm").touch()
    harm(Path(f"{path}-wal"))
    left = {suffix: file.read_bytes() for suffix in ("", "-wal") if (file := Path(f"{path}{suffix}")).exists()}
    with pytest.raises(CannotStart, match=r"is damaged: the events \d to 5 are gone: its -wal was removed"):
        open_log(path, fix=False)
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 0
        queue(log, "new")
    (aside,) = path.parent.glob("nullworker.db.damaged-*[0-9]")
    assert logged() == ["event_log_damaged"]
    assert aside.read_bytes() == left[""]
    if harm not in (removed, removed_with_its_index):
        assert Path(f"{aside}-wal").read_bytes() == left["-wal"], "for whoever wants to save what can be saved"
    assert len(whole) > 4096
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 1, "and the new log is not held against what the old one had noted"


def test_a_log_that_is_whole_is_used_however_its_worker_ended(path: Path) -> None:
    killed(path)
    for seq in (5, 6):
        with contextlib.closing(open_log(path)) as log:
            assert log.last_seq == seq
            queue(log, f"s{seq}")
    assert not list(path.parent.glob("*damaged*"))


def test_a_log_of_another_name_or_a_note_that_cannot_be_read_is_nothing_to_go_by(path: Path) -> None:
    killed(path)
    for lock in (b"", b"pid 1, since 2026\n", b"\xff" * 300):
        Path(f"{path}-wal").unlink(missing_ok=True)
        Path(f"{path}.lock").write_bytes(lock)
        open_log(path).close()
    killed(path.with_name("other.db"))
    Path(f"{path}.lock").write_bytes(Path(f"{path.with_name('other.db')}.lock").read_bytes())
    open_log(path).close()
    assert not list(path.parent.glob("*damaged*"))


def test_what_a_power_cut_takes_from_a_log_that_is_not_synced_is_said_and_the_rest_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    with contextlib.closing(open_log(path, sync="normal")) as log:
        queue(log, "a")
        log.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        kept = path.read_bytes()
        queue(log, "b")
    path.write_bytes(kept)
    monkeypatch.setattr(opening, "boot_id", lambda: "another boot")
    with contextlib.closing(open_log(path, sync="normal")) as log:
        assert log.last_seq == 1
        queue(log, "c")
    assert logged() == ["events_lost"]
    path.write_bytes(kept)
    monkeypatch.undo()
    with contextlib.closing(open_log(path, sync="normal")) as log:
        assert log.last_seq == 0, "in the same boot no power was cut"


def test_a_new_log_has_its_tables_in_the_file_itself(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        alone = path.with_name("alone.db")
        alone.write_bytes(path.read_bytes())
        log_id = log.log_id
    with contextlib.closing(open_log(alone)) as copy:
        assert copy.log_id == log_id


@pytest.mark.parametrize("suffixes", [["-wal"], ["-shm"], ["-wal", "-shm"]], ids="".join)
def test_a_wal_that_is_removed_under_a_log_is_noticed_and_nothing_is_lost(
    path: Path, suffixes: list[str], logged: Callable[[], list[str]]
) -> None:
    with contextlib.closing(open_log(path)) as log:
        queue(log, "a")
        for suffix in suffixes:
            Path(f"{path}{suffix}").unlink()
        log.probe()
        assert logged() == ["wal_removed"]
        alone = path.with_name("alone.db")
        alone.write_bytes(path.read_bytes())
        with contextlib.closing(open_log(alone)) as copy:
            assert copy.last_seq == 1
        queue(log, "b")
        log.probe()
        assert logged() == ["wal_removed"], "once"
        assert Path(f"{path}-wal").stat().st_size > 0
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 2


def test_a_wal_that_is_removed_while_somebody_reads_is_saved_when_he_has_ended(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        queue(log, "a")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM events").fetchone()
            queue(log, "b")
            os.unlink(f"{path}-wal")
            log.conn.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(LogUnavailable, match=r"was removed or replaced .*; its content cannot") as refusal:
                log.probe()
            assert refusal.value.momentary, "it is waited out"
        queue(log, "c")
    with contextlib.closing(open_log(path)) as log:
        assert [event.reservation_id for _, event in log.live()] == ["a", "b", "c"]


@pytest.mark.process
async def test_a_worker_whose_wal_is_removed_says_so_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        held = asyncio.ensure_future(post(worker.url + "/reserve", {}))
        await worker.line("reservation_held")
        os.unlink(f"{worker.db}-wal")
        await worker.release()
        assert (await held).status == 200
        assert (await worker.line("wal_removed"))["level"] == "error"
        await worker.kill()
        await worker.start()
        assert worker.story() == [("queued", None), ("held", None), ("released", "explicit")]


def lose(db: Path) -> None:
    """It is as if seven more events had been there."""
    lock = Path(f"{db}.lock")
    lock.write_bytes(lock.read_bytes().replace(f"event {2:020}".encode(), f"event {9:020}".encode()))


@pytest.mark.process
async def test_a_worker_says_that_its_newest_part_is_gone(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path)
    leave_session(worker.db, begun=SystemClock().now())
    async with worker:
        await worker.kill()
        lose(worker.db)
        await worker.start()
        line = await worker.line("event_log_damaged")
        assert "the events 3 to 9 are gone" in line["error"]
        assert os.path.basename(line["set_aside"]) in os.listdir(tmp_path)


# -- a sync that fails -----------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(tmp_path, Random(1))
    disk.install()
    yield disk
    disk.remove()


def restarted(log: EventLog, disk: FaultyDisk) -> EventLog:
    disk.kill()
    log.close()
    disk.start()
    disk.deaf = disk.full = 0.0
    return open_log(log.path)


@pytest.mark.parametrize("taken_back", [True, False])
def test_what_a_failed_sync_has_left_is_found_by_a_start_unless_it_is_taken_back(
    path: Path, disk: FaultyDisk, *, taken_back: bool
) -> None:
    log = open_log(path)
    queue(log, "a")
    disk.deaf = 1.0
    with pytest.raises(LogUnavailable, match="disk I/O error"):
        queue(log, "b")
    if taken_back:
        log.take_back()
    with contextlib.closing(restarted(log, disk)) as log:
        assert log.last_seq == (1 if taken_back else 2)
        queue(log, "c")
        assert log.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_taken_back_on_a_disk_that_fails_altogether_is_taken_back_by_the_next_write(
    path: Path, disk: FaultyDisk
) -> None:
    log = open_log(path)
    disk.deaf = 1.0
    with pytest.raises(LogUnavailable):
        queue(log, "a")
    disk.full = 1.0
    log.take_back()
    disk.full = 0.0
    with pytest.raises(LogUnavailable):
        log.probe()
    with contextlib.closing(restarted(log, disk)) as log:
        assert log.last_seq == 0


def test_a_log_is_synced_as_before_when_something_was_taken_back(path: Path, disk: FaultyDisk) -> None:
    with contextlib.closing(open_log(path)) as log:
        log.take_back()
        assert log.conn.execute("PRAGMA synchronous").fetchone() == (2,)
        assert not log.conn.in_transaction


@pytest.mark.process
@pytest.mark.skipif(Injected not in TROUBLES, reason="needs strace")
async def test_an_extension_that_got_503_is_not_true_after_a_kill(tmp_path: Path) -> None:
    trouble = Injected(tmp_path)
    async with WorkerProcess(tmp_path) as worker:
        created = await post(worker.url + "/session/create", {"lifetime": 60})
        (before,) = worker.sql("SELECT count(*) FROM events")
        await trouble.begin(worker)
        refused = await post(worker.control + "/extend", {"seconds": 3000})
        assert (refused.status, refused.body["reason"]) == (503, "log_unavailable")
        os.kill(worker.process.pid, signal.SIGKILL)
        await worker.process.wait()
        await trouble.over()
        assert worker.sql("SELECT count(*) FROM events") == [before]
        await worker.start()
        held = await worker.get("/reservation")
        assert held["id"] == created.body["session_id"]
        assert held["ends_at"] < iso(SystemClock().now() + 60)


# -- the lock --------------------------------------------------------------------------------------------------------


def test_a_hard_link_to_a_log_is_that_log(path: Path) -> None:
    with contextlib.closing(open_log(path)):
        link = path.with_name("link.db")
        os.link(path, link)
        with pytest.raises(CannotStart, match="belongs to a worker that is running"):
            open_log(link)


def test_a_lock_that_is_a_link_is_refused_and_its_target_is_not_touched(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("precious")
    Path(f"{path}.lock").symlink_to(target)
    with pytest.raises(CannotStart, match="cannot be made: Too many levels of symbolic links; set NULL_EVENT_LOG"):
        open_log(path)
    assert target.read_text() == "precious"


def test_a_note_that_cannot_be_written_stops_nobody(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        path.touch()
        lock = Lock(path, sync="full")
        os.close(lock._file)
        lock.note("id", 1)
