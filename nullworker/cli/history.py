"""`nullworker history, events`: the event log, for people and for scripts, also while its worker is not running.

The commands read the file, without writing to it: the file named by --log, that of the worker that answers on the
control port, or the one that a worker started here would use. --follow polls the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from nullworker.cli.options import with_control
from nullworker.clock import SystemClock, from_shown
from nullworker.control_client import ControlClient
from nullworker.errors import BadSettings, CannotStart, WorkerUnreachable
from nullworker.eventlog import queries
from nullworker.eventlog.opening import open_for_reading
from nullworker.eventlog.sqlite import transaction
from nullworker.fsm.table import EVENT_KINDS, STATES

#: Seconds between two polls of a log that is followed.
LOOK_SECONDS: Final = 0.2
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Column, its width on the terminal, and its value in a row.
Columns = tuple[tuple[str, int, Callable[[Mapping[str, Any]], Any]], ...]

_RESERVATION: Final[Columns] = (
    ("queued at", 24, lambda row: row["queued_at"]),
    ("id", 16, lambda row: row["id"]),
    ("kind", 7, lambda row: row["kind"]),
    ("state", 9, lambda row: row["state"]),
    ("reason", 18, lambda row: row["reason"]),
    ("queued s", 8, lambda row: row["queued_seconds"]),
    ("held s", 8, lambda row: row["held_seconds"]),
    ("result", 0, lambda row: None if row["result"] is None else json.dumps(row["result"])),
)
_EVENT: Final[Columns] = (
    ("seq", 7, lambda row: row["seq"]),
    ("at", 24, lambda row: row["at"]),
    ("reservation", 16, lambda row: row["reservation_id"]),
    ("kind", 9, lambda row: row["kind"]),
    ("reason", 18, lambda row: row["reason"]),
    ("data", 0, lambda row: json.dumps({name: each for name, each in row["data"].items() if each is not None})),
)


def _since(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return SystemClock().now() - float(age[1]) * _UNITS[age[2]]
    try:
        return from_shown(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} must be an age as 90s, 15m, 6h or 2d, or an ISO 8601 time") from None


class Asked(NamedTuple):
    """The options of both commands. `since`: epoch seconds."""

    log: str | None
    since: float | None
    state: str | None
    limit: int
    follow: bool
    as_json: bool


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
            click.option("--state", type=click.Choice(list(states)), help="Only these."),
            click.option("--since", metavar="TIME", callback=_since, help="An age as 15m, 6h or 2d, or an ISO time."),
            click.option(
                "--log",
                metavar="PATH",
                envvar="NULL_EVENT_LOG",
                show_envvar=True,
                help="The log file.  [default: the running worker's]",
            ),
        ):
            decorated = option(decorated)
        return with_control(decorated)

    return decorate


@click.command()
@_options(STATES)
def history(control: ControlClient, asked: Asked) -> None:
    """List reservations, newest first. With --follow: oldest first, and each again with every new event."""
    with _opened(control, asked.log) as conn:
        last = _last(conn)
        with transaction(conn, "DEFERRED"):  # one snapshot, whatever the worker appends meanwhile
            rows = queries.reservations(conn, state=asked.state, since=asked.since, limit=asked.limit)
        printer = _Printer(_RESERVATION, as_json=asked.as_json)
        printer.print(rows[::-1] if asked.follow else rows)
        for event in _events_to_come(conn, last) if asked.follow else ():
            row = queries.reservation(conn, event["reservation_id"])
            if row is not None and asked.state in (None, row["state"]):
                printer.print([row])


@click.command()
@_options(EVENT_KINDS)
def events(control: ControlClient, asked: Asked) -> None:
    """List the newest --limit events, in order. With --follow: new ones as they come."""
    with _opened(control, asked.log) as conn:
        last = _last(conn)
        printer = _Printer(_EVENT, as_json=asked.as_json)
        printer.print(_newest_events(conn, last, since=asked.since, kind=asked.state, limit=asked.limit))
        for event in _events_to_come(conn, last) if asked.follow else ():
            if asked.state in (None, event["kind"]):
                printer.print([event])


@contextlib.contextmanager
def _opened(control: ControlClient, log: str | None) -> Iterator[sqlite3.Connection]:
    opened = open_for_reading(Path(log) if log else _find(control))
    try:
        yield opened.conn
    except sqlite3.Error as error:
        raise CannotStart(f"the event log {opened.path} cannot be read: {error}") from error
    finally:
        opened.close()


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


def _last(conn: sqlite3.Connection) -> int:
    return int(conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])


def _newest_events(
    conn: sqlite3.Connection, last: int, *, since: float | None, kind: str | None, limit: int
) -> list[dict[str, Any]]:
    rows = conn.execute(
        "SELECT seq, at, reservation_id, kind, reason, data FROM events"
        " WHERE seq <= ? AND at >= coalesce(?, at) AND kind = coalesce(?, kind) ORDER BY seq DESC LIMIT ?",
        (last, since, kind, limit),
    ).fetchall()
    return [queries.event_json(*row) for row in reversed(rows)]


def _events_to_come(conn: sqlite3.Connection, after: int) -> Iterator[dict[str, Any]]:
    while True:
        found = queries.events(conn, after=after)
        for event in found:
            yield event
            after = event["seq"]
        if not found:
            time.sleep(LOOK_SECONDS)


class _Printer:
    """Prints rows as JSON lines, or as columns under a head."""

    def __init__(self, columns: Columns, *, as_json: bool) -> None:
        self._columns = columns
        self._as_json = as_json
        if not as_json:
            head = (name.ljust(width) for name, width, _ in columns)
            click.secho("  ".join(head).rstrip(), bold=True)

    def print(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            click.echo(json.dumps(row) if self._as_json else self._line(row))

    def _line(self, row: Mapping[str, Any]) -> str:
        cells = ((value(row), width) for _, width, value in self._columns)
        return "  ".join(("-" if cell is None else str(cell)).ljust(width) for cell, width in cells).rstrip()
