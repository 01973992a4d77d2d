"""The event log: one SQLite file, appended to by one worker.

An append is one transaction: it is durable when it returns, and when it raises nothing of it is there. The writer
gives each event its `seq`. Everything runs on the caller's thread: at one reservation at a time a commit of 0.2 ms is
cheaper than a thread, and nothing can come in between.

What it leaves out: what the events mean (fsm/), the queries for people (history.py), the shape of the file (schema.py).

The one rule: no other file writes to the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nullworker import rehearsal, schema
from nullworker.clock import Anchor, stopwatch, wall_iso
from nullworker.errors import CannotStart, LogUnavailable
from nullworker.fsm.events import Event, from_row, to_row
from nullworker.logs import get_log
from nullworker.migrations import migrate
from nullworker.transaction import transaction

log = get_log(__name__)

#: Milliseconds that an append waits for a stranger's write lock. The whole worker waits with it, so it is short.
BUSY_MILLISECONDS = 100
#: Bytes that the write-ahead log keeps on disk after a checkpoint.
WAL_BYTES = 4 * 1024 * 1024

_INSERT = "INSERT INTO events (seq, at, reservation_id, kind, reason, data) VALUES (?, ?, ?, ?, ?, ?)"


class EventLog:
    """An open log. Use `open_log`.

    Attributes:
        last_seq: the seq of the last event in the file; 0 in an empty one.
        on_append: called after each append, with the number of its events and the seconds that it took.
    """

    def __init__(self, path: Path, conn: sqlite3.Connection, lock: int | None) -> None:
        self.path = path
        self.conn = conn
        self._lock = lock
        self._file = os.stat(path)
        self.on_append: list[Callable[[int, float], None]] = []
        self.last_seq: int = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """Write events with the seqs that the caller gives them, all or none.

        Raises:
            LogUnavailable: nothing was written; the cause is in the sentence.
        """
        started = stopwatch()
        self._write(_INSERT, [(seq, *to_row(event)) for seq, event in events])
        took = stopwatch() - started
        self.last_seq = events[-1][0]
        for listener in self.on_append:
            try:
                listener(len(events), took)
            except Exception:
                log.exception("listener_failed", seq=self.last_seq)

    def live(self) -> Iterator[tuple[int, Event]]:
        """The events of every reservation that has not ended, in order: all that a restart needs.

        Raises:
            LogDamaged: an event cannot be read.
        """
        rows = self.conn.execute(
            "SELECT seq, at, reservation_id, kind, reason, data FROM events"
            " WHERE reservation_id IN (SELECT reservation_id FROM live) ORDER BY seq"
        ).fetchall()
        for seq, *row in rows:
            yield seq, from_row(tuple(row))

    def cursor(self, name: str) -> int:
        """The last event that a reader is done with; 0 for a new reader."""
        row = self.conn.execute("SELECT seq FROM cursors WHERE name = ?", (name,)).fetchone()
        return min(row[0], self.last_seq) if row else 0

    def move_cursor(self, name: str, seq: int) -> None:
        """Remember that a reader is done with everything up to seq.

        Raises:
            LogUnavailable: it is not remembered.
        """
        self._write(
            "INSERT INTO cursors VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq",
            [(name, min(seq, self.last_seq))],
        )

    def settle(self, name: str, seqs: Iterable[int], at: float, outcome: str, detail: str | None = None) -> None:
        """Remember that a reader is done with single events beyond its cursor, or has given them up.

        Raises:
            LogUnavailable: it is not remembered.
        """
        rows = [(name, seq, at, outcome, detail) for seq in seqs]
        self._write("INSERT OR IGNORE INTO settled VALUES (?, ?, ?, ?, ?)", rows)

    def prune(self, reservation_ids: Iterable[str]) -> None:
        """Remove reservations, each with all its events; the database refuses one that is not done with.

        Raises:
            LogUnavailable: nothing is removed.
        """
        self._write("INSERT INTO pruning VALUES (?)", ((each,) for each in reservation_ids))

    def give_back(self, pages: int) -> None:
        """Give free pages back to the disk, so many at most; 0 is all.

        Raises:
            sqlite3.Error: they stay, for new events.
        """
        self.conn.executescript(f"PRAGMA incremental_vacuum({pages})")  # execute() would give back one page only

    def anchor(self) -> Anchor | None:
        """The clock's anchor, if something is live that was timed by it."""
        row = self.conn.execute(
            "SELECT value FROM meta WHERE name = 'clock' AND EXISTS (SELECT 1 FROM live)"
        ).fetchone()
        if row is None:
            return None
        boot_id, _, offset = row[0].partition(" ")
        return Anchor(boot_id, float(offset))

    def store_anchor(self, anchor: Anchor) -> None:
        """Remember the clock's anchor.

        Raises:
            LogUnavailable: it is not remembered.
        """
        self._write("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", [(f"{anchor.boot_id} {anchor.offset!r}",)])

    def probe(self) -> None:
        """Find out whether the log can be written.

        Raises:
            LogUnavailable: it cannot.
        """
        self._write("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", [(self.last_seq,)])

    def size(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        total = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                total += os.stat(f"{self.path}{suffix}").st_size
        return total

    def close(self) -> None:
        """Close the file and give the lock back. A second call does nothing."""
        with contextlib.suppress(sqlite3.Error):
            self.conn.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), self._file)
        return False

    def _write(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        if not self._is_there():  # SQLite would go on in a file that has no name any more
            raise LogUnavailable(f"{self.path} was moved or removed; restart the worker to begin a new one")
        try:
            with transaction(self.conn):
                self.conn.executemany(statement, rows)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: a sentence about damage, quoting it
            if rehearsal.is_damage(error):
                with contextlib.suppress(OSError):
                    _suspicion(self.path).touch()
                raise LogUnavailable(f"{self.path} is damaged: {error}; a restart sets it aside") from error
            raise LogUnavailable(f"{self.path} cannot be written: {error}") from error


def open_log(path: Path, *, sync: str = "full", mend: bool = True) -> EventLog:
    """Open the log for writing, make it if there is none; with `mend`, set a damaged one aside.

    Raises:
        CannotStart: another worker has it, it is of a newer version or another program, or the folder is not writable.
    """
    path = path.resolve()  # a link to another worker's log is that log
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # -wal and -shm take its mode
        lock = _take_lock(path)
    except OSError as error:
        raise CannotStart(f"the event log {path} cannot be made: {error.strerror}; set NULL_EVENT_LOG") from error
    try:
        try:
            return _open(path, sync, lock)
        except rehearsal.UNREADABLE as error:
            if not rehearsal.is_damage(error):
                raise CannotStart(f"the event log {path} cannot be opened: {error}") from error
            if not mend:
                raise CannotStart(f"{path} is damaged: {error}; the next start of its worker sets it aside") from error
            aside = _set_aside(path)
            log.error("event_log_damaged", path=str(path), set_aside=str(aside), error=str(error))
            return _open(path, sync, lock)
    except BaseException:
        os.close(lock)
        raise


def open_for_reading(path: Path) -> EventLog:
    """Open a log that another process may be writing to, or none.

    Raises:
        CannotStart: there is no such log, or it is not one of this version.
    """
    try:
        conn = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5)
        try:
            schema.check_version(path, conn)
            return EventLog(path, conn, None)
        except BaseException:
            conn.close()
            raise
    except sqlite3.Error as error:
        raise CannotStart(f"there is no event log to read at {path}: {error}") from error


def _open(path: Path, sync: str, lock: int) -> EventLog:
    conn = sqlite3.connect(path, isolation_level=None, timeout=BUSY_MILLISECONDS / 1000, cached_statements=64)
    try:
        schema.check_version(path, conn)
        if conn.execute("PRAGMA page_count").fetchone() == (0,):
            conn.execute("PRAGMA auto_vacuum = INCREMENTAL")  # what is pruned can be given back
        conn.execute("PRAGMA journal_mode = WAL")
        conn.execute(f"PRAGMA synchronous = {sync}")
        conn.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        conn.execute("PRAGMA recursive_triggers = ON")
        migrate(conn)
        if _suspicion(path).exists():
            rehearsal.examine(conn)
            _suspicion(path).unlink()
        opened = EventLog(path, conn, lock)
        rehearsal.rehearse(opened)
        return opened
    except BaseException:
        conn.close()
        raise


def _take_lock(path: Path) -> int:
    """An flock beside the log: it ends with the process, however that ends. The file says who holds it."""
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise CannotStart(
            f"the event log {path} belongs to a worker that is running: {holder}; stop that one, or set NULL_EVENT_LOG",
            tell=False,
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()}, since {wall_iso()}\n".encode(), 0)
    return lock


def _suspicion(path: Path) -> Path:
    """A mark beside the log: a write has met damage that a start, which reads only what is open, may not see."""
    return Path(f"{path}.suspect")


def _set_aside(path: Path) -> Path:
    aside = Path(f"{path}.damaged-{wall_iso().replace(':', '')}-{os.getpid()}")
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
