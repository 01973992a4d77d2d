"""Queues that need no library: a SQLite table, and whatever a command can count."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from nullworker.clock import stopwatch
from nullworker.dispatch.decision import Counts
from nullworker.dispatch.queues.address import Address
from nullworker.dispatch.queues.reading import READ_SECONDS, parse_counts
from nullworker.errors import BadSettings

#: Bytes of a command's output that are kept: one that prints without an end must not fill the memory.
PRINTED_BYTES: Final = 4096


class SqliteQueue:
    """The query gives one row: waiting, and in flight if it has a second column; one statement sees one moment."""

    example = "sqlite:///jobs.db?query=SELECT count(*) FROM jobs WHERE state = 'new'"

    def __init__(self, address: Address) -> None:
        _, self._names = address.take("query")
        path = unquote(address.parts.path.removeprefix("/"))
        if not path or address.parts.netloc:
            raise BadSettings(f"--queue (NULL_QUEUE) needs a file, as in {address.example}")
        self._path = Path(path)
        if not self._path.is_absolute() and not self._path.exists() and Path("/", path).exists():
            self._path = Path("/", path)  # sqlite:///tmp/jobs.db, as in a file URL
        self.shown = f"sqlite:///{path}"
        self.secrets: tuple[str, ...] = ()

    async def read(self) -> Counts:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Counts:
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        until = stopwatch() + READ_SECONDS
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=READ_SECONDS / 2)) as conn:
            conn.set_progress_handler(lambda: int(stopwatch() > until), 10_000)  # a thread cannot be cancelled
            row = conn.execute(self._names["query"]).fetchone()
        if row is None:
            raise ValueError("the query gives no row")
        return parse_counts(row)

    async def close(self) -> None:
        """Nothing is open between two reads."""


class CommandQueue:
    """A shell command that prints one or two numbers: waiting, and what is in flight."""

    def __init__(self, command: str) -> None:
        self._command = command
        self.shown = "--command"
        self.secrets: tuple[str, ...] = ()

    async def read(self) -> Counts:
        """Run it; it and what it has started are killed when the read is cancelled."""
        process = await asyncio.create_subprocess_shell(
            self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = await _output(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                await _output(process)
        if process.returncode != 0:
            said = err.decode(errors="replace").strip().splitlines()
            raise ValueError(f"it ended with exit code {process.returncode}{': ' + said[-1] if said else ''}")
        if len(out) > PRINTED_BYTES:
            raise ValueError(f"it prints more than {PRINTED_BYTES} bytes, where one or two numbers are wanted")
        return parse_counts(out.decode(errors="replace").split())

    async def close(self) -> None:
        """Nothing is open between two reads."""


async def _output(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """What it prints until its end on stdout and stderr: the last PRINTED_BYTES of each, and a byte if more."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = await asyncio.gather(_tail(process.stdout), _tail(process.stderr))
    await process.wait()
    return out, err


async def _tail(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while part := await stream.read(2**16):
        kept = (kept + part)[-PRINTED_BYTES - 1 :]
    return kept
