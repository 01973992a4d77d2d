"""Log lines on stderr: a machine word and fields, for a person or as JSON.

Over the standard library's logging, so that the lines of the libraries come out in the same form. structlog would be
the library for it, but it brings `rich` where that is installed, as it is on every Vast worker: 0.15 s of a start.

The one rule: a log line that cannot be written must not stop the work. stderr may be a pipe whose reader has died, or
a file on the very disk that is full.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any, TextIO

from nullworker.clock import iso

#: A value that needs no quotes.
_PLAIN = re.compile(r"[^\s\"'=]+")


class Log:
    """Writes lines: an event's word, and what it speaks of."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, **fields: Any) -> None:
        """Something happened that is as it should be."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something is not as it should be, and the worker copes with it."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something has failed that somebody should look at."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """A bug: the line has the traceback of the error that is being handled."""
        self._write(logging.ERROR, event, fields, exc_info=True)

    def _write(self, level: int, event: str, fields: dict[str, Any], *, exc_info: Any = None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)


def get_log(name: str) -> Log:
    """The log of a module."""
    return Log(name)


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"timestamp": iso(record.created), "level": record.levelname.lower(), **_content(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Console(logging.Formatter):
    """A line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        content = _content(record)
        event = content.pop("event")
        words = " ".join(f"{name}={_word(value)}" for name, value in content.items())
        line = f"{iso(record.created)} {record.levelname.lower():<8} {event:<24} {words}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # no subscript before Python 3.11
    """A stream that may fail."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        """Nothing can be said about it, there being nowhere to say it."""


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Set up all log lines of this process. `form` is json or console, `level` the least that is shown."""
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Console())
    least = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    logging.getLogger("nullworker").setLevel(least)


def _content(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    if fields is not None:
        return {"event": record.msg, **fields}
    return {"event": "library_line", "library": record.name, "message": record.getMessage()}


def _word(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
