"""A damaged log is set aside, never deleted; a file of another program or a newer version is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import WorkerProcess, leave_session, post
from test_log import open_files, queue

from nullworker.clock import SystemClock
from nullworker.errors import CannotStart, LogDamaged
from nullworker.eventlog.opening import open_for_reading, open_log
from nullworker.fsm.events import Ended, Event, Queued, from_row


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def garbage(db: Path) -> None:
    db.write_bytes(random.Random(1).randbytes(50_000))


def truncated(db: Path) -> None:
    os.truncate(db, db.stat().st_size // 2)


def flipped(db: Path) -> None:
    """Every page but the first is noise."""
    page = 4096
    noise = random.Random(1).randbytes(db.stat().st_size - page)
    db.write_bytes(db.read_bytes()[:page] + noise)


def emptied_of_its_tables(db: Path) -> None:
    conn = sqlite3.connect(db)
    conn.execute("DROP TABLE live")
    conn.close()


def contradictory(db: Path) -> None:
    """A reservation that is live by one table and over by the other."""
    conn = sqlite3.connect(db)
    conn.execute("DROP TRIGGER live_ended")
    conn.execute("INSERT INTO events VALUES (3, 0, 'old', 'expired', 'duration_elapsed', '{}')")
    conn.commit()
    conn.close()


@pytest.mark.process
@pytest.mark.parametrize("damage", [garbage, truncated, flipped, emptied_of_its_tables, contradictory])
async def test_a_damaged_log_is_set_aside_and_the_worker_starts(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    worker = WorkerProcess(tmp_path)
    leave_session(worker.db, begun=SystemClock().now())
    damage(worker.db)
    before = worker.db.read_bytes()
    async with worker:
        line = await worker.line("event_log_damaged")
        assert (line["level"], line["path"]) == ("error", str(worker.db))
        assert line["set_aside"].startswith(f"{worker.db}.damaged-")
        assert read(line["set_aside"]) == before
        assert worker.story() == []
        held = asyncio.ensure_future(post(worker.url + "/reserve", {}))
        await worker.line("reservation_held")
        assert await worker.release() == {"released": True}
        assert (await held).status == 200


@pytest.mark.process
async def test_damage_that_only_a_write_meets_is_found_at_the_next_start(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path)
    with contextlib.closing(open_log(worker.db)) as log:
        terms = Queued(kind="request", duration_cap=60, give_up_at=0)
        expired = Event(0, "old", "expired", "queue_full", Ended())
        log.append([(1, Event(0, "old", "queued", None, terms)), (2, expired)])
    conn = sqlite3.connect(worker.db)
    with conn:  # nothing is owed or was held, so a start has no reason to look there
        conn.executemany("INSERT INTO cursors VALUES (?, 2)", [("worker_status",), ("delete_requests",)])
    ((page,),) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events_by_reservation'")
    conn.close()
    with worker.db.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(random.Random(1).randbytes(4096))
    async with worker:  # what is open, nothing, can be read
        refused = await post(worker.url + "/reserve", {})
        assert (refused.status, refused.body["reason"]) == (503, "log_unavailable")
        assert "damaged" in (await worker.get("/readyz"))["checks"]["log"]["why"]
        await worker.terminate()
        await worker.start()
        assert read((await worker.line("event_log_damaged"))["set_aside"])
        held = asyncio.ensure_future(post(worker.url + "/reserve", {}))
        await worker.line("reservation_held")
        assert await worker.release() == {"released": True}
        assert (await held).status == 200


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A database of another program, where the log should be."""
    db = tmp_path / "nullworker.db"
    conn = sqlite3.connect(db)
    conn.execute("CREATE TABLE theirs (x)")
    conn.close()
    return db


async def refuses_to_start(folder: Path, *words: str) -> None:
    worker = WorkerProcess(folder)
    before = worker.db.read_bytes()
    await worker.spawn()
    assert await worker.exit_code() == 1
    said = json.dumps(worker.lines)
    assert all(word in said for word in (str(worker.db), *words)), said
    assert "Traceback" not in said
    assert worker.db.read_bytes() == before


@pytest.mark.process
async def test_a_log_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    db = tmp_path / "nullworker.db"
    leave_session(db, begun=SystemClock().now())
    conn = sqlite3.connect(db)
    conn.execute("PRAGMA user_version = 99")
    conn.close()
    await refuses_to_start(tmp_path, "newer", "99", "NULL_EVENT_LOG")


@pytest.mark.process
async def test_a_database_of_another_program_is_refused(tmp_path: Path, strange: Path) -> None:
    await refuses_to_start(tmp_path, "another program", "NULL_EVENT_LOG")
    with contextlib.closing(sqlite3.connect(strange)) as conn:
        assert conn.execute("SELECT count(*) FROM theirs").fetchall() == [(0,)]


# -- the file by itself ------------------------------------------------------------------------------------------

DAMAGE = b"no database at all" * 100


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("damaged", "is damaged: .*; the next start of its worker sets it aside"),
        ("user_version", "was written by a newer nullworker .*log version 99, this one knows 1.*update nullworker"),
        ("application_id", "is a database of another program; set NULL_EVENT_LOG"),
    ],
)
def test_a_log_that_cannot_be_opened_is_not_changed_or_locked(path: Path, trouble: str, says: str) -> None:
    """A command that only looks, or an older version, costs nobody his log."""
    with contextlib.closing(open_log(path)) as log:
        queue(log, "a")
    if trouble == "damaged":
        path.write_bytes(DAMAGE)
    else:
        with contextlib.closing(sqlite3.connect(path)) as stranger:
            stranger.execute(f"PRAGMA {trouble} = 99")
    before, files = path.read_bytes(), open_files()
    for _ in range(2):
        with pytest.raises(CannotStart, match=says):
            open_log(path, fix=trouble != "damaged")
    assert (path.read_bytes(), open_files()) == (before, files)
    assert not list(path.parent.glob("*damaged*"))
    if trouble != "damaged":
        with pytest.raises(CannotStart, match=says) as refusal:
            open_for_reading(path)
        assert (open_files(), refusal.type) == (files, CannotStart)  # an error that is kept keeps no file open


def test_a_damaged_log_is_set_aside_and_another_begins(path: Path, logged: Callable[[], list[str]]) -> None:
    path.write_bytes(DAMAGE)
    Path(f"{path}.suspect").touch()
    with contextlib.closing(open_log(path)) as log:
        assert queue(log, "a") == 1
    (aside,) = path.parent.glob("nullworker.db.damaged-*")
    assert aside.read_bytes() == DAMAGE
    assert logged() == ["event_log_damaged"]
    assert not Path(f"{path}.suspect").exists()


def renamed(db: Path) -> None:
    conn = sqlite3.connect(db)
    conn.execute("ALTER TABLE meta RENAME COLUMN value TO content")
    conn.close()


def spoiled(db: Path) -> None:
    """What was asked for is no JSON any more."""
    conn = sqlite3.connect(db)
    conn.execute("PRAGMA ignore_check_constraints = ON")
    conn.execute("DROP TRIGGER events_are_not_changed")
    conn.execute("UPDATE events SET data = '{' WHERE kind = 'queued'")
    conn.commit()
    conn.close()


@pytest.mark.parametrize(
    ("damage", "ended"),
    [
        (emptied_of_its_tables, None),
        (renamed, None),
        (contradictory, None),
        (spoiled, None),
        (emptied_of_its_tables, 60.0),
        (spoiled, 60.0),
    ],
)
def test_what_a_worker_needs_to_go_on_is_read_at_the_start(
    path: Path, damage: Callable[[Path], None], ended: float | None, logged: Callable[[], list[str]]
) -> None:
    leave_session(path, begun=0.0, ended=ended, route="http://10.0.0.1/")
    damage(path)
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 0
    assert logged() == ["event_log_damaged"]


def test_a_log_that_is_under_suspicion_is_read_as_a_whole(path: Path, logged: Callable[[], list[str]]) -> None:
    with contextlib.closing(open_log(path)) as log:
        queue(log, "a")
        log.append([(2, Event(100.0, "a", "expired", "queue_full", Ended()))])
        for reader in ("worker_status", "delete_requests"):
            log.move_cursor(reader, 2)
        ((page,),) = log.conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events_by_reservation'")
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(random.Random(1).randbytes(4096))
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 2, "nothing is open, so nothing was read there"
    Path(f"{path}.suspect").touch()
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 0
    assert logged() == ["event_log_damaged"]


def test_what_a_killed_worker_left_beside_a_damaged_log_is_set_aside_with_it(path: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    with contextlib.closing(open_log(killed / path.name)) as log:
        log.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a whole database in the -wal would be no damage
        queue(log, "a")
        left = {suffix: Path(f"{log.path}{suffix}").read_bytes() for suffix in ("-wal", "-shm")}
    path.write_bytes(DAMAGE)
    for suffix, content in left.items():
        Path(f"{path}{suffix}").write_bytes(content)
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 0
    (aside,) = path.parent.glob("nullworker.db.damaged-*[0-9]")
    assert Path(f"{aside}-wal").read_bytes() == left["-wal"]
    assert Path(f"{aside}-shm").exists(), "what is in it can be made again"


def test_a_suspect_file_beside_a_sound_log_is_removed(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        queue(log, "a")
    Path(f"{path}.suspect").touch()
    with contextlib.closing(open_log(path)) as log:
        assert log.last_seq == 1
    assert not Path(f"{path}.suspect").exists()


def test_a_row_that_nests_too_deep_is_damage() -> None:
    deep = '{"result": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(LogDamaged, match="cannot be read"):
        from_row((1.0, "a", "released", "explicit", deep))
