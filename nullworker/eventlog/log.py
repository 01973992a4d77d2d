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
from nullworker.eventlog.sqlite import is_damage, transaction
from nullworker.fsm.events import Event, from_row, to_row
from nullworker.logs import get_log

log = get_log(__name__)

_INSERT = "INSERT INTO events (seq, at, reservation_id, kind, reason, data) VALUES (?, ?, ?, ?, ?, ?)"


class EventLog:
    """An open event log. Get one from `opening.open_log` or `opening.open_for_reading`.

    Attributes:
        last_seq: the seq of the last event in the file; 0 in an empty one.
        log_id: random, made with the file: a copy of it is the same log, a new file another one.
        sink_key: random and secret: by it a collector knows that a log is the one which it has heard before.
        on_append: called after each append, with the number of its events and the seconds that it took.
    """

    def __init__(self, path: Path, conn: sqlite3.Connection, lock: int | None) -> None:
        self.path = path
        self.conn = conn
        self._lock = lock
        self._file = os.stat(path)
        self.on_append: list[Callable[[int, float], None]] = []
        self.last_seq: int = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        self.log_id = self._meta("log_id") or ""
        self.sink_key = self._meta("sink_key") or ""

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """Write events, with the given seqs, all or none.

        Raises:
            LogUnavailable: nothing was written; the message has the cause.
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
        self._write("INSERT INTO pruning VALUES (?)", ((each,) for each in reservation_ids))

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
        self._write("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", [(self.last_seq,)])

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
            os.close(self._lock)
            self._lock = None

    def _meta(self, name: str) -> str | None:
        row = self.conn.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), self._file)
        return False

    def _write(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        if not self._is_there():  # SQLite would go on writing to a deleted file
            raise LogUnavailable(f"{self.path} was moved or removed; restart the worker to begin a new one")
        try:
            with transaction(self.conn):
                self.conn.executemany(statement, rows)
        except (
            sqlite3.Error,
            UnicodeDecodeError,
        ) as error:  # the second: the message quotes damaged text
            if is_damage(error):
                with contextlib.suppress(OSError):
                    suspicion(self.path).touch()
                raise LogUnavailable(f"{self.path} is damaged: {error}; a restart sets it aside") from error
            raise LogUnavailable(f"{self.path} cannot be written: {error}") from error


def suspicion(path: Path) -> Path:
    """The path of a marker file: a write has met damage, which a start may not notice since it reads only open rows."""
    return Path(f"{path}.suspect")
