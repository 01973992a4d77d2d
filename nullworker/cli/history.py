"""`nullworker history, events`: the event log, for people and for scripts, also while its worker is not running.

Rows are printed as a table that fits the terminal, or with --json as one JSON object per line.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from nullworker.cli.options import with_control
from nullworker.cli.read_logs import Query, ReadLog, events_to_come, opened
from nullworker.cli.words import clock_time, duration, fit, job_name, padded, width
from nullworker.clock import SystemClock, from_shown, iso
from nullworker.control_client import ControlClient
from nullworker.fsm.table import EVENT_KINDS, STATES
from nullworker.settings import read_seconds

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
    with opened(control, query.log) as logs:
        merged = heapq.merge(*(log.reservations(query) for log in logs), key=_queued_at, reverse=True)
        rows = list(itertools.islice(merged, query.limit))
        printer = _Printer(_columns_of_history(rows, query, logs), query)
        printer.print(rows[::-1] if query.follow else rows)
        for log, event in events_to_come(logs) if query.follow else ():
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
    with opened(control, query.log) as logs:
        merged = heapq.merge(*(log.newest_events(query) for log in logs), key=_at, reverse=True)
        rows = list(itertools.islice(merged, query.limit))[::-1]
        printer = _Printer(_columns_of_events(rows, query, logs), query)
        printer.print(rows)
        for _, event in events_to_come(logs) if query.follow else ():
            if query.state in (None, event["kind"]) and query.matches(event["_metadata"]):
                printer.print([event])


def _queued_at(row: Mapping[str, Any]) -> str:
    return str(row["queued_at"])


def _at(row: Mapping[str, Any]) -> str:
    return str(row["at"])


# -- the terminal ------------------------------------------------------------------------------------------------------


def _columns_of_history(rows: Sequence[Mapping[str, Any]], query: Query, logs: Sequence[ReadLog]) -> list[Column]:
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


def _columns_of_events(rows: Sequence[Mapping[str, Any]], query: Query, logs: Sequence[ReadLog]) -> list[Column]:
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


def _log_column(logs: Sequence[ReadLog]) -> list[Column]:
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
        filled = (padded(cell, column.width) for cell, column in zip(cells, self._columns, strict=True))
        return "  ".join(filled).rstrip()


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
