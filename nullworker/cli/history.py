"""`nullworker history, events`: the event log, for people and for scripts, also while its worker is not running.

The log is a file on this machine, and they read the file: those that are named, or that of the worker that answers on
the control port, or the one that a worker started here would write; or the database of `nullworker collect`, whose
rows say which worker they are of. --follow looks at each file again and again, and
goes on with the new one when it is replaced. Nothing is written, and the worker is asked only where its log is.
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
LOOK_SECONDS: Final = 0.2
_ALL: Final = 2**62
#: Columns that the name of a log and a reason get at most, and the name of a job at least.
_LOG_COLUMNS, _WHY_COLUMNS, _JOB_COLUMNS = 10, 20, 12


class _Path(click.types.StringParamType):
    """A path; its variable holds one, which may have spaces in it."""

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


class Asked(NamedTuple):
    """The options of both commands. `since`: epoch seconds."""

    log: tuple[str, ...]
    since: float | None
    state: str | None
    job: str | None
    limit: int
    follow: bool
    as_json: bool

    def wants(self, metadata: Mapping[str, Any] | None) -> bool:
        """Whether a reservation is of the job that is asked for: the text is in its metadata, as shown or as JSON."""
        if self.job is None:
            return True
        return metadata is not None and (self.job in job_name(metadata) or self.job in _json(metadata))


def _options(states: Iterable[str]) -> Callable[[Callable[[ControlClient, Asked], None]], Callable[..., None]]:
    def decorate(command: Callable[[ControlClient, Asked], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def asked(control: ControlClient, **options: Any) -> None:
            command(control, Asked(**options))

        decorated: Callable[..., None] = asked
        for option in (
            click.option("--json", "as_json", is_flag=True, help="JSON, one object a line."),
            click.option("--follow", "-f", is_flag=True, help="Print new ones as they come, oldest first."),
            click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="Only the newest."),
            click.option("--job", metavar="TEXT", help="Only those with this text in their metadata."),
            click.option("--state", type=click.Choice(list(states)), help="Only these."),
            click.option("--since", metavar="TIME", callback=_since, help="An age as 15m, 6h or 2d, or an ISO time."),
            click.option(
                "--log",
                type=_Path(),
                metavar="PATH",
                envvar="NULL_EVENT_LOG",
                show_envvar=True,
                multiple=True,
                help="A log file; may be given several times.  [default: the running worker's]",
            ),
        ):
            decorated = option(decorated)
        return with_control(decorated)

    return decorate


@click.command()
@_options(STATES)
def history(control: ControlClient, asked: Asked) -> None:
    """List reservations, newest first. With --follow: oldest first, and each again with every new event."""
    with _opened(control, asked.log) as logs:
        found = heapq.merge(*(each.reservations(asked) for each in logs), key=_queued_at, reverse=True)
        rows = list(itertools.islice(found, asked.limit))
        printer = _Printer(_columns_of_history(rows, asked, logs), asked)
        printer.print(rows[::-1] if asked.follow else rows)
        for log, event in _events_to_come(logs) if asked.follow else ():
            row = log.reservation(event["reservation_id"])
            if row is not None and asked.state in (None, row["state"]) and asked.wants(row["metadata"]):
                printer.print([row])


@click.command()
@_options(EVENT_KINDS)
def events(control: ControlClient, asked: Asked) -> None:
    """List the newest --limit events, in order. With --follow: new ones as they come."""
    with _opened(control, asked.log) as logs:
        found = heapq.merge(*(each.newest_events(asked) for each in logs), key=_at, reverse=True)
        rows = list(itertools.islice(found, asked.limit))[::-1]
        printer = _Printer(_columns_of_events(rows, asked, logs), asked)
        printer.print(rows)
        for _, event in _events_to_come(logs) if asked.follow else ():
            if asked.state in (None, event["kind"]) and asked.wants(event["_metadata"]):
                printer.print([event])


def _queued_at(row: Mapping[str, Any]) -> str:
    return str(row["queued_at"])


def _at(row: Mapping[str, Any]) -> str:
    return str(row["at"])


# -- the logs ----------------------------------------------------------------------------------------------------------


class _Log:
    """One log that is read, and read on when another file comes in its place. Its rows say which log they are of."""

    def __init__(self, path: Path, name: str | None) -> None:
        self.name = name
        self._path = path
        self._opened: EventLog | None = open_for_reading(path)
        self._file = _identity(path)
        self.is_fleet = is_fleet(self.conn)
        #: The last event that has been read: what is to come is after it.
        self.last = self._newest()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def conn(self) -> sqlite3.Connection:
        assert self._opened is not None
        return self._opened.conn

    def reservations(self, asked: Asked) -> list[dict[str, Any]]:
        """The newest first, all of one moment, whatever the worker appends meanwhile."""
        limit = asked.limit if asked.job is None else _ALL
        with self._in_words(), transaction(self.conn, "DEFERRED"):
            batches = queries.batches(
                self.conn, state=asked.state, since=asked.since, limit=limit, by_time=self.is_fleet
            )
            rows = (row for row in itertools.chain.from_iterable(batches) if asked.wants(row["metadata"]))
            return [self._named(row) for row in itertools.islice(rows, asked.limit)]

    def reservation(self, reservation_id: str) -> dict[str, Any] | None:
        with self._in_words():
            row = queries.reservation(self.conn, reservation_id)
        return None if row is None else self._named(row)

    def newest_events(self, asked: Asked) -> list[dict[str, Any]]:
        """The newest first, up to the last that had been read when it was opened."""
        with self._in_words(), contextlib.closing(self.conn.cursor()) as cursor:
            cursor.execute(
                "SELECT seq, at, reservation_id, kind, reason, data FROM events"
                " WHERE seq <= ? AND at >= coalesce(?, at) AND kind = coalesce(?, kind)"
                f" ORDER BY {'at DESC, ' if self.is_fleet else ''}seq DESC",
                (self.last, asked.since, asked.state),
            )
            found = (self._event(queries.event_json(*row)) for row in cursor)
            rows = (event for event in found if asked.wants(event["_metadata"]))
            return list(itertools.islice(rows, asked.limit))

    def events_to_come(self) -> list[dict[str, Any]]:
        """Those after the last that was read; of another file in this one's place, all."""
        with self._in_words():
            self._reopen_when_replaced()
            if self._opened is None:
                return []
            found = queries.events(self.conn, after=self.last)
            self.last = found[-1]["seq"] if found else self.last
            return [self._event(event) for event in found]

    def _reopen_when_replaced(self) -> None:
        file = _identity(self._path)
        if file is None:
            return  # what is open is read on: the worker may still write to it
        if self._opened is not None:
            if file == self._file and self._newest() >= self.last:
                return
            click.echo(f"nullworker: the log {self._path} was replaced: going on with the new one", err=True)
            self.close()
            self._opened, self.last = None, 0
        with contextlib.suppress(CannotStart, sqlite3.Error):  # it is not whole yet
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
        """An event, and beside it its reservation's metadata, which only `queued` has in its data."""
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
        found = self.conn.execute(sql, (row["id"] if "id" in row else row["reservation_id"],)).fetchone()
        return None if found is None else str(found[0])

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CannotStart(f"the event log {self._path} cannot be read: {error}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a path; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _opened(control: ControlClient, paths: Sequence[str]) -> Iterator[list[_Log]]:
    with contextlib.ExitStack() as stack:
        found = [Path(path) for path in paths] or [_find(control)]
        names = _short_names(found) if len(found) > 1 else [None]
        yield [
            stack.enter_context(contextlib.closing(_Log(path, name))) for path, name in zip(found, names, strict=True)
        ]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Each path without what all have in common in front: `7/nullworker.db`; or `7`, when only the folders differ."""
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
        found = [(log, event) for log in logs for event in log.events_to_come()]
        yield from sorted(found, key=lambda each: str(each[1]["at"]))
        if not found:
            time.sleep(LOOK_SECONDS)


# -- the terminal ------------------------------------------------------------------------------------------------------


def _columns_of_history(rows: Sequence[Mapping[str, Any]], asked: Asked, logs: Sequence[_Log]) -> list[Column]:
    """Those that fit: in 80 columns the time, the state, the reason and the job; in more also the id and the result."""
    columns = [
        *_log_column(logs),
        Column("queued at (UTC)", 20, lambda row: clock_time(row["queued_at"])),
        Column("state", 9, lambda row: row["state"]),
        Column("held", 7, lambda row: None if row["held_seconds"] is None else duration(row["held_seconds"])),
    ]
    columns.append(_why("reason", lambda row: row["reason"], rows, asked, columns))
    further = (
        Column("id", 16, lambda row: row["id"]),
        Column("waited", 7, lambda row: None if row["queued_seconds"] is None else duration(row["queued_seconds"])),
        Column("result", 24, lambda row: None if row["result"] is None else _json(row["result"])),
    )
    for column in further:
        if _left(columns) - column.width - 2 >= 2 * _JOB_COLUMNS:
            columns.append(column)
    return [*columns, Column("job", _left(columns), _job)]


def _columns_of_events(rows: Sequence[Mapping[str, Any]], asked: Asked, logs: Sequence[_Log]) -> list[Column]:
    columns = [
        *_log_column(logs),
        Column("seq", max([5, *(len(str(row["seq"])) for row in rows)]), lambda row: row["seq"]),
        Column("at (UTC)", 20, lambda row: clock_time(row["at"])),
        Column("event", 9, lambda row: row["kind"]),
    ]
    columns.append(_why("what", _story, rows, asked, columns))
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
    """Names of logs are different at their ends: nullworker-7.db."""
    return name if len(name) <= _LOG_COLUMNS else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LOG_COLUMNS :]}"


def _why(
    head: str,
    value: Callable[[Mapping[str, Any]], Any],
    rows: Sequence[Mapping[str, Any]],
    asked: Asked,
    before: Sequence[Column],
) -> Column:
    """A column as wide as its words; of what is to come nobody knows. The job must have room beside it."""
    needed = _WHY_COLUMNS if asked.follow else max([len(head), *(len(str(value(row) or "-")) for row in rows)])
    return Column(head, min(needed, _WHY_COLUMNS, max(_left(before) - _JOB_COLUMNS - 2, len(head))), value)


def _left(columns: Sequence[Column]) -> int:
    """Columns of the terminal that are left for the job."""
    return max(width() - sum(column.width + 2 for column in columns), _JOB_COLUMNS)


def _job(row: Mapping[str, Any]) -> str:
    name = row["metadata"] if "id" in row else row["_metadata"]
    return job_name(name) or str(row.get("id") or row["reservation_id"])


def _story(event: Mapping[str, Any]) -> str:
    """Why, or until when; a deadline of the same day without its date."""
    data = event["data"]
    if event["kind"] == "queued":
        cap = data.get("duration_cap")  # an event of a fleet may come from anybody
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

    def __init__(self, columns: Sequence[Column], asked: Asked) -> None:
        self._columns = columns
        self._as_json = asked.as_json
        if not self._as_json:
            click.secho(self._line([fit(column.head, column.width) for column in columns]), bold=True)

    def print(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if self._as_json:
                click.echo(json.dumps({name: value for name, value in row.items() if name != "_metadata"}))
            else:
                click.echo(self._line([fit(str(_or_dash(each.value(row))), each.width) for each in self._columns]))

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(column.width) for cell, column in zip(cells, self._columns, strict=True))
        return "  ".join(padded).rstrip()


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
