"""The ledger: one SQLite file, appended to by one dispatcher.

An append is one transaction: when it returns the events are durable, and when it raises none is stored. The file and
its -wal and -shm have mode 0600, because the grants in it can renew and end sessions.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nullworker.clock import Anchor
from nullworker.dispatch import schema
from nullworker.dispatch.claims import Claim, Event, Row, from_row, replay, to_row
from nullworker.errors import CannotStart, LogDamaged, LogUnavailable
from nullworker.eventlog.lock import lock_beside, refuse_other_kind
from nullworker.eventlog.schema import LEDGER_APPLICATION_ID
from nullworker.eventlog.sqlite import still_names, transaction

#: Milliseconds that an append waits for the write lock of another program; renewals wait meanwhile.
BUSY_MILLISECONDS: Final = 500
#: Bytes that the write-ahead log keeps on disk after a checkpoint.
WAL_BYTES: Final = 1024 * 1024

_INSERT: Final = "INSERT INTO events (seq, at, claim_id, kind, reason, data) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT: Final = "SELECT at, claim_id, kind, reason, data FROM events WHERE claim_id IN"


class Credential(NamedTuple):
    """The grant with which a session is created, renewed and ended."""

    url: str  # of the worker
    body: str  # JSON of the request


class HeldTime(NamedTuple):
    """One hold, for the limits."""

    held_at: float  # epoch seconds
    seconds: float | None  # None while it is held
    price: float | None  # dollars an hour


class Ledger:
    """An open ledger. Use `open_ledger`."""

    def __init__(self, path: Path, conn: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._conn = conn
        self._lock: int | None = lock
        self._file = os.stat(path)
        self._seq: int = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]

    def append(self, events: Sequence[Event], credentials: dict[str, Credential] | None = None) -> None:
        """Write events and the credentials of claims, all or none. An end removes the credentials of its claim.

        Raises:
            LogUnavailable: nothing was written; the cause is in the sentence.
        """
        rows = [(self._seq + number, *to_row(event)) for number, event in enumerate(events, 1)]
        with self._written():
            self._conn.executemany(_INSERT, rows)
            for claim_id, credential in (credentials or {}).items():
                self._conn.execute("INSERT OR REPLACE INTO credentials VALUES (?, ?, ?)", (claim_id, *credential))
        self._seq += len(rows)
        if any(event.kind in ("ended", "refused") for event in events):
            with contextlib.suppress(sqlite3.Error):  # otherwise the grant would stay readable in the write-ahead log
                self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def open_claims(self) -> dict[str, Claim]:
        """All claims that have not ended, in the order in which they were opened.

        Raises:
            LogDamaged: an event cannot be read.
        """
        return self._claims("(SELECT claim_id FROM live)")

    def ended_since(self, at: float) -> list[Claim]:
        """The claims that have ended since a time, in the order of their ends.

        Raises:
            LogDamaged: an event cannot be read.
        """
        claims = self._claims("(SELECT claim_id FROM events WHERE kind = 'ended' AND at >= ?)", at)
        return sorted(claims.values(), key=lambda claim: claim.ended_at or 0.0)

    def credential(self, claim_id: str) -> Credential | None:
        """The credential of a claim; None: it has none."""
        row = self._conn.execute("SELECT url, body FROM credentials WHERE claim_id = ?", (claim_id,)).fetchone()
        return Credential(*row) if row else None

    def renewed(self, claim_id: str, at: float) -> None:
        """Store when the last answered renewal was sent.

        Raises:
            LogUnavailable: it is not remembered.
        """
        with self._written():
            self._conn.execute("INSERT OR REPLACE INTO renewals VALUES (?, ?)", (claim_id, at))

    def renewed_at(self, claim_id: str) -> float | None:
        """When the last answered renewal was sent, in epoch seconds; None: there was none."""
        row = self._conn.execute("SELECT at FROM renewals WHERE claim_id = ?", (claim_id,)).fetchone()
        return float(row[0]) if row else None

    def held_time(self, since: float, *, open_too: bool = True) -> list[HeldTime]:
        """All holds that have not ended before a time; also claims that were lost, and may have been held."""
        rows = self._conn.execute(
            "SELECT h.at, iif(e.seq IS NULL, NULL, max(0, coalesce(e.data ->> 'held_seconds', e.at - h.at))),"
            " (SELECT p.data ->> 'price' FROM events p WHERE p.claim_id = h.claim_id AND p.kind = 'priced'"
            "   ORDER BY p.seq DESC LIMIT 1)"
            " FROM events h LEFT JOIN events e ON e.claim_id = h.claim_id AND e.kind = 'ended'"
            " WHERE h.kind = 'held' AND ((? AND h.claim_id IN (SELECT claim_id FROM live))"
            "  OR h.claim_id IN (SELECT claim_id FROM events WHERE kind = 'ended' AND at >= ?))",
            (open_too, since),
        )
        lost = self._conn.execute(
            "SELECT max(g.at), e.data ->> 'held_seconds', NULL FROM events e"
            " JOIN events g ON g.claim_id = e.claim_id AND g.kind = 'granted'"
            " WHERE e.kind = 'ended' AND e.at >= ? AND e.data ->> 'held_seconds' IS NOT NULL"
            "  AND NOT EXISTS (SELECT 1 FROM events h WHERE h.claim_id = e.claim_id AND h.kind = 'held')"
            " GROUP BY e.claim_id",
            (since,),
        )
        return [HeldTime(*row) for row in (*rows, *lost)]

    def anchor(self) -> Anchor | None:
        """The clock's anchor, if a claim that was timed by it is open."""
        query = "SELECT value FROM meta WHERE name = 'clock' AND EXISTS (SELECT 1 FROM live)"
        row = self._conn.execute(query).fetchone()
        if row is None:
            return None
        boot_id, _, offset = row[0].partition(" ")
        return Anchor(boot_id, float(offset))

    def latest(self) -> float:
        """Epoch seconds of the newest event of an open claim; 0: none is open."""
        query = "SELECT coalesce(max(at), 0) FROM events WHERE claim_id IN (SELECT claim_id FROM live)"
        return float(self._conn.execute(query).fetchone()[0])

    def store_anchor(self, anchor: Anchor) -> None:
        """Store the clock's anchor.

        Raises:
            LogUnavailable: it is not remembered.
        """
        self._set("clock", f"{anchor.boot_id} {anchor.offset!r}")

    def probe(self, size: int = 0) -> None:
        """Check that the ledger can be written. `size`: bytes that must fit.

        Raises:
            LogUnavailable: it cannot.
        """
        self._set("probe", f"{self._seq} {'.' * size}")

    def close(self) -> None:
        """Close the file and release the lock. A second call does nothing."""
        with contextlib.suppress(sqlite3.Error):
            self._conn.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _set(self, name: str, value: str) -> None:
        with self._written():
            self._conn.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _claims(self, which: str, *values: object) -> dict[str, Claim]:
        events: dict[str, list[Event]] = {}
        row: Row
        for row in self._conn.execute(f"{_SELECT} {which} ORDER BY seq", values).fetchall():
            event = from_row(row)
            events.setdefault(event.claim_id, []).append(event)
        return replay(events)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        if not still_names(self.path, self._file):
            raise LogUnavailable(f"the ledger {self.path} was moved or removed; restart the dispatcher")
        try:
            with transaction(self._conn):
                yield
        except sqlite3.Error as error:
            raise LogUnavailable(f"the ledger {self.path} cannot be written: {error}") from error


def open_ledger(path: Path) -> Ledger:
    """Open the ledger; create it if there is none.

    Raises:
        CannotStart: another dispatcher has it, it is of another program, damaged, or its folder is not writable.
    """
    path = path.absolute().resolve()  # a link to another dispatcher's ledger is that ledger
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_other_kind(path, LEDGER_APPLICATION_ID, "set --ledger to another file")
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # -wal and -shm take its mode
        os.chmod(path, 0o600)
        lock = lock_beside(path, "a dispatcher", "stop that one, or set --ledger")
    except OSError as error:
        raise CannotStart(f"the ledger {path} cannot be created: {error.strerror}; set --ledger") from error
    try:
        return _open(path, lock)
    except (sqlite3.Error, UnicodeDecodeError, LogDamaged) as error:
        os.close(lock)
        raise CannotStart(
            f"the ledger {path} cannot be opened: {error}. If it is damaged, move it away: what it holds is ended by "
            "its consumers, or ends a --lifetime after its last renewal"
        ) from error
    except BaseException:
        os.close(lock)
        raise


def _open(path: Path, lock: int) -> Ledger:
    conn = sqlite3.connect(path, isolation_level=None, timeout=BUSY_MILLISECONDS / 1000)
    try:
        _check_version(path, conn)
        conn.execute("PRAGMA journal_mode = WAL")
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        conn.execute("PRAGMA secure_delete = ON")
        if conn.execute("PRAGMA user_version").fetchone()[0] == 0:
            marks = f"PRAGMA application_id = {LEDGER_APPLICATION_ID}; PRAGMA user_version = {schema.VERSION};"
            conn.executescript(f"BEGIN IMMEDIATE; {schema.SCRIPT} {marks} COMMIT;")
        ledger = Ledger(path, conn, lock)
        ledger.open_claims()
        return ledger
    except BaseException:
        conn.close()
        raise


def _check_version(path: Path, conn: sqlite3.Connection) -> None:
    if sqlite3.sqlite_version_info < schema.OLDEST_SQLITE:
        needed = ".".join(map(str, schema.OLDEST_SQLITE))
        raise CannotStart(
            f"this Python has SQLite {sqlite3.sqlite_version}, and the ledger needs {needed} or newer; "
            "use a Python that brings its own, such as uv's"
        )
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    owner = conn.execute("PRAGMA application_id").fetchone()[0]
    empty = conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if owner != LEDGER_APPLICATION_ID and not empty:
        raise CannotStart(f"{path} is a database of another program; set --ledger to another file")
    if version > schema.VERSION:
        raise CannotStart(f"{path} was written by a newer nullworker: update, or set --ledger to another file")
