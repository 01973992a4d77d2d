"""SQLite helpers: transactions, splitting a script into statements, and recognizing a damaged file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final, Literal

from nullworker.errors import LogDamaged

#: What a damaged file can raise. SQLite quotes what it has read, and Python cannot always decode that sentence.
UNREADABLE: Final = (LogDamaged, sqlite3.DatabaseError, UnicodeDecodeError)
#: In damage that is told as an OperationalError, like a lock or a full disk.
_WORDS: Final = ("malformed", "corrupt", "no such table", "no such column", "could not decode")


@contextlib.contextmanager
def transaction(conn: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
    """IMMEDIATE writes; in a DEFERRED one, which only reads, several queries see the log as it is at the first.

    Raises:
        sqlite3.Error: it cannot be begun or committed; nothing was done.
    """
    conn.execute(f"BEGIN {kind}")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite itself may have done it, and would hide the cause
            conn.execute("ROLLBACK")
        raise


def statements(script: str) -> list[str]:
    """The statements of a script, one by one: `executescript` would commit a transaction that is open."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part.strip())
            part = ""
    return found


def is_damage(error: BaseException) -> bool:
    """Whether an error speaks of the file, and not of the disk, a lock or a full table."""
    if isinstance(error, sqlite3.OperationalError):
        return any(word in str(error).lower() for word in _WORDS)
    damage = isinstance(error, sqlite3.InternalError) or type(error) is sqlite3.DatabaseError
    return damage or not isinstance(error, sqlite3.Error)
