"""Opens an event log: takes its lock, creates or migrates it, verifies it, and sets a damaged file aside.

A damaged file is renamed, never deleted, and so is one whose newest part is gone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Final

from nullworker.clock import boot_id, iso, wall_iso
from nullworker.errors import CannotStart, IllegalMove, LogDamaged
from nullworker.eventlog import queries, schema
from nullworker.eventlog.lock import Lock, Note
from nullworker.eventlog.log import BUSY_MILLISECONDS, EventLog, suspicion
from nullworker.eventlog.sqlite import UNREADABLE, is_damage
from nullworker.fsm.book import Book, Limits
from nullworker.logs import get_log

log = get_log(__name__)

#: Bytes to which the write-ahead log is truncated after a checkpoint.
WAL_BYTES = 4 * 1024 * 1024
#: The cursors of the reporter (autoscaler/reporter.py).
READERS: Final = ("worker_status", "delete_requests")


def open_log(path: Path, *, sync: str = "full", fix: bool = True) -> EventLog:
    """Open the log for writing, and create it if needed; with `fix`, set a damaged one aside.

    Raises:
        CannotStart: another worker has it, it is of a newer version or another program, or the folder is not writable.
    """
    path = path.resolve()  # a symlink to another worker's log shares its lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path, sync=sync)
    except OSError as error:
        raise CannotStart(f"the event log {path} cannot be made: {error.strerror}; set NULL_EVENT_LOG") from error
    try:
        opened = _open(path, sync, lock, fix=fix) or _open(path, sync, lock, fix=False)
    except BaseException:
        lock.close()
        raise
    assert opened is not None
    return opened


def open_for_reading(path: Path) -> EventLog:
    """Open a log for reading, whether or not a worker is writing to it.

    Raises:
        CannotStart: there is no such log, or it is not one of this version.
    """
    try:
        try:
            return _open_as(path, path, "mode=ro")
        except sqlite3.OperationalError as error:
            if error.args[0] != "unable to open database file" or not os.access(path, os.R_OK):
                raise
            return _open_on_read_only_disk(path)
    except sqlite3.Error as error:
        raise CannotStart(f"there is no event log to read at {path}: {error}") from error


def _open_as(path: Path, file: Path, how: str) -> EventLog:
    """The log of a path, whose content is in a file."""
    conn = sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True, isolation_level=None, timeout=5)
    try:
        schema.check_readable(path, conn)
        return EventLog(path, conn, None)
    except BaseException:
        conn.close()
        raise


def _open_on_read_only_disk(path: Path) -> EventLog:
    """Open a log beside which no -shm can be created as a file that does not change (sqlite.org/wal.html#readonly).

    SQLite does not look at the -wal then: when there is one with something in it, both are copied to where an -shm can
    be made.
    """
    wal = Path(f"{path}-wal")
    if not wal.exists() or wal.stat().st_size == 0:
        return _open_as(path, path, "immutable=1")
    with tempfile.TemporaryDirectory() as folder:  # an open file stays readable when it is removed
        copy = Path(folder, "copy.db")
        shutil.copyfile(path, copy)
        shutil.copyfile(wal, f"{copy}-wal")
        return _open_as(path, copy, "mode=ro")


def _open(path: Path, sync: str, lock: Lock, *, fix: bool) -> EventLog | None:
    """The log; None: it was damaged, and is set aside."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # -wal and -shm get the same mode
        lock.take_log()
    except OSError as error:
        raise CannotStart(f"the event log {path} cannot be made: {error.strerror}; set NULL_EVENT_LOG") from error
    conn = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        _verify_newest(conn, lock.noted)
        conn.close()
        conn = _connect(path)
        return _prepare(conn, path, sync, lock)
    except UNREADABLE as error:
        if not is_damage(error):
            conn.close()
            raise CannotStart(f"the event log {path} cannot be opened: {error}") from error
        if not fix:
            conn.close()
            raise CannotStart(f"{path} is damaged: {error}; the next start of its worker sets it aside") from error
        aside = _set_aside(path)  # before the close, which could checkpoint the -wal into the damaged file
        conn.close()
        log.error("event_log_damaged", path=str(path), set_aside=str(aside), error=str(error))
        return None
    except BaseException:
        conn.close()
        raise


def _prepare(conn: sqlite3.Connection, path: Path, sync: str, lock: Lock) -> EventLog:
    schema.check_version(path, conn)
    if conn.execute("PRAGMA page_count").fetchone() == (0,):
        conn.execute("PRAGMA auto_vacuum = INCREMENTAL")  # so that pruning can return space to the disk
    conn.execute("PRAGMA journal_mode = WAL")
    _set_pragmas(conn, sync)
    if schema.migrate(conn):
        # the -wal may be lost later; the tables and the log's id are then still in the file itself
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _sync_folder(path)
    if suspicion(path).exists():
        verify_integrity(conn)
        suspicion(path).unlink()
    opened = EventLog(path, conn, lock, reconnect=functools.partial(_reconnect, path, sync))
    verify_replay(opened)
    return opened


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=BUSY_MILLISECONDS / 1000, cached_statements=64)


def _reconnect(path: Path, sync: str) -> sqlite3.Connection:
    conn = _connect(path)
    _set_pragmas(conn, sync)
    return conn


def _set_pragmas(conn: sqlite3.Connection, sync: str) -> None:
    conn.execute(f"PRAGMA synchronous = {sync}")
    conn.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    conn.execute("PRAGMA recursive_triggers = ON")


def _sync_folder(path: Path) -> None:
    """Make a new file's name outlive a power cut."""
    with contextlib.suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _verify_newest(conn: sqlite3.Connection, noted: Note | None) -> None:
    """Compare the log with the note of its last worker (lock.py).

    The connection must be read-only: another would begin the -wal anew, or remove it when it is closed, and what can
    be saved of a damaged one would be gone.

    After a power cut a log that was not synced may be shorter. It is whole up to there, so it is used; that is said.

    Raises:
        LogDamaged: the newest events are gone.
        sqlite3.Error: it cannot be read.
    """
    if noted is None or conn.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone() is None:
        return
    if conn.execute("SELECT value FROM meta WHERE name = 'log_id'").fetchone() != (noted.log_id,):
        return  # another log has this name now
    (last,) = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
    if last >= noted.seq:
        return
    gone = f"the events {last + 1} to {noted.seq} are gone"
    if noted.sync == "normal" and noted.boot_id != boot_id():
        log.error("events_lost", events=noted.seq - last, why=f"{gone}: NULL_LOG_SYNC=normal, and a power cut")
        return
    raise LogDamaged(f"{gone}: its -wal was removed, cut or damaged, or it is an older copy")


def _set_aside(path: Path) -> Path:
    aside = Path(f"{path}.damaged-{wall_iso().replace(':', '')}-{os.getpid()}")
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def verify_replay(log: EventLog) -> None:
    """Replay the live reservations and read all undelivered messages, as the worker will do.

    The cost depends on their number, not on the size of the log.

    Raises:
        UNREADABLE: it cannot be read, or is inconsistent.
    """
    try:
        _replay_live(log)
        _read_undelivered(log)
    except (IllegalMove, ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise LogDamaged(f"the live reservations cannot be restored: {type(error).__name__}: {error}") from error


def _replay_live(log: EventLog) -> None:
    book = Book(Limits())
    for _, event in log.live():
        iso(book.apply(event).ends_at or event.at)
    live = {reservation.id: reservation.state for reservation in book.live()}
    if live != dict(log.conn.execute("SELECT reservation_id, state FROM live")):
        raise LogDamaged("the table `live` does not agree with the events")
    log.anchor()


def _read_undelivered(log: EventLog) -> None:
    for owed in queries.callbacks(log.conn, after=0):
        queries.callback_call(log.conn, owed.seq)
    for _ in queries.ended_holds(log.conn, limit=1):
        pass
    for name in READERS:
        seq = log.cursor(name)
        queries.begun_load(log.conn, after=seq, load=1.0)
        while batch := queries.finished(log.conn, after=seq, limit=1000):
            if batch[-1].seq <= seq:
                raise LogDamaged(f"event {batch[-1].seq} comes after event {seq}")
            seq = batch[-1].seq


def verify_integrity(conn: sqlite3.Connection) -> None:
    """Check the whole file, which takes time in proportion to its size; only done after a write has met damage.

    Raises:
        UNREADABLE: it is damaged.
    """
    found = conn.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise LogDamaged(found)
