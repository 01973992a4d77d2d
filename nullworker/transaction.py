"""A transaction of SQLite: all or none of what its block does.

The one rule: whoever begins one does it here.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Literal


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
