"""Locks for files that belong to one process; for an event log, also a record of its newest event.

An flock on a file beside the log, and on the log itself, ends with the process. The file beside it says who holds the
lock, and has the newest committed event: SQLite ignores the unreadable rest of a -wal, so without that record a removed
or damaged -wal would look like a log that was never written to.

The record is not synced, which would double the cost of a commit. It survives a killed process, and may be half a
minute old after a power cut, so it is never ahead of a log whose commits are synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from nullworker.clock import boot_id, wall_iso
from nullworker.errors import CannotStart
from nullworker.eventlog import schema

#: Bytes of the line about the holder, so that the next one can be written by itself.
_HOLDER_BYTES: Final = 64
#: What the files of nullworker are, by their application id.
_KINDS: Final = {
    schema.APPLICATION_ID: "the event log of a worker",
    schema.FLEET_APPLICATION_ID: "the database of a collector",
    schema.LEDGER_APPLICATION_ID: "the ledger of a dispatcher",
}
_NOTE: Final = re.compile(rb"log ([0-9a-f]+) event (\d+) sync (\w+) boot (\S*) *\n")


class Note(NamedTuple):
    """How far a log had come."""

    log_id: str
    seq: int  # of its newest event
    sync: str  # full or normal: whether a commit waited for the disk
    boot_id: str


def lock_beside(path: Path, owner: str, advice: str) -> int:
    """Take the lock of a file of one process: an flock on a file beside it, which says who holds it.

    Args:
        owner: what may hold it, such as "a dispatcher".
        advice: for the second process, what to do.

    Returns:
        The descriptor; the lock ends with it, and so with the process.

    Raises:
        CannotStart: another process holds it.
        OSError: the file beside it cannot be made, or is a link.
    """
    # through a link, this process would write into a file that someone else has chosen
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock) or "another process"
        os.close(lock)
        raise CannotStart(f"{path} belongs to {owner} that is running: {holder}; {advice}") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()}, since {wall_iso()}\n".encode(), 0)
    return lock


def refuse_other_kind(path: Path, kind: int, advice: str) -> None:
    """Refuse to open a file that another part of nullworker has made. `kind`: the application id that it should have.

    Call it before SQLite opens the file: to close it again would drop SQLite's own locks on it.

    Raises:
        CannotStart: it is of another kind; `advice` is what to do.
        OSError: it cannot be read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        header = file.read(72)
    found = int.from_bytes(header[68:72], "big")  # sqlite.org/fileformat.html, "Application ID"
    if header.startswith(b"SQLite format 3\0") and found != kind and found in _KINDS:
        raise CannotStart(f"{path} is {_KINDS[found]}; {advice}")


def _holder(lock: int) -> str:
    """Who says in a lock file that it holds it: the first line; a worker's note follows."""
    return os.pread(lock, 200, 0).partition(b"\n")[0].decode(errors="replace").strip()


class Lock:
    """The lock of one log, from the start of its worker to its end.

    Attributes:
        noted: what the last holder had noted, if it can be read.

    Raises:
        CannotStart: another worker holds it.
        OSError: the file beside the log cannot be made, or is a link.
    """

    def __init__(self, path: Path, *, sync: str) -> None:
        self._path = path
        self._sync = sync
        self._boot_id = boot_id()
        self._log: int | None = None
        # through a link, this process would write into a file that someone else has chosen
        self._file = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._take(self._file)
            text = os.pread(self._file, 4096, 0)
            self.noted = _read(text[_HOLDER_BYTES:])
            holder = f"pid {os.getpid()}, since {wall_iso()}"
            os.pwrite(self._file, f"{holder:<{_HOLDER_BYTES - 1}}\n".encode(), 0)
        except BaseException:
            os.close(self._file)
            raise

    def take_log(self) -> None:
        """Lock the log itself too, which may have another name: a hard link, with a lock file of its own.

        Call it before SQLite opens the log: to close the file again would drop SQLite's own locks on it.

        Raises:
            CannotStart: another worker holds it.
            OSError: it cannot be opened.
        """
        if self._log is not None:
            os.close(self._log)
        self._log = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._take(self._log)

    def note(self, log_id: str, seq: int) -> None:
        """Note the newest event. One that cannot be noted is passed over: an older note does no harm."""
        line = f"log {log_id} event {seq:020} sync {self._sync} boot {self._boot_id}\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.encode(), _HOLDER_BYTES)

    def close(self) -> None:
        """Give it back."""
        for file in (self._log, self._file):
            if file is not None:
                os.close(file)

    def _take(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (_holder(self._file) if file is self._file else "") or "another process"
            raise CannotStart(
                f"the event log {self._path} belongs to a worker that is running: {holder}; "
                "stop that one, or set NULL_EVENT_LOG",
                tell=False,
            ) from None


def _read(line: bytes) -> Note | None:
    match = _NOTE.match(line)
    return None if match is None else Note(match[1].decode(), int(match[2]), match[3].decode(), match[4].decode())
