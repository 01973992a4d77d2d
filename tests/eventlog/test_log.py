"""Opening a log: its pragmas, its lock, what it remembers, and why it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nullworker.clock import Anchor
from nullworker.errors import CannotStart, LogUnavailable
from nullworker.eventlog.lock import lock_beside
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Queued

TERMS = Queued(kind="request", duration_cap=60.0, give_up_at=130.0)


def queue(log: EventLog, name: str) -> int:
    log.append([(log.last_seq + 1, Event(100.0, name, "queued", None, TERMS))])
    return log.last_seq


def pragma(log: EventLog, name: str) -> object:
    return log.conn.execute(f"PRAGMA {name}").fetchone()[0]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("sync", "level"), [({}, 2), ({"sync": "full"}, 2), ({"sync": "normal"}, 1)])
def test_a_log_is_opened_with_what_its_promises_rest_on(path: Path, sync: dict[str, Any], level: int) -> None:
    for _ in range(2):
        with contextlib.closing(open_log(path, **sync)) as log:
            assert pragma(log, "synchronous") == level
            assert pragma(log, "journal_mode") == "wal"
            assert pragma(log, "journal_size_limit") == 4 * 1024 * 1024
            assert pragma(log, "auto_vacuum") == 2, "incremental"
            assert pragma(log, "recursive_triggers") == 1
            assert pragma(log, "busy_timeout") == 500, "the whole worker waits so long for a stranger"


def test_each_append_is_told_with_its_events_and_its_seconds(log: EventLog) -> None:
    told: list[tuple[int, float]] = []
    log.on_append.append(lambda events, seconds: told.append((events, seconds)))
    queue(log, "a")
    log.append([(seq, Event(100.0, f"r{seq}", "queued", None, TERMS)) for seq in (2, 3)])
    with pytest.raises(LogUnavailable):
        queue(log, "a")
    assert [events for events, _ in told] == [1, 2]
    assert all(0 < seconds < 10 for _, seconds in told)


def test_a_failing_append_listener_does_not_undo_the_append(log: EventLog, logged: Callable[[], list[str]]) -> None:
    heard: list[int] = []

    def fails(*_: object) -> None:
        raise ValueError("a bug")

    log.on_append += [fails, lambda events, _: heard.append(events)]
    queue(log, "a")
    assert (log.last_seq, heard) == (1, [1])
    assert logged() == ["listener_failed"]


def test_each_log_has_an_id_and_a_key_of_its_own_and_keeps_them(path: Path) -> None:
    made: list[list[str]] = []
    for name in (path, path.with_name("other.db"), path):
        with contextlib.closing(open_log(name)) as log:
            made.append([log.log_id, log.sink_key])
    assert made[0] == made[2]
    assert len({*made[0], *made[1]}) == 4
    assert all(len(word) >= 16 for word in made[0])


def test_a_log_remembers_its_instance_and_its_consumer_and_writes_only_what_is_new(path: Path) -> None:
    with contextlib.closing(open_log(path)) as log:
        assert (log.instance, log.consumer_was_healthy) == (os.uname().nodename, "")
        log.set_instance("7")
        log.set_consumer_was_healthy("boot 1")
        written = log.conn.total_changes
        log.set_instance("7")
        log.set_consumer_was_healthy("boot 1")
        assert log.conn.total_changes == written
    with contextlib.closing(open_log(path)) as log:
        assert (log.instance, log.consumer_was_healthy) == ("7", "boot 1")


def test_the_folder_of_a_new_log_is_synced_so_that_a_power_cut_does_not_take_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    for _ in range(2):
        open_log(path).close()
    assert synced == [str(path.parent)]


def test_a_batch_that_is_refused_leaves_the_log_as_it_was(log: EventLog) -> None:
    queue(log, "a")
    again = Event(100.0, "a", "queued", None, TERMS)
    with pytest.raises(LogUnavailable, match="exists already"):
        log.append([(2, Event(100.0, "b", "queued", None, TERMS)), (3, again)])
    assert queue(log, "c") == 2
    assert [event.reservation_id for _, event in log.live()] == ["a", "c"]


def test_an_append_waits_for_another_programs_lock(log: EventLog, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailable, match="cannot be written: database is locked"):
            queue(log, "a")
    assert queue(log, "a") == 1
    assert not Path(f"{path}.suspect").exists(), "a lock is no damage"


def test_the_last_word_of_a_reader_is_its_cursor_and_the_first_of_a_settlement_stays(log: EventLog) -> None:
    for name in "abc":
        queue(log, name)
    for seq in (1, 3, 2):
        log.move_cursor("reader", seq)
        assert log.cursor("reader") == seq
    log.settle("reader", [1, 2], 5.0, "delivered")
    log.settle("reader", [2, 3], 6.0, "given_up", "why")
    assert log.conn.execute("SELECT seq, outcome, detail FROM settled ORDER BY seq").fetchall() == [
        *((1, "delivered", None), (2, "delivered", None), (3, "given_up", "why")),
    ]


def test_the_newest_anchor_is_the_clocks_and_nothing_else_is(log: EventLog) -> None:
    queue(log, "a")
    log.probe()
    assert log.anchor() is None
    for offset in (1.5, 1_800_000_000.123456):
        log.store_anchor(Anchor("boot", offset))
        assert log.anchor() == Anchor("boot", offset)


def test_each_probe_writes_and_a_log_that_cannot_be_written_is_found(log: EventLog) -> None:
    for name in ("a", "b"):
        seq = queue(log, name)
        log.probe()
        assert log.conn.execute("SELECT value FROM meta WHERE name = 'probe'").fetchall() == [(str(seq),)]
    log.conn.execute("PRAGMA query_only = ON")
    with pytest.raises(LogUnavailable, match="cannot be written"):
        log.probe()


@pytest.mark.parametrize("another", [False, True], ids=["nothing", "another file"])
def test_a_log_that_was_moved_away_is_not_written_until_it_is_back(log: EventLog, path: Path, *, another: bool) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    if another:
        path.touch()
    for write in (log.probe, lambda: queue(log, "a")):
        with pytest.raises(LogUnavailable, match="was moved or removed"):
            write()
    elsewhere.rename(path)
    assert queue(log, "a") == 1


def test_free_pages_are_given_back_as_many_as_are_asked_for(log: EventLog) -> None:
    for number in range(50):
        seq = queue(log, f"r{number}")
        log.append([(seq + 1, Event(101.0, f"r{number}", "cancelled", "draining", Ended("x" * 5000)))])
    for reader in ("worker_status", "delete_requests"):
        log.move_cursor(reader, log.last_seq)
    log.prune(f"r{number}" for number in range(49))
    free = pragma(log, "freelist_count")
    assert isinstance(free, int)
    log.give_back(3)
    assert pragma(log, "freelist_count") == free - 3
    log.give_back(0)
    assert pragma(log, "freelist_count") == 0


def test_the_size_is_that_of_both_files(log: EventLog, path: Path) -> None:
    queue(log, "a")
    files = [path, Path(f"{path}-wal")]
    assert log.size() == sum(file.stat().st_size for file in files)
    log.close()
    assert log.size() == path.stat().st_size


def test_a_log_that_is_closed_leaves_nothing_open_and_can_be_opened(path: Path) -> None:
    before = open_files()
    for _ in range(2):
        log = open_log(path)
        log.close()
        log.close()
        assert open_files() == before


def test_the_folders_of_a_log_are_made_and_what_is_in_the_way_is_told(tmp_path: Path) -> None:
    open_log(tmp_path / "a" / "b" / "nullworker.db").close()
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match="cannot be made: File exists; set NULL_EVENT_LOG"):
        open_log(tmp_path / "file" / "nullworker.db")


def test_the_lock_says_who_has_it_and_nothing_older(path: Path) -> None:
    lock = Path(f"{path}.lock")
    lock.write_bytes(b"pid 1, since ever and ever and ever and ever and ever and ever\n")
    with contextlib.closing(open_log(path)) as log:
        assert re.match(rf"pid {os.getpid()}, since 20\S+Z +\nlog {log.log_id} event 0+ ", lock.read_text())
        assert "ever" not in lock.read_text()
        before = open_files()
        for content, holder in ((b"", "another process"), (b"\xff\n", "\ufffd")):
            lock.write_bytes(content)
            with pytest.raises(CannotStart, match=f"a worker that is running: {holder}; stop that one"):
                open_log(path)
        assert open_files() == before


def test_a_lock_of_another_file_says_who_has_it_and_leaves_nothing_open(path: Path) -> None:
    before = open_files()
    lock = lock_beside(path, "a dispatcher", "stop that one")
    assert re.fullmatch(rf"pid {os.getpid()}, since 20\S+Z\n", Path(f"{path}.lock").read_text())
    for content, holder in ((b"pid 7\n", "pid 7"), (b"", "another process")):
        Path(f"{path}.lock").write_bytes(content)
        with pytest.raises(
            CannotStart, match=f"{path} belongs to a dispatcher that is running: {holder}; stop that one"
        ):
            lock_beside(path, "a dispatcher", "stop that one")
    os.close(lock)
    assert open_files() == before


def test_a_log_that_a_stranger_has_locked_is_not_called_damaged(path: Path) -> None:
    open_log(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("PRAGMA locking_mode = EXCLUSIVE")
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(CannotStart, match="cannot be opened: database is locked"):
            open_log(path)
    open_log(path).close()


class Failing:
    """A connection on which a statement fails."""

    def __init__(self, conn: sqlite3.Connection, **errors: Exception) -> None:
        self._conn = conn
        self._errors = errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement in self._errors:
            raise self._errors[statement]
        return self._conn.execute(statement, *values)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (sqlite3.OperationalError("database or disk is full"), "cannot be written: database or disk is full"),
        (sqlite3.DatabaseError("database disk image is malformed"), "is damaged: .* a restart sets it aside"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "is damaged: .* a restart sets it aside"),
    ],
)
def test_a_write_that_can_not_even_be_undone_is_told_like_any_other(
    log: EventLog, path: Path, error: Exception, says: str
) -> None:
    whole = log.conn
    Path(f"{path}.suspect").symlink_to(path.parent / "missing" / "suspect")  # nor can it be marked
    log.conn = Failing(whole, COMMIT=error, ROLLBACK=sqlite3.OperationalError("disk I/O error"))  # type: ignore[assignment]
    with pytest.raises(LogUnavailable, match=says):  # two events: one is a statement that commits by itself
        log.append([(seq, Event(100.0, name, "queued", None, TERMS)) for seq, name in enumerate("ab", 1)])
    assert log.last_seq == 0
    log.conn = whole


def test_a_write_that_meets_damage_marks_the_log_and_one_that_meets_a_full_disk_does_not(
    log: EventLog, path: Path
) -> None:
    whole = log.conn
    for error, marked in (
        (sqlite3.OperationalError("database or disk is full"), False),
        (sqlite3.DatabaseError("database disk image is malformed"), True),
    ):
        log.conn = Failing(whole, COMMIT=error)  # type: ignore[assignment]
        with pytest.raises(LogUnavailable):
            log.append([(seq, Event(100.0, name, "queued", None, TERMS)) for seq, name in enumerate("ab", 1)])
        assert Path(f"{path}.suspect").exists() == marked
    log.conn = whole


def test_a_symlink_shares_the_lock_and_a_folder_is_refused(log: EventLog, path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(CannotStart, match="belongs to a worker that is running"):
        open_log(link)
    with pytest.raises(CannotStart, match="cannot be made: Is a directory; set NULL_EVENT_LOG"):
        open_log(path.parent)
    assert queue(log, "a") == 1


def test_an_sqlite_that_is_too_old_is_told_before_anything_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 2))
    with pytest.raises(CannotStart, match=r"needs 3\.38 or newer"):
        open_log(path)
    assert path.stat().st_size == 0
