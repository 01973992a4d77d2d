"""SQLite helpers: transactions, splitting a script into statements, and recognizing a damaged file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from nullworker.errors import LogDamaged

#: Exceptions that a damaged file can cause. SQLite's messages quote its content, which Python may fail to decode.
UNREADABLE: Final = (LogDamaged, sqlite3.DatabaseError, UnicodeDecodeError)
#: Words in the message of an OperationalError that is caused by damage, not by a lock or a full disk.
_WORDS: Final = ("malformed", "corrupt", "no such table", "no such column", "could not decode")


@contextlib.contextmanager
def transaction(conn: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
    """A transaction: IMMEDIATE to write, DEFERRED so that several reads see one snapshot.

    Raises:
        sqlite3.Error: it could not be begun or committed; nothing has changed.
    """
    conn.execute(f"BEGIN {kind}")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
            conn.execute("ROLLBACK")
        raise


def still_names(path: Path, opened: os.stat_result) -> bool:
    """Whether a path still names the file that was opened; SQLite would also write to a removed one."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), opened)
    return False


def statements(script: str) -> list[str]:
    """Split a script into statements, since `executescript` would commit an open transaction."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part.strip())
            part = ""
    return found


def is_damage(error: BaseException) -> bool:
    """Whether an error means that the file is damaged, as opposed to a full disk or a lock."""
    if isinstance(error, sqlite3.OperationalError):
        return any(word in str(error).lower() for word in _WORDS)
    damage = isinstance(error, sqlite3.InternalError) or type(error) is sqlite3.DatabaseError
    return damage or not isinstance(error, sqlite3.Error)


def is_lock(error: BaseException) -> bool:
    """Whether the cause of an error is the lock of another program, which may be released in a moment."""
    return isinstance(error, sqlite3.OperationalError) and "is locked" in str(error)
