"""Log lines on stderr: a machine word and fields, for a person or as JSON.

Levels and loggers are the standard library's, so that a library's lines come out in the same form; but a line of our
own is no LogRecord, which is made of twenty things that nobody reads and took a sixth of a reservation's CPU.
structlog would be the library for it, but it brings `rich` where that is installed, as it is on every Vast worker:
0.15 s of a start.

The one rule: a log line that cannot be written must not stop the work. stderr may be a pipe whose reader has died, or
a file on the very disk that is full.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from nullworker.clock import iso, wall

#: A value that needs no quotes.
_PLAIN = re.compile(r"[^\s\"'=]+")

#: Makes a line of: epoch seconds, level, event, fields, a traceback or nothing.
Form = Callable[[float, str, str, dict[str, Any], str], str]


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
        self._write(logging.ERROR, event, fields, _trace(sys.exc_info()[1]))

    def _write(self, level: int, event: str, fields: dict[str, Any], trace: str = "") -> None:
        if self._logger.isEnabledFor(level):
            _out.write(wall(), _LEVELS[level], event, fields, trace)


def get_log(name: str) -> Log:
    """The log of a module."""
    return Log(name)


def as_json(at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> str:
    """One JSON object."""
    line = {"timestamp": iso(at), "level": level, "event": event, **fields}
    if trace:
        line["exception"] = trace
    return json.dumps(line, default=str)


def as_text(at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> str:
    """A line for a person; a traceback below it."""
    words = " ".join([f"{name}={_word(value)}" for name, value in fields.items()])
    line = f"{iso(at)} {level:<8} {event:<24} {words}".rstrip()
    return f"{line}\n{trace}" if trace else line


class _Out:
    """Where lines go: a stream, or whatever stderr is at the time."""

    def __init__(self, form: Form, stream: TextIO | None = None) -> None:
        self._form = form
        self._stream = stream

    def write(self, at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> None:
        stream = self._stream or sys.stderr
        if stream is None:  # the process was started without one
            return
        try:
            line = self._form(at, level, event, fields, trace)
        except Exception as error:  # a field that cannot be told: the rest can
            line = self._form(at, level, event, {"untold": ",".join(fields), "why": type(error).__name__}, trace)
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # nothing can be said about it, there being nowhere to say it


class _Library(logging.Handler):
    """Lines of the libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        """One of them, in the form of ours."""
        try:
            message = record.getMessage()
        except Exception:  # its words do not fit its arguments: the library's bug, and not worth a stop
            message = repr(record.msg)
        fields = {"library": record.name, "message": message}
        trace = _trace(record.exc_info[1]) if record.exc_info else ""
        _out.write(record.created, record.levelname.lower(), "library_line", fields, trace)


_LEVELS = {logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
_out = _Out(as_text)


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Set up all log lines of this process. `form` is json or console, `level` the least that is shown."""
    global _out
    _out = _Out(as_json if form == "json" else as_text, stream)
    least = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[_Library()], level=max(least, logging.WARNING), force=True)
    logging.getLogger("nullworker").setLevel(least)


def close() -> None:
    """No line will come any more. What stderr has refused is dropped, else Python's last flush makes the exit 120."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            sys.stderr = None


def _trace(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


def _word(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
