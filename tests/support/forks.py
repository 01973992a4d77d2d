"""Starts Python programs of this repository in forks of a process that has imported what they need.

A new interpreter spends 0.25 s of CPU on importing aiohttp and the rest, such a fork a tenth of that, and the suite
starts a thousand. Otherwise it is like any program: its own pid, folder, environment, arguments, output, signals, end.
Where the interpreter's own start matters (its imports, its memory, its command in /proc), start it by `harness.anew`.
With FORKS=no in the environment of the tests every program is started anew.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
#: Variables that the interpreter or the linker reads when it starts.
AT_START = re.compile("PYTHON(?!PATH$|WARNINGS$)|LD_")


class ForkedProcess:
    """Has what the tests use of asyncio.subprocess.Process."""

    def __init__(
        self, pid: int, told: asyncio.StreamReader, out: asyncio.StreamReader | None, err: asyncio.StreamReader | None
    ) -> None:
        self.pid, self.stdout, self.stderr = pid, out, err
        self.returncode: int | None = None
        self._end = asyncio.ensure_future(self._until_ended(told))

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.shield(self._end)

    async def communicate(self) -> tuple[bytes, bytes]:
        """All that it says until it ends, on stdout and on stderr."""
        assert self.stdout is not None
        assert self.stderr is not None
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    async def _until_ended(self, told: asyncio.StreamReader) -> int:
        self.returncode = int(await told.read())
        return self.returncode


async def start(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    out: IO[bytes] | None = None,
    merged: bool = False,
    new: bool = False,
) -> asyncio.subprocess.Process | ForkedProcess:
    """Start a program. Its stdout goes into the file `out`, or is a pipe; its stderr is one, if `merged` the same."""
    starts_as_we_do = env.get("PYTHONPATH", str(ROOT)) == str(ROOT) and not any(map(AT_START.match, env))
    if new or command[0] != sys.executable or not starts_as_we_do or os.environ.get("FORKS") == "no":
        pipe = asyncio.subprocess.PIPE
        errors = asyncio.subprocess.STDOUT if merged else pipe
        return await asyncio.create_subprocess_exec(*command, cwd=cwd, env=env, stdout=out or pipe, stderr=errors)
    with contextlib.ExitStack() as ends:
        told, told_end = await _pipe(ends)
        reader, out_end = await _pipe(ends) if out is None else (None, out.fileno())
        err, err_end = (reader, out_end) if merged else await _pipe(ends)
        ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
        request = {"command": command, "cwd": str(cwd), "env": dict(env), "ignored": ignored}
        socket.send_fds(_requests(), [json.dumps(request).encode()], [out_end, err_end, told_end])
    return ForkedProcess(int(await told.readline()), told, reader, err)


async def _pipe(ends: contextlib.ExitStack) -> tuple[asyncio.StreamReader, int]:
    """A pipe to read from, and the end for who writes: to be closed here once it is handed over."""
    here, there = os.pipe()
    ends.callback(os.close, there)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(here, "rb", 0)
    )
    return reader, there


@functools.cache
def _requests() -> socket.socket:
    """Where requests go to. Who reads them ends when this process has closed its end of the socket."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {
        "PYTHONPATH": str(ROOT),
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
    }
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    with there:
        server = subprocess.Popen(command, stdin=there.fileno(), stdout=subprocess.DEVNULL, env=env)
    atexit.register(server.wait)
    atexit.register(here.close)  # before it: the last comes first
    return here
