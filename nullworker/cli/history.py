"""`nullworker history, events`: the event log, for people and for scripts, also while its worker is not running.

Both read files: those of --log, else the log of the worker that answers on the control port, else the log that a
worker started here would write. A file may also be the database of `nullworker collect`, whose rows name their worker.
--follow polls each file, and continues with the new one when it is replaced. Nothing is written, and the worker is
asked only for the path of its log.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from nullworker.cli.options import with_control
from nullworker.cli.words import clock_time, duration, fit, job_name, width
from nullworker.clock import SystemClock, from_shown, iso
from nullworker.control_client import ControlClient
from nullworker.errors import BadSettings, CannotStart, WorkerUnreachable
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_for_reading
from nullworker.eventlog.schema import is_fleet
from nullworker.eventlog.sqlite import transaction
from nullworker.fsm.table import EVENT_KINDS, STATES
from nullworker.settings import read_seconds

#: Seconds between two polls of a log that is followed.
POLL_SECONDS: Final = 0.2
_ALL: Final = 2**62
#: Widths: the maximum of a log's name and of a reason, and the minimum of a job's name.
_LOG_COLUMNS, _WHY_COLUMNS, _JOB_COLUMNS = 10, 20, 12


class _Path(click.types.StringParamType):
    """A path; the environment variable holds one path, in which spaces do not separate."""

    name = "path"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


class Column(NamedTuple):
    """A column of the terminal: its head, its width, and its value in a row."""

    head: str
    width: int
    value: Callable[[Mapping[str, Any]], Any]


def _since(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return SystemClock().now() - read_seconds(text)
    except ValueError:
        pass
    try:
        return from_shown(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} must be an age as 90s, 15m, 6h or 2d, or an ISO 8601 time") from None


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
        return metadata is not None and (self.job in job_name(metadata) or self.job in _json(metadata))


def _options(
    kind: str, states: Iterable[str]
) -> Callable[[Callable[[ControlClient, Query], None]], Callable[..., None]]:
    def decorate(command: Callable[[ControlClient, Query], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_query(control: ControlClient, **options: Any) -> None:
            command(control, Query(**options))

        decorated: Callable[..., None] = with_query
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line."),
            click.option("--follow", "-f", is_flag=True, help="Keep running, and print new ones as they come."),
            click.option(
                "--limit", metavar="N", type=click.IntRange(0), default=50, show_default=True, help="Only the newest N."
            ),
            click.option("--job", metavar="TEXT", help="Only those whose metadata contain TEXT."),
            click.option("--state", type=click.Choice(list(states)), help=f"Only those of this {kind}."),
            click.option(
                "--since",
                metavar="TIME",
                callback=_since,
                help="Only since then: an age as 15m, 6h or 2d, or an ISO time.",
            ),
            click.option(
                "--log",
                type=_Path(),
                metavar="PATH",
                envvar="NULL_EVENT_LOG",
                show_envvar=True,
                multiple=True,
                help="A log, or a database of `nullworker collect`; may be given several times.  "
                "[default: the log of the running worker]",
            ),
        ):
            decorated = option(decorated)
        return with_control(decorated)

    return decorate


@click.command()
@_options("state", STATES)
def history(control: ControlClient, query: Query) -> None:
    """List reservations, newest first. With --follow: oldest first, and each again after every new event.

    The worker need not be running.

    \b
    Example:
      nullworker history --job render --since 1h
    """
    with _opened(control, query.log) as logs:
        merged = heapq.merge(*(log.reservations(query) for log in logs), key=_queued_at, reverse=True)
        rows = list(itertools.islice(merged, query.limit))
        printer = _Printer(_columns_of_history(rows, query, logs), query)
        printer.print(rows[::-1] if query.follow else rows)
        for log, event in _events_to_come(logs) if query.follow else ():
            row = log.reservation(event["reservation_id"])
            if row is not None and query.state in (None, row["state"]) and query.matches(row["metadata"]):
                printer.print([row])


@click.command()
@_options("kind", EVENT_KINDS)
def events(control: ControlClient, query: Query) -> None:
    """List the newest events of the log, oldest first.

    The worker need not be running.

    \b
    Example:
      nullworker events --follow --state held
    """
    with _opened(control, query.log) as logs:
        merged = heapq.merge(*(log.newest_events(query) for log in logs), key=_at, reverse=True)
        rows = list(itertools.islice(merged, query.limit))[::-1]
        printer = _Printer(_columns_of_events(rows, query, logs), query)
        printer.print(rows)
        for _, event in _events_to_come(logs) if query.follow else ():
            if query.state in (None, event["kind"]) and query.matches(event["_metadata"]):
                printer.print([event])


def _queued_at(row: Mapping[str, Any]) -> str:
    return str(row["queued_at"])


def _at(row: Mapping[str, Any]) -> str:
    return str(row["at"])


# -- the logs ----------------------------------------------------------------------------------------------------------


class _Log:
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
        if self._opened is not None:
            self._opened.close()

    @property
    def conn(self) -> sqlite3.Connection:
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
def _opened(control: ControlClient, paths: Sequence[str]) -> Iterator[list[_Log]]:
    with contextlib.ExitStack() as stack:
        files = [Path(path) for path in paths] or [_find(control)]
        names = _short_names(files) if len(files) > 1 else [None]
        yield [
            stack.enter_context(contextlib.closing(_Log(path, name))) for path, name in zip(files, names, strict=True)
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


def _events_to_come(logs: Sequence[_Log]) -> Iterator[tuple[_Log, dict[str, Any]]]:
    while True:
        events = [(log, event) for log in logs for event in log.events_to_come()]
        yield from sorted(events, key=lambda log_and_event: str(log_and_event[1]["at"]))
        if not events:
            time.sleep(POLL_SECONDS)


# -- the terminal ------------------------------------------------------------------------------------------------------


def _columns_of_history(rows: Sequence[Mapping[str, Any]], query: Query, logs: Sequence[_Log]) -> list[Column]:
    """Those that fit: in 80 columns the time, the state, the reason and the job; in more also the id and the result."""
    columns = [
        *_log_column(logs),
        Column("queued at (UTC)", 20, lambda row: clock_time(row["queued_at"])),
        Column("state", 9, lambda row: row["state"]),
        Column("held", 7, lambda row: None if row["held_seconds"] is None else duration(row["held_seconds"])),
    ]
    columns.append(_why("reason", lambda row: row["reason"], rows, query, columns))
    further = (
        Column("id", 16, lambda row: row["id"]),
        Column("waited", 7, lambda row: None if row["queued_seconds"] is None else duration(row["queued_seconds"])),
        Column("result", 24, lambda row: None if row["result"] is None else _json(row["result"])),
    )
    for column in further:
        if _left(columns) - column.width - 2 >= 2 * _JOB_COLUMNS:
            columns.append(column)
    return [*columns, Column("job", _left(columns), _job)]


def _columns_of_events(rows: Sequence[Mapping[str, Any]], query: Query, logs: Sequence[_Log]) -> list[Column]:
    columns = [
        *_log_column(logs),
        Column("seq", max([5, *(len(str(row["seq"])) for row in rows)]), lambda row: row["seq"]),
        Column("at (UTC)", 20, lambda row: clock_time(row["at"])),
        Column("event", 9, lambda row: row["kind"]),
    ]
    columns.append(_why("what", _story, rows, query, columns))
    if _left(columns) - 18 >= 2 * _JOB_COLUMNS:
        columns.append(Column("reservation", 16, lambda row: row["reservation_id"]))
    return [*columns, Column("job", _left(columns), _job)]


def _log_column(logs: Sequence[_Log]) -> list[Column]:
    names = [log.name for log in logs if log.name is not None]
    columns = [Column("log", min(max(map(len, names)), _LOG_COLUMNS), lambda row: _end_of(row["log"]))] if names else []
    if any(log.is_fleet for log in logs):
        columns.append(Column("instance", _LOG_COLUMNS, lambda row: (row.get("worker") or "-").partition("/")[0]))
    return columns


def _end_of(name: str) -> str:
    """The end of a log's name, where names differ: nullworker-7.db."""
    return name if len(name) <= _LOG_COLUMNS else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LOG_COLUMNS :]}"


def _why(
    head: str,
    value: Callable[[Mapping[str, Any]], Any],
    rows: Sequence[Mapping[str, Any]],
    query: Query,
    before: Sequence[Column],
) -> Column:
    """A column as wide as its widest value, or _WHY_COLUMNS for rows to come; it leaves room for the job."""
    needed = _WHY_COLUMNS if query.follow else max([len(head), *(len(str(value(row) or "-")) for row in rows)])
    return Column(head, min(needed, _WHY_COLUMNS, max(_left(before) - _JOB_COLUMNS - 2, len(head))), value)


def _left(columns: Sequence[Column]) -> int:
    """Columns of the terminal that are left for the job."""
    return max(width() - sum(column.width + 2 for column in columns), _JOB_COLUMNS)


def _job(row: Mapping[str, Any]) -> str:
    name = row["metadata"] if "id" in row else row["_metadata"]
    return job_name(name) or str(row.get("id") or row["reservation_id"])


def _story(event: Mapping[str, Any]) -> str:
    """The reason, or the deadline, without its date if it is the same day."""
    data = event["data"]
    if event["kind"] == "queued":
        cap = data.get("duration_cap")  # a collector stores what workers send, unchecked
        return f"{data.get('kind')} up to {duration(cap)}" if isinstance(cap, (int, float)) else str(data.get("kind"))
    if event["kind"] in ("held", "extended"):
        ends_at = data.get("ends_at")
        ends = iso(ends_at) if isinstance(ends_at, (int, float)) and 0 <= ends_at < 1e11 else "-"
        return f"until {ends[11:19] if ends[:10] == event['at'][:10] else ends[5:16]}"
    return str(event["reason"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Printer:
    """Prints rows as JSON lines, or as columns under a head."""

    def __init__(self, columns: Sequence[Column], query: Query) -> None:
        self._columns = columns
        self._as_json = query.as_json
        if not self._as_json:
            click.secho(self._line([fit(column.head, column.width) for column in columns]), bold=True)

    def print(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if self._as_json:
                click.echo(json.dumps({name: value for name, value in row.items() if name != "_metadata"}))
            else:
                click.echo(
                    self._line([fit(str(_or_dash(column.value(row))), column.width) for column in self._columns])
                )

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(column.width) for cell, column in zip(cells, self._columns, strict=True))
        return "  ".join(padded).rstrip()


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
