"""The logs that `nullworker history` and `nullworker events` read, and their rows as both commands show them.

A log is a file: of --log, else of the worker that answers on the control port, else the file that a worker started here
would write. It may also be the database of `nullworker collect`, whose rows name their worker. Nothing is written, and
the worker is asked only for the path of its log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from nullworker.cli.words import job_name
from nullworker.control_client import ControlClient
from nullworker.errors import BadSettings, CannotStart, WorkerUnreachable
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_for_reading
from nullworker.eventlog.schema import is_fleet
from nullworker.eventlog.sqlite import transaction

#: Seconds between two polls of a log that is followed.
POLL_SECONDS: Final = 0.2
_ALL: Final = 2**62


class Query(NamedTuple):
    """The options of both commands. `since`: epoch seconds."""

    log: tuple[str, ...]
    since: float | None
    state: str | None
    job: str | None
    limit: int
    follow: bool
    as_json: bool

    def matches(self, metadata: Mapping[str, Any] | None) -> bool:
        """Whether --job matches: its text is in the reservation's metadata, as shown or as JSON."""
        if self.job is None:
            return True
        return metadata is not None and (
            self.job in job_name(metadata) or self.job in json.dumps(metadata, ensure_ascii=False)
        )


class ReadLog:
    """One log, read from its file, also after another file has replaced it. Its rows name the log."""

    def __init__(self, path: Path, name: str | None) -> None:
        self.name = name
        self._path = path
        self._opened: EventLog | None = open_for_reading(path)
        self._file = _identity(path)
        self.is_fleet = is_fleet(self.conn)
        #: seq of the last event that was read.
        self.last = self._newest()

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()

    @property
    def conn(self) -> sqlite3.Connection:
        """The read-only connection."""
        assert self._opened is not None
        return self._opened.conn

    def reservations(self, query: Query) -> list[dict[str, Any]]:
        """The newest first, from one snapshot of the log."""
        limit = query.limit if query.job is None else _ALL
        with self._errors_named(), transaction(self.conn, "DEFERRED"):
            batches = queries.batches(
                self.conn, state=query.state, since=query.since, limit=limit, by_time=self.is_fleet
            )
            rows = (row for row in itertools.chain.from_iterable(batches) if query.matches(row["metadata"]))
            return [self._named(row) for row in itertools.islice(rows, query.limit)]

    def reservation(self, reservation_id: str) -> dict[str, Any] | None:
        """One reservation; None: it is not in the log."""
        with self._errors_named():
            row = queries.reservation(self.conn, reservation_id)
        return None if row is None else self._named(row)

    def newest_events(self, query: Query) -> list[dict[str, Any]]:
        """The newest first, up to the last one at the time of opening."""
        with self._errors_named(), contextlib.closing(self.conn.cursor()) as cursor:
            cursor.execute(
                "SELECT seq, at, reservation_id, kind, reason, data FROM events"
                " WHERE seq <= ? AND at >= coalesce(?, at) AND kind = coalesce(?, kind)"
                f" ORDER BY {'at DESC, ' if self.is_fleet else ''}seq DESC",
                (self.last, query.since, query.state),
            )
            events = (self._event(queries.event_json(*row)) for row in cursor)
            matching = (event for event in events if query.matches(event["_metadata"]))
            return list(itertools.islice(matching, query.limit))

    def events_to_come(self) -> list[dict[str, Any]]:
        """Events after the last one that was read; after a replacement, all events of the new file."""
        with self._errors_named():
            self._reopen_when_replaced()
            if self._opened is None:
                return []
            events = queries.events(self.conn, after=self.last)
            self.last = events[-1]["seq"] if events else self.last
            return [self._event(event) for event in events]

    def _reopen_when_replaced(self) -> None:
        file = _identity(self._path)
        if file is None:
            return  # the worker may still write to the open file
        if self._opened is not None:
            if file == self._file and self._newest() >= self.last:
                return
            click.echo(f"nullworker: the log {self._path} was replaced: continuing with the new one", err=True)
            self.close()
            self._opened, self.last = None, 0
        with contextlib.suppress(CannotStart, sqlite3.Error):  # it is not complete yet
            opened = open_for_reading(self._path)
            try:
                opened.conn.execute("SELECT 1 FROM events")
            except sqlite3.Error:
                opened.close()
                raise
            self._opened, self._file = opened, file

    def _newest(self) -> int:
        return int(self.conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])

    def _event(self, event: queries.EventJson) -> dict[str, Any]:
        """The event with its reservation's metadata, which only the event `queued` contains."""
        metadata = event["data"].get("metadata")
        if event["kind"] != "queued":
            sql = "SELECT data -> 'metadata' FROM events WHERE reservation_id = ? AND kind = 'queued'"
            (text,) = self.conn.execute(sql, (event["reservation_id"],)).fetchone() or (None,)
            metadata = None if text is None else json.loads(text)
        return self._named({**event, "_metadata": metadata})

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.is_fleet:
            row = {"worker": self._worker(row), **row}
        return dict(row) if self.name is None else {"log": self.name, **row}

    def _worker(self, row: Mapping[str, Any]) -> str | None:
        sql = "SELECT worker FROM events WHERE reservation_id = ?"
        worker = self.conn.execute(sql, (row["id"] if "id" in row else row["reservation_id"],)).fetchone()
        return None if worker is None else str(worker[0])

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CannotStart(f"the event log {self._path} cannot be read: {error}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at a path; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def opened(control: ControlClient, paths: Sequence[str]) -> Iterator[list[ReadLog]]:
    """The logs at `paths`, or the default log, open until the block ends."""
    with contextlib.ExitStack() as stack:
        files = [Path(path) for path in paths] or [_find(control)]
        names = _short_names(files) if len(files) > 1 else [None]
        yield [
            stack.enter_context(contextlib.closing(ReadLog(path, name)))
            for path, name in zip(files, names, strict=True)
        ]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Each path without the common beginning: `7/nullworker.db`; or `7`, when only the folders differ."""
    absolute = [path.absolute() for path in paths]
    for names in ([path.name for path in absolute], [path.parent.name for path in absolute]):
        if len(set(names)) == len(names):
            return names
    common = os.path.commonpath([path.parent for path in absolute])
    return [os.path.relpath(path, common) for path in absolute]


def _find(control: ControlClient) -> Path:
    """The log of the running worker, or that of a worker started here."""
    from nullworker.settings import read_settings

    try:
        path = Path(control.ask("GET", "/status")["log"]["path"])
        where = f"the worker on {control.url} keeps its log in {path}, which is not on this machine"
    except WorkerUnreachable as unreachable:
        try:
            path = read_settings({**os.environ, "UNSECURED": "true"}).event_log
        except BadSettings:
            raise unreachable from None
        where = f"{unreachable}; and there is no log {path.absolute()}"
    if not path.exists():
        raise CannotStart(f"{where}: give --log PATH or NULL_EVENT_LOG")
    return path


def events_to_come(logs: Sequence[ReadLog]) -> Iterator[tuple[ReadLog, dict[str, Any]]]:
    """New events of all logs, by their time, for ever."""
    while True:
        events = [(log, event) for log in logs for event in log.events_to_come()]
        yield from sorted(events, key=lambda log_and_event: str(log_and_event[1]["at"]))
        if not events:
            time.sleep(POLL_SECONDS)
