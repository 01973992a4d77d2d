"""Checks of the machine itself: Python and packages, the template, ports, the event log and its disk.

No check takes a port, a lock or a file that a running worker needs.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nullworker.clock import SystemClock
from nullworker.control_client import ControlClient, Refused
from nullworker.doctor.finding import Finding, failed, ok, warning
from nullworker.errors import CannotStart, NullworkerError, WorkerUnreachable
from nullworker.eventlog.opening import open_for_reading
from nullworker.http.sockets import CERTIFICATE, PRIVATE_KEY, listen
from nullworker.settings import Settings

ROOT: Final = Path(__file__).parents[2]
#: Seconds for a worker's answer; another program on its port may accept the call and not answer.
ANSWER_SECONDS: Final = 3.0
#: Bytes that must be free where the log is: a reservation takes less than 2 kB of it, other programs take the rest.
NEEDED_BYTES, COMFORTABLE_BYTES = 100 * 10**6, 10**9
#: File systems on which SQLite's write-ahead log cannot work, since it needs memory that all its readers share
#: (sqlite.org/wal.html).
NETWORK_FILE_SYSTEMS: Final = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "ocfs2")
)


@dataclass(frozen=True)
class Host:
    """The inputs of the checks; tests replace them."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    python: tuple[int, ...] = sys.version_info[:3]
    version_of: Callable[[str], str] = importlib.metadata.version
    certificate: Path = CERTIFICATE
    private_key: Path = PRIVATE_KEY
    self_signed_mark: Path = Path("/etc/.instance-cert-selfsigned")  # created by Vast's base image
    mounts: Path = Path("/proc/mounts")
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    now: Callable[[], float] = field(default_factory=lambda: SystemClock().now)


def look_at_programs(host: Host) -> Iterator[Finding]:
    """Check Python, our requirements, and the pins of vastai, which the start script installs over them."""
    shown = ".".join(map(str, host.python))
    if host.python < (3, 10):
        fix = "run it with Python 3.10, as Vast's start script does: uv venv -p 3.10"
        yield failed("python", f"Python {shown}", why="neither nullworker nor vastai runs on it", fix=fix)
    else:
        yield ok("python", shown)
    bad: list[str] = []
    sources = {"nullworker": _own_requirements(), "vastai": _requirements_of("vastai")}
    for source, requirements in sources.items():
        for requirement in requirements:
            try:
                version = host.version_of(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                bad.append(f"{source} needs {requirement.name}{requirement.specifier}, not {version or 'none'}")
    if bad:
        yield failed(
            "packages",
            "; ".join(bad),
            why="the worker or the official client may fail at any moment; uv installs the given versions "
            "without checking the requirements of other packages",
            fix=f"uv pip install -r {ROOT / 'requirements.txt'} vastai && uv pip check",
        )
    else:
        yield ok("packages", "as nullworker" + (" and vastai want" if sources["vastai"] else " wants") + " them")


def look_at_template(host: Host) -> Iterator[Finding]:
    """Check the environment as Vast's start script reads it."""
    if host.environ.get("BACKEND") and not host.environ.get("HF_TOKEN"):
        yield failed(
            "template",
            f"BACKEND={host.environ['BACKEND']} without HF_TOKEN",
            why="Vast's start script stops if BACKEND is set and HF_TOKEN is not",
            fix="remove BACKEND from the template: worker.py is found without it",
        )


def look_at_ports(settings: Settings) -> Iterator[Finding]:
    """Check the running worker, or that its ports are free."""
    url = f"http://127.0.0.1:{settings.null_control_port}"
    try:
        status = (
            ControlClient(url).ask("GET", "/status", seconds=ANSWER_SECONDS) if settings.null_control_port else None
        )
    except (WorkerUnreachable, Refused):
        status = None
    if isinstance(status, dict) and "state" in status:
        yield from _look_at_worker(url, status)
        return
    yield from _look_for_second(settings)
    ports = {
        "WORKER_PORT": (settings.worker_port, None),
        "NULL_CONTROL_PORT": (settings.null_control_port, "127.0.0.1"),
        "WORKER_HTTP_PORT": (settings.worker_http_port or settings.worker_port + 1, "127.0.0.1"),
    }
    for variable, (port, host) in ports.items():
        try:
            listen(port, host=host, variable=variable).close()
        except (CannotStart, OverflowError) as error:
            optional = variable == "WORKER_HTTP_PORT" and settings.worker_http_port is None
            yield (warning if optional else failed)(
                "ports",
                str(error).partition("; ")[0],
                why="consumers cannot end a session there" if optional else "the worker exits with code 1",
                fix=f"see which program has it: ss -ltnp 'sport = :{port}'; stop that, or set {variable}",
            )
        else:
            yield ok("ports", f"{variable} {port} is free")


def _look_at_worker(url: str, status: dict[str, Any]) -> Iterator[Finding]:
    if status["state"] == "ready":
        yield ok("worker", f"a worker runs and is ready; its control port is {url}")
        return
    whys = [part["why"] for part in (status.get("consumer"), status.get("log")) if part and part.get("why")]
    yield failed(
        "worker",
        f"a worker runs and is {status['state']}: {'; '.join(whys) or 'see its checks'}",
        why="it takes no reservations until it is ready",
        fix=f"see each check with: curl -s {url}/readyz",
    )


def _look_for_second(settings: Settings) -> Iterator[Finding]:
    """Check whether a worker with another control port holds the log."""
    try:
        lock = os.open(f"{settings.event_log}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        yield failed(
            "second worker",
            f"{settings.event_log.absolute()} belongs to a worker that runs ({holder}) with another control port",
            why="a log has one worker: a second one on it exits with code 1",
            fix="stop the other one, or set NULL_EVENT_LOG, WORKER_PORT and NULL_CONTROL_PORT for this one",
        )
    finally:
        os.close(lock)


def look_at_log(host: Host, settings: Settings) -> Iterator[Finding]:
    """Check the event log: its folder, file system and disk, and the file if it exists."""
    path = settings.event_log.absolute()
    folder = path.parent
    while not folder.exists():  # the worker creates it
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            open_for_reading(path).close()
    except (OSError, NullworkerError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield failed(
            "event log",
            f"{path}: {why}",
            why="without its log the worker takes no reservations",
            fix="set NULL_EVENT_LOG to a file in a folder that can be written",
        )
    else:
        yield ok("event log", f"{path} can be written")
    kind = file_system(host.mounts, folder)
    if kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse."):
        yield failed(
            "file system",
            f"{path} is on {kind}, a network file system",
            why="SQLite's write-ahead log does not work there: the log may be damaged or lost",
            fix="set NULL_EVENT_LOG to a file on the instance's own disk, and copy it from there with sqlite3 .backup",
        )
    else:
        yield ok("file system", kind or "unknown")
    free = host.free_bytes(folder)
    if free < COMFORTABLE_BYTES:
        yield (failed if free < NEEDED_BYTES else warning)(
            "disk",
            f"{free / 1e6:.0f} MB are free at {folder}",
            why="on a full disk the worker refuses new reservations with 503, and reports itself as errored",
            fix=f"find large files with: du -xh --max-depth=2 {folder} | sort -h; or give the template more disk",
        )
    else:
        yield ok("disk", f"{free / 1e9:.0f} GB are free at {folder}")


def file_system(mounts: Path, folder: Path) -> str:
    """The type of a folder's file system; empty if /proc does not have it."""
    best, kind = "", ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        point, mounted = line.split()[1:3]
        point = point.replace("\\040", " ")
        inside = folder == Path(point) or Path(point) in folder.parents
        if inside and len(point) >= len(best):  # of two mounts on one point the later one is on top
            best, kind = point, mounted
    return kind


def _own_requirements() -> list[Any]:
    """Our requirements: from requirements.txt in a clone, else from the installed metadata."""
    file = ROOT / "requirements.txt"
    if file.exists():
        return _parsed(line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return _requirements_of("nullworker")


def _requirements_of(distribution: str) -> list[Any]:
    try:
        return _parsed(importlib.metadata.requires(distribution) or ())
    except importlib.metadata.PackageNotFoundError:
        return []


def _parsed(lines: Any) -> list[Any]:
    """The requirements that apply on this platform and Python, without extras."""
    parser: Any
    try:
        parser = importlib.import_module("packaging.requirements")
    except ImportError:  # pip, which sqlite-utils brings, has its own
        parser = importlib.import_module("pip._vendor.packaging.requirements")
    requirements = [parser.Requirement(line) for line in lines if line]
    here = {"extra": ""}
    return [
        requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate(here)
    ]
