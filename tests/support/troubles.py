"""Ways for a disk to fail, each switched on and off under a running worker.

A file size limit and another process's lock work everywhere; ENOSPC needs permission to mount a small file system; a
failing fdatasync or write needs strace.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from pathlib import Path

from harness import WorkerProcess


class Trouble:
    """One way for a disk to fail. `folder` is where the log must be for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def begin(self, worker: WorkerProcess) -> None:
        """From now on the log cannot be written."""

    async def over(self) -> None:
        """It can be again. A second call does nothing."""


class SizeLimit(Trouble):
    """RLIMIT_FSIZE: a quota. No file may grow beyond what the write-ahead log has now."""

    pid = 0

    async def begin(self, worker: WorkerProcess) -> None:
        self.pid = worker.process.pid
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size_of(f"{worker.db}-wal"), resource.RLIM_INFINITY))

    async def over(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.pid = 0


class StrangersLock(Trouble):
    """Somebody's SQLite shell with an open transaction."""

    conn: sqlite3.Connection | None = None

    async def begin(self, worker: WorkerProcess) -> None:
        self.conn = sqlite3.connect(worker.db, isolation_level=None)
        self.conn.execute("BEGIN IMMEDIATE")

    async def over(self) -> None:
        if self.conn is not None:
            self.conn.close()
            self.conn = None


class FullDisk(Trouble):
    """A file system of one megabyte, filled to the last byte by somebody else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "small")
        self.folder.mkdir()
        mount(self.folder)

    async def begin(self, worker: WorkerProcess) -> None:
        fill(self.folder / "filler")

    async def over(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)


class Injected(Trouble):
    """strace lets a system call of the running worker fail."""

    calls, error = "fdatasync,fsync", "EIO"
    process: asyncio.subprocess.Process | None = None

    async def begin(self, worker: WorkerProcess) -> None:
        inject = f"inject={self.calls}:error={self.error}"
        self.process = await asyncio.create_subprocess_exec(
            "strace", "-f", "-p", str(worker.process.pid), "-e", f"trace={self.calls}", "-e", inject,
            "-o", "/dev/null", stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stderr is not None
        attached = (await self.process.stderr.readline()).decode()
        assert "attached" in attached, attached

    async def over(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ends with what it traces
                self.process.send_signal(signal.SIGINT)
            await self.process.communicate()
            self.process = None


class FailingWrites(Injected):
    """EIO already at the write."""

    calls = "pwrite64"


class NoSpace(Injected):
    """ENOSPC, for who may not mount."""

    calls, error = "pwrite64", "ENOSPC"


def size_of(path: str | Path) -> int:
    return Path(path).stat().st_size


def fill(path: Path) -> None:
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def mount(folder: Path) -> None:
    """A file system of one megabyte.

    Raises:
        CalledProcessError, OSError: it cannot be had.
    """
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder))
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(folder))
        return True


TROUBLES: list[type[Trouble]] = [
    SizeLimit,
    StrangersLock,
    *([FullDisk] if can_mount() else []),
    *([Injected, FailingWrites, NoSpace] if shutil.which("strace") else []),
]
