"""The state file of `nullworker reserve --state`: one line of JSON, locked, readable only by its owner.

It is overwritten in place with one call, because a new file under the same name would not be locked. After SIGKILL it
has the old line or the new one; the rest of a longer old line is ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import click

from nullworker.client.held_session import SavedHold


class StateFile:
    """The file, open and locked.

    Attributes:
        saved: its content; None while no worker has been asked.

    Raises:
        BlockingIOError: another process has locked it.
        click.UsageError: it was made with other arguments, cannot be opened, or is not a state file.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self._path, self._arguments = path, arguments
        self.saved: SavedHold | None = None
        self._removed = False
        self._fd = self._open()
        try:
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def save(self, saved: SavedHold) -> None:
        """Write it to the file."""
        self.saved = saved
        line = json.dumps({"arguments": self._arguments, "saved": saved}).encode() + b"\n"
        os.pwrite(self._fd, line, 0)
        os.ftruncate(self._fd, len(line))
        os.fsync(self._fd)

    def remove(self) -> None:
        """Remove the file: the end of the session is known."""
        if not self._removed:
            self._removed = True
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.saved is None:
            self.remove()  # there is nothing to continue
        os.close(self._fd)

    def _open(self) -> int:
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise click.UsageError(f"--state: {self._path} cannot be opened: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self._path).st_ino == os.fstat(fd).st_ino:
                        return fd  # else its last user has removed it meanwhile
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _read(self) -> None:
        text = os.pread(self._fd, 2**20, 0).decode(errors="replace").partition("\n")[0]
        if not text:
            return
        try:
            content = json.loads(text)
            arguments, self.saved = content["arguments"], content["saved"]
        except (ValueError, KeyError, TypeError):
            raise click.UsageError(f"--state: {self._path} is not a state file of nullworker reserve") from None
        if arguments != self._arguments:
            other = [name for name in self._arguments if arguments.get(name) != self._arguments[name]]
            was = ", ".join(f"{name} was {json.dumps(arguments.get(name))}" for name in other)
            raise click.UsageError(f"--state: {self._path} was made with other arguments: {was}")
