"""Log lines on stderr: a machine-readable event name and fields, as text for people or as JSON.

Libraries use the standard library's loggers, whose one handler writes their lines in the same form. Our own lines are
written without its LogRecord, which takes as long as the line. structlog imports `rich` where it is installed, as on
every Vast worker, and would add 0.15 s to a start.

A line that cannot be written never blocks or fails the work: stderr may be a pipe whose reader has died or stalled, or
a file on a full disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import select
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Final, TextIO, cast

from nullworker.clock import iso, wall

#: Buffer size of the stderr pipe: cancelling a long queue writes more lines at once than the default of 64 KiB holds.
#: 1 MiB is the most that Linux allows without privileges.
PIPE_BYTES: Final = 1024 * 1024
#: A value that needs no quotes.
_PLAIN = re.compile(r"[^\s\"'=]+")

#: Formats a line from: epoch seconds, level, event, fields, a traceback or "".
Form = Callable[[float, str, str, dict[str, Any], str], str]


class Log:
    """A logger whose lines are an event name and fields, not a sentence."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, **fields: Any) -> None:
        """Something has happened as it should."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something is not as it should be, and the worker copes with it."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something has failed and needs attention."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """A bug: the line has the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, fields, sys.exc_info()[1])

    def _write(self, level: int, event: str, fields: dict[str, Any], error: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            _lines.write(wall(), level, event, fields, error)


def get_log(name: str) -> Log:
    """The log of a module."""
    return Log(name)


def as_json(at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> str:
    """A line as a JSON object."""
    line = {"timestamp": iso(at), "level": level, "event": event, **fields}
    if trace:
        line["exception"] = trace
    return json.dumps(line, default=str)


def as_text(at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> str:
    """A line for a person, with the traceback below it."""
    words = " ".join([f"{name}={_word(value)}" for name, value in fields.items()])
    line = f"{iso(at)} {level:<8} {event:<24} {words}".rstrip()
    return f"{line}\n{trace}" if trace else line


class Lines(logging.Handler):
    """Writes lines to `stream`, or to what sys.stderr is at the time. It never raises."""

    def __init__(self, form: Form, stream: TextIO | None = None, common: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.form = form
        self._stream = stream
        self._common = common or {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a library's line."""
        fields = {"library": record.name, "message": _message(record)}
        error = record.exc_info[1] if record.exc_info else None
        self.write(record.created, record.levelno, "library_line", fields, error)

    def write(self, at: float, level: int, event: str, fields: dict[str, Any], error: BaseException | None) -> None:
        """Write a line; `at` in epoch seconds."""
        stream = self._stream or sys.stderr
        if stream is None:  # the process was started without one
            return
        fields, trace, word = {**fields, **self._common}, _trace(error), logging.getLevelName(level).lower()
        try:
            line = self.form(at, word, event, fields, trace)
        except Exception as failure:  # a field that has no text: write the rest
            unprintable = {"untold": ",".join(fields), "why": type(failure).__name__}
            line = self.form(at, word, event, unprintable, trace)
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # there is nowhere to report it


class _Stderr(io.TextIOBase):
    """A stderr that never blocks: while it accepts nothing, lines are dropped and counted; the count is written later.

    It replaces sys.stderr, so that tracebacks, warnings and error messages of commands use it too, and Python's flush
    at exit neither waits for a stalled reader nor fails.

    Pipes and terminals are opened anew with O_NONBLOCK, because on descriptor 2 the flag would also apply to the shell
    or the supervisor, which share the open file. A socket cannot be opened anew; it is written when poll reports
    POLLOUT, up to PIPE_BUF bytes. Poll alone is not enough for pipes, which another writer may fill meanwhile. A writer
    thread would cost more for each line, and a killed process would lose its last lines.
    """

    def __init__(self) -> None:
        self._fd = _own(2)
        with contextlib.suppress(OSError, AttributeError):  # it is no pipe, or this is not Linux
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._room = select.poll()
        self._room.register(self._fd, select.POLLOUT)
        self._lock = threading.RLock()
        self._rest = b""  # of the last line; until it is written, lines are dropped
        self._dropped = 0

    def write(self, text: str) -> int:
        """Write as much as possible now and the rest later, or drop all of it."""
        with self._lock:
            if self._rest:
                self.flush()
            if self._rest:
                self._dropped += text.count("\n")
            else:
                self._rest = self._push(text.encode(errors="backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Write the rest, and then how many lines were dropped."""
        if not self._rest:
            return
        with self._lock:
            self._rest = self._push(self._rest)
            if self._dropped and not self._rest:
                notice = _lines.form(wall(), "warning", "log_lines_dropped", {"lines": self._dropped}, "")
                self._rest, self._dropped = self._push(f"{notice}\n".encode()), 0

    def _push(self, data: bytes) -> bytes:
        """Write what can be written without blocking. Returns the rest."""
        try:
            while data and (self._fd != 2 or self._room.poll(0)):
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except OSError:
            pass  # it is full, its reader has died, or its disk is full: try again later
        return data


def _own(fd: int) -> int:
    """A non-blocking descriptor of the same pipe or terminal; a file is used as it is, since it does not block."""
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # a socket, another user's pipe, or a system without /proc
        return fd


_lines = Lines(as_text)


def configure(form: str, level: str, stream: TextIO | None = None, *, instance: int | None = None) -> None:
    """Set up all log lines of this process.

    Args:
        form: json or console.
        level: the lowest level that is shown: debug, info, warning or error.
        stream: where to write; None is stderr, without ever blocking.
        instance: Vast's id of this machine, which is added to each line.
    """
    global _lines
    if sys.stderr is not None and sys.stderr is sys.__stderr__:  # the process's own
        sys.stderr = cast("TextIO", _Stderr())
    common = {} if instance is None else {"instance": instance}
    _lines = Lines(as_json if form == "json" else as_text, stream, common)
    lowest = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[_lines], level=max(lowest, logging.WARNING), force=True)
    logging.getLogger("nullworker").setLevel(lowest)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # its arguments do not fit its format: a bug of the library
        return repr(record.msg)


def _trace(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = " ".join(f"{name}={_word(item)}" for name, item in value.items())
    text = str(value).lower() if isinstance(value, bool) else str(value)  # true: as a setting is written
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
