"""Whether a log can be trusted: at the start everything is read that a worker needs to go on, and must make sense.

What it leaves out: what is done with a damaged file (log.py).

The one rule: a start costs what is open and owed, not what the log has grown to.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Final

from nullworker import history
from nullworker.clock import iso
from nullworker.errors import IllegalMove, LogDamaged
from nullworker.fsm.book import Book, Limits

if TYPE_CHECKING:
    from nullworker.log import EventLog

#: What a damaged file can raise. SQLite quotes what it has read, and Python cannot always decode that sentence.
UNREADABLE: Final = (LogDamaged, sqlite3.DatabaseError, UnicodeDecodeError)

#: The cursors of the two that read along: metrics/reporter.py.
READERS: Final = ("worker_status", "delete_requests")
#: In damage that is told as an OperationalError, like a lock or a full disk.
_WORDS: Final = ("malformed", "corrupt", "no such table", "no such column", "could not decode")


def is_damage(error: BaseException) -> bool:
    """Whether an error speaks of the file, and not of the disk, a lock or a full table."""
    if isinstance(error, sqlite3.OperationalError):
        return any(word in str(error).lower() for word in _WORDS)
    damage = isinstance(error, sqlite3.InternalError) or type(error) is sqlite3.DatabaseError
    return damage or not isinstance(error, sqlite3.Error)


def rehearse(log: EventLog) -> None:
    """Read what is open and what is owed, as the worker will.

    Raises:
        UNREADABLE: it cannot be read, or does not make sense.
    """
    try:
        _read_what_is_open(log)
        _read_what_is_owed(log)
    except (IllegalMove, ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise LogDamaged(f"what a worker needs to go on makes no sense: {type(error).__name__}: {error}") from error


def _read_what_is_open(log: EventLog) -> None:
    book = Book(Limits())
    for _, event in log.live():
        iso(book.apply(event).ends_at or event.at)
    live = {reservation.id: reservation.state for reservation in book.live()}
    if live != dict(log.conn.execute("SELECT reservation_id, state FROM live")):
        raise LogDamaged("the table `live` does not say what the events say")
    log.anchor()


def _read_what_is_owed(log: EventLog) -> None:
    for owed in history.callbacks(log.conn, after=0):
        history.callback_call(log.conn, owed.seq)
    for name in READERS:
        seq = log.cursor(name)
        history.count_begun(log.conn, after=seq)
        while batch := history.finished(log.conn, after=seq, limit=1000):
            if batch[-1].seq <= seq:
                raise LogDamaged(f"event {batch[-1].seq} comes after event {seq}")
            seq = batch[-1].seq


def examine(conn: sqlite3.Connection) -> None:
    """Read the whole file. It takes as long as the file is large, so it is done only after a write has met damage.

    Raises:
        UNREADABLE: it is not sound.
    """
    found = conn.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise LogDamaged(found)
