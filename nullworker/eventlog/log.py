"""Appends to the event log: one SQLite file, written by one worker.

An append is one transaction: when it returns the events are durable, and when it raises none of them is stored. It
runs on the caller's thread, because at one reservation at a time a commit of 0.2 ms is cheaper than a second thread.

`opening.py` opens and checks the file, `schema.py` defines its tables, `queries.py` reads it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nullworker.clock import Anchor, stopwatch
from nullworker.errors import LogUnavailable
from nullworker.eventlog.lock import Lock
from nullworker.eventlog.sqlite import is_damage, is_lock, transaction
from nullworker.fsm.events import Event, from_row, to_row
from nullworker.logs import get_log

log = get_log(__name__)

#: Milliseconds that a write waits for a stranger's lock. The whole worker waits with it; once it was in vain, further
#: writes do not wait until one has worked.
BUSY_MILLISECONDS = 500

_INSERT = "INSERT INTO events (seq, at, reservation_id, kind, reason, data) VALUES (?, ?, ?, ?, ?, ?)"

_PROBE = "INSERT OR REPLACE INTO meta VALUES ('probe', ?)"


class EventLog:
    """An open event log. Get one from `opening.open_log` or `opening.open_for_reading`.

    Attributes:
        last_seq: the seq of the last event in the file; 0 in an empty one.
        log_id: random, made with the file: a copy of it is the same log, a new file another one.
        sink_key: random and secret: by it a collector knows that a log is the one which it has heard before.
        on_append: called after each append, with the number of its events and the seconds that it took.
    """

    def __init__(
        self,
        path: Path,
        conn: sqlite3.Connection,
        lock: Lock | None,
        *,
        reconnect: Callable[[], sqlite3.Connection] | None = None,
    ) -> None:
        self.path = path
        self.conn = conn
        self._lock = lock
        self._reconnect = reconnect
        self._patient = True
        self.on_append: list[Callable[[int, float], None]] = []
        self.last_seq: int = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        self.log_id = self._meta("log_id") or ""
        self.sink_key = self._meta("sink_key") or ""
        self._names = [f"{path}{suffix}" for suffix in ("", "-wal", "-shm")]
        self._files = self._stat_files()
        self._note()

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """Write events, with the given seqs, all or none.

        Raises:
            LogUnavailable: nothing was written; the message has the cause.
        """
        started = stopwatch()
        self._write(_INSERT, [(seq, *to_row(event)) for seq, event in events])
        took = stopwatch() - started
        self.last_seq = events[-1][0]
        self._note()
        for listener in self.on_append:
            try:
                listener(len(events), took)
            except Exception:
                log.exception("listener_failed", seq=self.last_seq)

    def take_back(self) -> None:
        """Make sure that a restart does not find what an append could not write, and which is now refused.

        When the sync of a commit fails, its frames are in the -wal, whole: SQLite forgets them, but a start after a
        kill would recover them. Another commit lies over the first of them, whether its own sync works or not, and by
        the checksums, each of which includes the one before, the rest does not count any more.
        """
        with contextlib.suppress(sqlite3.Error), transaction(self.conn):
            self.conn.execute(_PROBE, (self.last_seq,))

    def live(self) -> Iterator[tuple[int, Event]]:
        """The events of all live reservations, in order: all that a restart needs.

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
        """The seq of the last event that a reader has processed; 0 for a new reader."""
        row = self.conn.execute("SELECT seq FROM cursors WHERE name = ?", (name,)).fetchone()
        return min(row[0], self.last_seq) if row else 0

    def move_cursor(self, name: str, seq: int) -> None:
        """Store that a reader has processed all events up to seq.

        Raises:
            LogUnavailable: it is not stored.
        """
        self._write(
            "INSERT INTO cursors VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq",
            [(name, min(seq, self.last_seq))],
        )

    @property
    def instance(self) -> str:
        """The instance on which the log was last written: its CONTAINER_ID, or the host's name if it has none."""
        return self._meta("instance") or ""

    def set_instance(self, instance: str) -> None:
        """Store the instance on which the log is written.

        Raises:
            LogUnavailable: it is not stored.
        """
        if instance != self.instance:
            self._write("INSERT OR REPLACE INTO meta VALUES ('instance', ?)", [(instance,)])

    @property
    def consumer_was_healthy(self) -> str:
        """In which life of this machine the consumer was last healthy, as `set_consumer_was_healthy` has it."""
        return self._meta("consumer_was_healthy") or ""

    def set_consumer_was_healthy(self, life: str) -> None:
        """Store that the consumer was healthy, so that a restart of the worker does not take it for starting.

        Raises:
            LogUnavailable: it is not stored.
        """
        if life != self.consumer_was_healthy:
            self._write("INSERT OR REPLACE INTO meta VALUES ('consumer_was_healthy', ?)", [(life,)])

    def set_sink(self, name: str | None) -> None:
        """Pruning waits for the cursor of this sink from now on, and for no other sink's; None: for no sink's.

        Raises:
            LogUnavailable: it is as it was.
        """
        if name == self._meta("sink"):
            return
        if name is None:
            self._write("DELETE FROM meta WHERE name = ?", [("sink",)])
        else:
            self._write("INSERT OR REPLACE INTO meta VALUES ('sink', ?)", [(name,)])

    def settle(self, name: str, seqs: Iterable[int], at: float, outcome: str, detail: str | None = None) -> None:
        """Store the outcome of single events that a reader does not process in order: delivered, refused or given up.

        Raises:
            LogUnavailable: it is not stored.
        """
        rows = [(name, seq, at, outcome, detail) for seq in seqs]
        self._write("INSERT OR IGNORE INTO settled VALUES (?, ?, ?, ?, ?)", rows)

    def prune(self, reservation_ids: Iterable[str]) -> None:
        """Remove reservations with all their events; triggers refuse one that a reader still needs.

        Raises:
            LogUnavailable: nothing is removed.
        """
        self._write("INSERT INTO pruning VALUES (?)", ((reservation_id,) for reservation_id in reservation_ids))

    def give_back(self, pages: int) -> None:
        """Return up to `pages` free pages to the disk; 0 is all.

        Raises:
            sqlite3.Error: the pages stay in the file, for new events.
        """
        self.conn.executescript(f"PRAGMA incremental_vacuum({pages})")  # execute() would return only one page

    def anchor(self) -> Anchor | None:
        """The stored anchor of the clock, if a reservation that was timed by it is live."""
        row = self.conn.execute(
            "SELECT value FROM meta WHERE name = 'clock' AND EXISTS (SELECT 1 FROM live)"
        ).fetchone()
        if row is None:
            return None
        boot_id, _, offset = row[0].partition(" ")
        return Anchor(boot_id, float(offset))

    def latest(self) -> float:
        """The time of the newest event of a live reservation, in epoch seconds; 0: nothing is live."""
        query = "SELECT coalesce(max(at), 0) FROM events WHERE reservation_id IN (SELECT reservation_id FROM live)"
        return float(self.conn.execute(query).fetchone()[0])

    def store_anchor(self, anchor: Anchor) -> None:
        """Store the clock's anchor.

        Raises:
            LogUnavailable: it is not stored.
        """
        self._write("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", [(f"{anchor.boot_id} {anchor.offset!r}",)])

    def probe(self) -> None:
        """Test whether the log can be written.

        Raises:
            LogUnavailable: it cannot.
        """
        self._write(_PROBE, [(self.last_seq,)])

    def size(self) -> int:
        """Bytes on disk, including the write-ahead log."""
        total = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                total += os.stat(f"{self.path}{suffix}").st_size
        return total

    def close(self) -> None:
        """Close the file and release the lock. A second call does nothing."""
        with contextlib.suppress(sqlite3.Error):
            self.conn.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _meta(self, name: str) -> str | None:
        row = self.conn.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _note(self) -> None:
        if self._lock is not None:
            self._lock.note(self.log_id, self.last_seq)

    def _stat_files(self) -> list[tuple[int, int] | None]:
        """Which files the log, its -wal and its -shm are now."""
        files = list[tuple[int, int] | None]()
        for name in self._names:
            try:
                stat = os.stat(name)
            except OSError:
                files.append(None)
            else:
                files.append((stat.st_dev, stat.st_ino))
        return files

    def _check_files(self) -> None:
        """Check that the path still names this file. SQLite would go on writing to a removed file."""
        files = self._stat_files()
        if files == self._files:
            return
        if files[0] != self._files[0]:
            raise LogUnavailable(f"{self.path} was moved or removed; restart the worker to begin a new one")
        self._rescue_wal()

    def _rescue_wal(self) -> None:
        """The -wal was removed or replaced: move its content into the log, through the open file, and begin another.

        Raises:
            LogUnavailable: it failed; the content of the -wal is lost with this process.
        """
        what = f"{self.path}-wal or -shm was removed or replaced while the worker runs"
        if self._reconnect is None:
            raise LogUnavailable(what)
        try:
            (busy, *_) = self.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise LogUnavailable(
                    f"{what}; its content cannot be saved while another program reads the log", momentary=True
                )
            self.conn.close()
            self.conn = self._reconnect()
            self.conn.execute("SELECT count(*) FROM sqlite_schema")  # which opens the files
        except sqlite3.Error as error:
            raise LogUnavailable(f"{what}, and its content cannot be saved: {error}") from error
        self._files = self._stat_files()
        log.error(
            "wal_removed", path=str(self.path), message=f"{what}; nothing is lost, its content was moved into the log"
        )

    def _write(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self._check_files()
        try:
            if isinstance(rows, list) and len(rows) == 1:  # one statement is a transaction by itself
                self.conn.execute(statement, rows[0])
            else:
                with transaction(self.conn):
                    self.conn.executemany(statement, rows)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: the message quotes damaged text
            if is_damage(error):
                with contextlib.suppress(OSError):
                    suspicion(self.path).touch()
                raise LogUnavailable(f"{self.path} is damaged: {error}; a restart sets it aside") from error
            locked = is_lock(error)
            if locked:
                self._wait_for_locks(patient=False)
            raise LogUnavailable(f"{self.path} cannot be written: {error}", momentary=locked) from error
        self._wait_for_locks(patient=True)

    def _wait_for_locks(self, *, patient: bool) -> None:
        if patient != self._patient:
            self._patient = patient
            self.conn.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS if patient else 0}")


def suspicion(path: Path) -> Path:
    """The path of a marker file: a write has met damage, which a start may not notice since it reads only open rows."""
    return Path(f"{path}.suspect")
