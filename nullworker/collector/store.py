"""The store of the collector: one SQLite file, written by one process.

`add` is one transaction: when it returns the batch is on disk, and when it raises none of it is stored. Writes run on
the caller's thread; `read` opens its own connection, so that a page never waits for a commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nullworker.clock import wall_iso
from nullworker.collector import schema
from nullworker.collector.batch import LATEST, Received, source_parts
from nullworker.errors import CannotStart, Forbidden, NullworkerError
from nullworker.eventlog.lock import lock_beside, refuse_other_kind
from nullworker.eventlog.schema import FLEET_APPLICATION_ID
from nullworker.eventlog.sqlite import still_names, transaction

#: Milliseconds that a write waits for the lock of another program, such as a sqlite3 shell.
BUSY_MILLISECONDS: Final = 2000
#: Bytes that the write-ahead log keeps on disk after a checkpoint.
WAL_BYTES: Final = 64 * 1024 * 1024
#: Reservations that are pruned in one transaction.
PRUNE_STEP: Final = 500

_INSERT: Final = """
INSERT INTO received
    (id, source_id, seq, event_id, digest, conflict, at, kind, reservation_id, reason, received_at, body)
VALUES ((SELECT coalesce(max(id), 0) + 1 FROM received), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


class StoreUnavailable(NullworkerError):
    """The file cannot be written. Nothing of the transaction is in it."""


@dataclass(frozen=True)
class Added:
    """What was done with the events of a batch, as numbers of events."""

    stored: int
    duplicates: int  # stored before
    conflicts: int  # of the stored: a different event with the same seq had come
    passed_over: int  # of the stored: of a kind or version that the views ignore
    consumers_lost: int  # of the stored: ends because a consumer died or never came


class Store:
    """An open store. Use `open_store`."""

    def __init__(self, path: Path, conn: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self.conn = conn
        self._lock = lock
        self._file = os.stat(path)

    def add(self, batch: Sequence[Received], key: str, now: float) -> Added:
        """Store a batch, whole or not at all.

        Args:
            key: the log's key, from the header; "": none. The first batch of a source pins it.
            now: epoch seconds.

        Raises:
            Forbidden: a source of the batch is pinned to another key.
            StoreUnavailable: the disk is full, or the file is damaged or gone.
        """
        key_sha256 = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest() if key else ""
        counts = {"stored": 0, "duplicates": 0, "conflicts": 0, "passed_over": 0, "consumers_lost": 0}
        with self._writing():
            ids = {source: self._source(source, key_sha256, now) for source in {event.source for event in batch}}
            for event in batch:
                for name in self._add_one(event, ids[event.source], now):
                    counts[name] += 1
            for source, source_id in ids.items():  # a worker that sends later events has not stopped
                latest = max(
                    (event.at for event in batch if event.source == source and event.kind and event.at), default=0.0
                )
                self.conn.execute(
                    "UPDATE sources SET stopped_at = NULL WHERE id = ? AND stopped_at < ?", (source_id, latest)
                )
        return Added(**counts)

    def prune(self, before: float) -> Iterator[int]:
        """Remove the reservations that ended before a time, in epoch seconds. Yields the number removed in each step.

        Workers without any event left, that have sent nothing since then, are removed too, with their pinned keys.

        Raises:
            StoreUnavailable: nothing of this step was removed.
        """
        while True:
            with self._writing():
                rows = self.conn.execute(
                    "SELECT id FROM holds WHERE ended_at < ? AND coalesce(ended, 0) < (SELECT max(id) FROM received)"
                    " LIMIT ?",
                    (before, PRUNE_STEP),
                ).fetchall()
                self.conn.executemany("INSERT INTO pruning VALUES (?)", rows)
                if not rows:
                    self.conn.execute(
                        "DELETE FROM received WHERE kind IS NULL AND received_at < ?"
                        " AND id < (SELECT max(id) FROM received)",
                        (before,),
                    )
                    self.conn.execute(
                        "DELETE FROM sources WHERE last_heard_at < ? AND id NOT IN (SELECT source_id FROM received)",
                        (before,),
                    )
            if not rows:
                return
            yield len(rows)

    def set_options(self, *, price: float | None, prices: Mapping[str, float], silence: float) -> None:
        """Store the prices in dollars per hour, and the seconds after which a worker is silent, for the views.

        A price of None, or an instance that is not named, leaves the stored price.

        Raises:
            StoreUnavailable: they were not stored.
        """
        meta = [("silence", repr(silence)), *([] if price is None else [("price", repr(price))])]
        with self._writing():
            self.conn.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
            self.conn.executemany("INSERT OR REPLACE INTO prices VALUES (?, ?)", prices.items())

    def probe(self) -> None:
        """Check that the file can be written.

        Raises:
            StoreUnavailable: it cannot.
        """
        with self._writing():
            self.conn.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", (wall_iso(),))

    def size(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        total = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                total += os.stat(f"{self.path}{suffix}").st_size
        return total

    def read(self) -> sqlite3.Connection:
        """A connection that only reads, for one thread.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_MILLISECONDS / 1000)

    def close(self) -> None:
        """Close the file and release the lock."""
        with contextlib.suppress(sqlite3.Error):
            self.conn.close()
        os.close(self._lock)

    # -- inside --------------------------------------------------------------------------------------------------

    def _source(self, source: str, key_sha256: str, now: float) -> int:
        row = self.conn.execute("SELECT id, key_sha256 FROM sources WHERE source = ?", (source,)).fetchone()
        if row is None:
            worker, instance = source_parts(source)
            inserted = self.conn.execute(
                "INSERT INTO sources (source, key_sha256, worker, instance, first_heard_at, last_heard_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (source, key_sha256, worker, instance, now, now),
            )
            assert inserted.lastrowid is not None
            return inserted.lastrowid
        if not hmac.compare_digest(row[1], key_sha256):
            raise Forbidden(f"{source} is pinned to another log's key", source=source)
        self.conn.execute("UPDATE sources SET last_heard_at = max(last_heard_at, ?) WHERE id = ?", (now, row[0]))
        return int(row[0])

    def _add_one(self, event: Received, source_id: int, now: float) -> list[str]:
        where, value = ("seq IS NOT NULL AND seq = ?", event.seq)
        if event.seq is None:
            where, value = "seq IS NULL AND event_id = ?", event.event_id  # type: ignore[assignment]  # bound either way
        known = self.conn.execute(f"SELECT digest FROM received WHERE source_id = ? AND {where}", (source_id, value))
        digests = {digest for (digest,) in known}
        if event.digest in digests:
            return ["duplicates"]
        values = (source_id, event.seq, event.event_id, event.digest, int(bool(digests)), event.at, event.kind)
        self.conn.execute(_INSERT, (*values, event.reservation_id, event.reason, now, event.body))
        if event.worker is not None:
            self._note_worker(event, source_id, now)
        counted = ["stored"]
        if digests:
            counted.append("conflicts")
        if event.kind is None and event.worker is None:
            counted.append("passed_over")
        if event.reason in ("consumer_lost", "consumer_absent") and event.kind == "cancelled":
            counted.append("consumers_lost")
        return counted

    def _note_worker(self, event: Received, source_id: int, now: float) -> None:
        """Store what a worker sends about itself. Fields of an unexpected type are ignored."""
        assert event.worker is not None
        assert event.at is not None
        kind = event.type.rpartition(".")[2]
        texts = {name: value for name in ("version", "url") if isinstance(value := event.worker.get(name), str)}
        gpus = event.worker.get("gpus")
        if isinstance(gpus, list) and gpus and all(isinstance(gpu, str) for gpu in gpus):
            texts["gpu"] = ", ".join(
                sorted({f"{gpus.count(gpu)} x {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in gpus})
            )
        columns: dict[str, Any] = {name: value[:512] for name, value in texts.items()}
        clock = event.worker.get("clock")
        if isinstance(clock, (int, float)) and 0 <= clock <= LATEST:
            columns["skew_seconds"] = float(clock) - now
        if kind == "started":
            columns |= {"started_at": event.at, "stopped_at": None}
        elif kind == "stopped":
            columns["stopped_at"] = event.at
        elif kind == "alive":
            columns["stopped_at"] = None
        if not columns:
            return
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.conn.execute(f"UPDATE sources SET {assignments} WHERE id = ?", (*columns.values(), source_id))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if not still_names(self.path, self._file):
            raise StoreUnavailable(f"{self.path} was moved or removed; restart the collector")
        try:
            with transaction(self.conn):
                yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreUnavailable(f"{self.path} cannot be written: {error}") from error


def open_store(path: Path) -> Store:
    """Open the file; create it if there is none.

    Raises:
        CannotStart: another collector uses it, it is damaged, of another program or of a newer version, or the folder
            is not writable.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_other_kind(path, FLEET_APPLICATION_ID, "give --db another file")
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # -wal and -shm take its mode
        lock = lock_beside(path, "a collector", "stop that one, or give --db another file")
    except OSError as error:
        raise CannotStart(f"{path} cannot be created: {error.strerror}; give --db another file") from error
    try:
        conn = sqlite3.connect(path, isolation_level=None, timeout=BUSY_MILLISECONDS / 1000, cached_statements=64)
        try:
            _check(path, conn)
            conn.execute("PRAGMA journal_mode = WAL")
            conn.execute("PRAGMA synchronous = FULL")
            conn.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            schema.migrate(conn)
            return Store(path, conn, lock)
        except BaseException:
            conn.close()
            raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        os.close(lock)
        raise CannotStart(
            f"{path} cannot be opened: {error}; if it is damaged, move it away (sqlite3's .recover extracts what is "
            "readable) and start again: the workers keep the events that were not accepted"
        ) from error
    except BaseException:
        os.close(lock)
        raise


def _check(path: Path, conn: sqlite3.Connection) -> None:
    owner = conn.execute("PRAGMA application_id").fetchone()[0]
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if owner != FLEET_APPLICATION_ID and conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise CannotStart(f"{path} is not a database of `nullworker collect`; give --db another file")
    if version > schema.VERSION:
        raise CannotStart(f"{path} was written by a newer nullworker; update nullworker, or give --db another file")
