"""How a log gets its shape: a new file in one transaction, an older one step by step by sqlite-utils' migrations.

A new file is what a cold worker has, and need not wait for sqlite-utils: that would be 30 ms and 2.6 MB of each start.
Its steps are recorded in sqlite-utils' table all the same, so that a later version knows what to go on from.

The one rule: `user_version` is written last, so that a file whose steps were cut off is gone on with.
"""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING, Final

from nullworker.clock import wall_iso
from nullworker.schema import APPLICATION_ID, RULES, TABLES, VERSION, VIEWS
from nullworker.transaction import transaction

if TYPE_CHECKING:
    from sqlite_utils import Database

_SET: Final = "nullworker"
#: The table of sqlite-utils 4, as sqlite_utils/migrations.py makes it.
_RECORD: Final = """
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
"""


def _statements(script: str) -> list[str]:
    statements, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            statements.append(part.strip())
            part = ""
    return statements


#: By name, in order: the tables, which hold what is kept. Of a released step nothing is changed; schema.TABLES is that
#: of the first, and a new column comes by a step of its own.
STEPS: Final[dict[str, list[str]]] = {
    "m001_events": _statements(TABLES),
    "m002_pruning": ["CREATE TABLE IF NOT EXISTS pruning (reservation_id TEXT PRIMARY KEY) STRICT"],
}
#: Triggers and views hold nothing: each file gets all of them anew, when it has today's tables.
_FINISH: Final = [
    *(f"DROP TRIGGER IF EXISTS {name}" for name in re.findall(r"CREATE TRIGGER (\w+)", RULES)),
    *_statements(RULES),
    *(f"DROP VIEW IF EXISTS {name}" for name in VIEWS),
    *(f"CREATE VIEW {name} AS {select}" for name, select in VIEWS.items()),
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
]


def migrate(conn: sqlite3.Connection) -> None:
    """Bring a file to VERSION. A step that has failed has changed nothing, and is tried again at the next start.

    Raises:
        sqlite3.Error: it cannot be read or written.
    """
    if conn.execute("PRAGMA user_version").fetchone()[0] == VERSION:
        return
    if conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
        with transaction(conn):
            _make_tables(conn)
            _finish(conn)
    else:
        _bring_tables_up_to_date(conn)
        with transaction(conn):
            _finish(conn)


def _make_tables(conn: sqlite3.Connection) -> None:
    for statement in (*_statements(_RECORD), *(each for step in STEPS.values() for each in step)):
        conn.execute(statement)
    record = 'INSERT INTO "_sqlite_migrations" (migration_set, name, applied_at) VALUES (?, ?, ?)'
    conn.executemany(record, [(_SET, name, wall_iso()) for name in STEPS])


def _bring_tables_up_to_date(conn: sqlite3.Connection) -> None:
    from sqlite_utils import Database, Migrations

    migrations = Migrations(_SET)
    for name, statements in STEPS.items():

        @migrations(name=name)
        def step(db: Database, statements: list[str] = statements) -> None:
            for statement in statements:  # in a transaction of sqlite-utils; executescript() would commit it
                db.execute(statement)

    migrations.apply(Database(conn))


def _finish(conn: sqlite3.Connection) -> None:
    for statement in _FINISH:
        conn.execute(statement)
