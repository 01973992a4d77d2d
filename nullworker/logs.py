"""Log lines on stderr: for a person, or as JSON. Each has a machine word, `event`, and the seq and id it speaks of.

The one rule: a log line that cannot be written must not stop the work. stderr may be a pipe whose reader has died, or
a file on the very disk that is full.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from nullworker.fsm.table import ENDED
from nullworker.service import Commit

log = structlog.get_logger("nullworker")


class _Writer:
    """What structlog writes a finished line to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = exception = msg


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Set up all log lines of this process. `form` is json or console, `level` the least that is shown."""
    stream = stream or sys.stderr
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), pad_event_to=28, exception_formatter=structlog.dev.plain_traceback
        )
    )
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        processors.append(structlog.processors.dict_tracebacks)
    least = logging.getLevelName(level.upper())
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: _Writer(stream),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Bridge()], level=max(least, logging.WARNING), force=True)


class _Bridge(logging.Handler):
    """Lines of the libraries, in our form. Their access logs are off: a query string may hold an api key."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(record.levelno, "library_line", library=record.name, message=record.getMessage())


def narrate(commit: Commit) -> None:
    """An observer: one line for each event, with the words of the log."""
    event, reservation = commit.event, commit.reservation
    fields: dict[str, Any] = {"reservation_id": event.reservation_id, "seq": commit.seq}
    if event.reason is not None:
        fields["reason"] = event.reason
    if event.kind == "queued":
        fields["request_idx"] = reservation.terms.request_idx
        fields["claim"] = reservation.terms.kind
    elif event.kind == "held":
        fields["queued_seconds"] = round(event.at - reservation.queued_at, 3)
    elif event.kind in ENDED and reservation.held_at is not None:
        fields["held_seconds"] = round(event.at - reservation.held_at, 3)
    log.info(f"reservation_{event.kind}", **fields)
