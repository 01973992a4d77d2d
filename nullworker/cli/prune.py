"""`nullworker prune`: removes old reservations from the log of a worker that is not running, in one transaction.

A running worker holds the lock, and prunes by itself when NULL_LOG_KEEP is set. --dry-run works on its log as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import click

from nullworker.clock import SystemClock, iso
from nullworker.errors import CannotStart
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_for_reading, open_log
from nullworker.eventlog.retention import ended_before, expendable
from nullworker.settings import read_seconds, read_settings


def _age(_: click.Context, __: click.Parameter, text: str) -> float:
    try:
        return read_seconds(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} must be seconds, as 90, 15m, 6h or 30d") from None


@click.command()
@click.option(
    "--keep",
    required=True,
    metavar="AGE",
    callback=_age,
    help="Remove what ended longer ago than this, such as 30d, 12h or 15m.",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be removed; allowed while the worker runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.option(
    "--log",
    "path",
    metavar="PATH",
    envvar="NULL_EVENT_LOG",
    show_envvar=True,
    help="The log file.  [default: the log of a worker started here]",
)
def prune(keep: float, *, dry_run: bool, as_json: bool, path: str | None) -> None:
    """Remove the reservations that ended more than AGE ago, with all their events, in one transaction.

    Live reservations stay, and so do those that the autoscaler has not acknowledged, that were not yet sent to the sink
    (NULL_SINK), or whose callback is pending. The worker must not be running; with NULL_LOG_KEEP, a running worker
    prunes its log daily.

    \b
    Example:
      nullworker prune --keep 30d --dry-run
    """
    file = Path(path) if path else read_settings({**os.environ, "UNSECURED": "true"}).event_log
    if not file.exists():
        raise CannotStart(f"there is no event log {file.absolute()}: give --log PATH or NULL_EVENT_LOG")
    before = SystemClock().now() - keep
    with contextlib.closing(open_for_reading(file) if dry_run else _open(file)) as log:
        size = log.size()
        try:
            prunable = [reservation_id for ids in expendable(log.conn, before) for reservation_id in ids]
            kept = ended_before(log.conn, before) - len(prunable)
            if not dry_run:
                _remove(log, prunable, quiet=as_json)
        except sqlite3.Error as error:
            raise CannotStart(f"the event log {log.path} cannot be pruned: {error}") from error
    summary = {  # after the close, which folds the write-ahead log into the file
        "log": str(log.path),
        "before": iso(before),
        "reservations": len(prunable),
        "kept": kept,
        "dry_run": dry_run,
        "bytes_before": size,
        "bytes": log.size(),
    }
    click.echo(json.dumps(summary) if as_json else _sentence(summary))


def _open(file: Path) -> EventLog:
    open_for_reading(file).close()  # first: no lock file is created beside a file that is not a log
    try:
        return open_log(file, fix=False)
    except CannotStart as error:
        if error.tell:
            raise
        raise CannotStart(  # a worker has it
            f"{str(error).partition(';')[0]}; with NULL_LOG_KEEP it prunes its log by itself, daily; to prune now, "
            "stop it first; --dry-run says what would be removed, also while it runs"
        ) from None


def _remove(log: EventLog, prunable: list[str], *, quiet: bool) -> None:
    if quiet or not sys.stderr.isatty():
        log.prune(prunable)
    else:
        with click.progressbar(prunable, label="pruning", file=sys.stderr) as shown:
            log.prune(shown)
    log.give_back(0)


def _sentence(summary: dict[str, Any]) -> str:
    would = "would be removed" if summary["dry_run"] else "were removed"
    sizes = f"{summary['bytes_before'] / 1e6:.1f} MB" + (
        "" if summary["dry_run"] else f", now {summary['bytes'] / 1e6:.1f} MB"
    )
    kept = (
        f"; {summary['kept']} more are kept: not acknowledged, not sent to the sink, a callback is pending, or the "
        "last of the log"
        if summary["kept"]
        else ""
    )
    ended = f"{summary['reservations']} reservations that ended before {summary['before']}"
    return f"{ended} {would} from {summary['log']} ({sizes}){kept}"
