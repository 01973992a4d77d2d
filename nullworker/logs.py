"""Log lines on stderr: a machine-readable event name and fields, as text for people or as JSON.

Levels and loggers are the standard library's, so that lines of libraries come out in the same form; a line of our own
is no LogRecord, whose twenty unused fields took a sixth of a reservation's CPU time. structlog imports `rich` where it
is installed, as on every Vast worker, and would add 0.15 s to a start.

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

#: What a pipe holds for a reader that is late: a long queue that is sent away at once is a line for each, and more than
#: the 64 KiB that a pipe has by itself. It is the most that Linux allows to everybody.
PIPE_BYTES: Final = 1024 * 1024
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

    def __init__(self, form: Form, stream: TextIO | None = None, common: dict[str, Any] | None = None) -> None:
        self.form = form
        self._stream = stream
        self._common = common or {}

    def write(self, at: float, level: str, event: str, fields: dict[str, Any], trace: str) -> None:
        stream = self._stream or sys.stderr
        if stream is None:  # the process was started without one
            return
        fields = {**fields, **self._common}
        try:
            line = self.form(at, level, event, fields, trace)
        except Exception as error:  # a field that cannot be told: the rest can
            line = self.form(at, level, event, {"untold": ",".join(fields), "why": type(error).__name__}, trace)
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # nothing can be said about it, there being nowhere to say it


class _Stderr(io.TextIOBase):
    """A stderr that is never waited for: while it takes nothing more, lines are dropped, and then it is said how many.

    It is sys.stderr, so that what others write there goes the same way: a traceback at the end, a warning, a command's
    last sentence, and Python's flush at exit, which waits for a stalled reader, and fails the exit where stderr fails.

    Pipes and terminals are opened anew, without blocking: O_NONBLOCK on descriptor 2 would be there for all who have
    the same open file, as the shell or the supervisor. What cannot be opened anew, as a socket, is written when poll
    says so: it takes PIPE_BUF bytes then. Poll alone would not do: a pipe that others write to may be full again by
    then, and a terminal promises one byte. Nor would a thread that may block: each line would cost more, and the last
    ones would be lost with a process that is killed.
    """

    def __init__(self) -> None:
        self._fd = _own(2)
        with contextlib.suppress(OSError, AttributeError):  # it is no pipe, or this is not Linux
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._room = select.poll()
        self._room.register(self._fd, select.POLLOUT)
        self._lock = threading.RLock()
        self._rest = b""  # of what was begun: until it is written, lines are dropped
        self._dropped = 0

    def write(self, text: str) -> int:
        """All of it now or a part of it later, or nothing."""
        with self._lock:
            if self._rest:
                self.flush()
            if self._rest:
                self._dropped += text.count("\n")
            else:
                self._rest = self._push(text.encode(errors="backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Try again what waits, and tell what was dropped."""
        if not self._rest:
            return
        with self._lock:
            self._rest = self._push(self._rest)
            if self._dropped and not self._rest:
                notice = _out.form(wall(), "warning", "log_lines_dropped", {"lines": self._dropped}, "")
                self._rest, self._dropped = self._push(f"{notice}\n".encode()), 0

    def _push(self, data: bytes) -> bytes:
        """Write what can be written at once. Returns the rest."""
        try:
            while data and (self._fd != 2 or self._room.poll(0)):
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        except OSError:
            pass  # it is full after all, or nobody reads any more, or its disk is full: that may change
        return data


def _own(fd: int) -> int:
    """The same open anew, so that it does not block; but a file never does, and has its place in common with others."""
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # a socket, another user's pipe, or a system without /proc
        return fd


class _Library(logging.Handler):
    """Lines of the libraries, and of our own parts that are libraries to others: nullworker.consumer."""

    def emit(self, record: logging.LogRecord) -> None:
        """One of them, in the form of ours."""
        try:
            message = record.getMessage()
        except Exception:  # its words do not fit its arguments: the library's bug, and not worth a stop
            message = repr(record.msg)
        top, _, rest = record.name.partition(".")
        ours = top == __name__.partition(".")[0]
        event = rest.partition(".")[0] if ours else "library_line"
        fields = {"message": message} if ours else {"library": record.name, "message": message}
        trace = _trace(record.exc_info[1]) if record.exc_info else ""
        _out.write(record.created, record.levelname.lower(), event, fields, trace)


_LEVELS = {logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
_out = _Out(as_text)


def configure(form: str, level: str, stream: TextIO | None = None, *, instance: int | None = None) -> None:
    """Set up all log lines of this process.

    `form` is json or console, `level` the least that is shown, `instance` Vast's id of this machine: it ends each line.
    """
    global _out
    if sys.stderr is not None and sys.stderr is sys.__stderr__:  # the process's own
        sys.stderr = cast("TextIO", _Stderr())
    common = {} if instance is None else {"instance": instance}
    _out = _Out(as_json if form == "json" else as_text, stream, common)
    least = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[_Library()], level=max(least, logging.WARNING), force=True)
    logging.getLogger("nullworker").setLevel(least)


def _trace(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = " ".join(f"{name}={_word(each)}" for name, each in value.items())
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
