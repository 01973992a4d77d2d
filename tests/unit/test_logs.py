"""Log lines: their format, and that writing them never blocks or fails the work."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import re
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, ROOT, post
from programs import free_port, until

from nullworker import logs
from nullworker.control_client import ControlClient
from nullworker.errors import WorkerUnreachable


class Untold:
    """A value that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Broken(io.StringIO):
    """A stream whose reader has died, or whose disk is full, or that is closed."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    logs.configure("console", "warning")


@pytest.fixture(params=["json", "console"])
def said(request: pytest.FixtureRequest) -> Callable[[], str]:
    """What was written, in either form."""
    stream = io.StringIO()
    logs.configure(request.param, "info", stream)
    return stream.getvalue


log = logs.get_log("nullworker.test")


def test_a_line_for_a_person() -> None:
    stream = io.StringIO()
    logs.configure("console", "info", stream)
    log.info("reservation_held", reservation_id="abc", seq=2, reason="two words", none=None)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info     reservation_held         reservation_id=abc seq=2"
        r' reason="two words" none=None\n',
        stream.getvalue(),
    )


def test_a_line_as_json() -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    log.warning("port_full", connections=3, path=Path("/x"))
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"level": "warning", "event": "port_full", "connections": 3, "path": "/x"}


def test_only_the_level_that_was_asked_for_is_shown() -> None:
    stream = io.StringIO()
    logs.configure("json", "error", stream)
    log.warning("quiet")
    logging.getLogger("aiohttp").info("quiet")
    log.error("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_a_bug_has_its_traceback(said: Callable[[], str]) -> None:
    try:
        raise KeyError("the cause")
    except KeyError:
        log.exception("bug")
    assert "KeyError: 'the cause'" in said()
    assert "Traceback" in said()


def test_a_library_speaks_in_the_same_form(said: Callable[[], str]) -> None:
    try:
        raise KeyError("the cause")
    except KeyError:
        logging.getLogger("aiohttp.server").error("it %s", "failed", exc_info=True)
    assert "library_line" in said()
    assert "it failed" in said()
    assert "KeyError: 'the cause'" in said()


def test_a_librarys_wrong_format_string_is_still_logged(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if type(handler).__module__ == "nullworker.logs"]
    monkeypatch.setattr(root, "handlers", ours)  # pytest's own raises
    logging.getLogger("aiohttp").warning("%d of them", "many")
    logging.getLogger("aiohttp").warning("it was %s", Untold())
    assert said().count("library_line") == 2
    assert "%d of them" in said()


@pytest.mark.parametrize("value", [Untold(), {("a", "tuple"): Untold()}], ids=["untold", "nested"])
def test_a_line_that_cannot_be_told_whole_is_told_in_part(said: Callable[[], str], value: Any) -> None:
    log.warning("strange", value=value)
    assert said().count("\n") == 1
    assert "strange" in said()
    assert "value" in said()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("I/O operation on closed file")]
)
def test_a_line_that_cannot_be_written_stops_nothing(error: Exception) -> None:
    logs.configure("console", "info", Broken(error))
    log.error("lost")
    logging.getLogger("aiohttp").error("lost")


def test_a_process_without_stderr_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("console", "info")
    monkeypatch.setattr(sys, "stderr", None)
    log.error("lost")


# -- real processes ---------------------------------------------------------------------------------------------------


def socketpair() -> tuple[int, int]:
    """As services of systemd have it."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@contextlib.contextmanager
def unread(opened: Callable[[], tuple[int, int]] = os.pipe) -> Iterator[tuple[int, int]]:
    """A stderr, and where it can be read without waiting."""
    reader, stderr = opened()
    os.set_blocking(reader, False)
    try:
        yield reader, stderr
    finally:
        os.close(reader)
        os.close(stderr)


def read_all(reader: int) -> str:
    """What has come and was not read yet."""
    said = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(reader, 2**20):
            said += chunk
    return said.decode()


@contextlib.asynccontextmanager
async def started(folder: Path, *command: str, stderr: int | None, **env: str) -> AsyncIterator[Process]:
    """A process that is not left behind."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def speaking(folder: Path, code: str, stderr: int) -> contextlib.AbstractAsyncContextManager[Process]:
    """Python that has `log`."""
    begin = 'from nullworker import logs; logs.configure("json", "info"); log = logs.get_log("nullworker")\n'
    return started(folder, sys.executable, "-c", begin + code, stderr=stderr)


@contextlib.asynccontextmanager
async def working(folder: Path, stderr: int | None = None, redirected: str = "") -> AsyncIterator[tuple[Process, str]]:
    """A worker that has started, which is seen on its control port, since it may have no stderr; and its url."""
    port, control = free_port(), free_port()
    ports = {"WORKER_PORT": port, "NULL_CONTROL_PORT": control, "WORKER_HTTP_PORT": free_port()}
    env = {"UNSECURED": "true", "NULL_LOG_FORMAT": "json", **{name: str(port) for name, port in ports.items()}}
    command = ("/bin/sh", "-c", f'exec "$0" -m nullworker serve {redirected}', sys.executable)
    async with started(folder, *command, stderr=stderr, **env) as process:
        await until(lambda: answers(control))
        yield process, f"http://127.0.0.1:{port}"


def answers(control: int) -> bool:
    """Whether a worker answers on this control port. Its ports listen some time before it handles signals."""
    try:
        return bool(ControlClient(f"http://127.0.0.1:{control}").ask("GET", "/status"))
    except WorkerUnreachable:
        return False


async def end_of(process: Process) -> int:
    """Its exit code."""
    return await asyncio.wait_for(process.wait(), PATIENCE)


@pytest.mark.process
@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
async def test_a_worker_whose_stderr_is_closed_or_full_works_and_ends_as_it_should(
    tmp_path: Path, redirected: str
) -> None:
    async with working(tmp_path, redirected=redirected) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert await end_of(process) == 0


@pytest.mark.process
async def test_a_log_file_shared_with_others_is_appended_to(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        file.write(b"theirs\n")
        async with speaking(tmp_path, 'log.info("ours")', file.fileno()) as process:
            assert await end_of(process) == 0
        file.write(b"theirs\n")
    assert re.fullmatch(r'theirs\n.*"ours".*\ntheirs\n', (tmp_path / "log").read_text())


@pytest.mark.process
@pytest.mark.parametrize("opened", [os.pipe, socketpair, pty.openpty])
@pytest.mark.parametrize(("lines", "size"), [(20_000, 100), (1, 3_000_000)], ids=["many", "long"])
async def test_a_reader_that_stalls_stops_neither_a_line_nor_a_traceback_nor_the_end(
    tmp_path: Path, opened: Callable[[], tuple[int, int]], lines: int, size: int
) -> None:
    code = f"""
for _ in range({lines}):
    log.info("line", text="x" * {size})
logs.logging.getLogger("aiohttp").error("lost")
raise RuntimeError("lost " * 10_000)
"""
    with unread(opened) as (_, stderr):
        async with speaking(tmp_path, code, stderr) as process:
            assert await end_of(process) == 1
        assert os.get_blocking(stderr)  # it is not the process's alone


@pytest.mark.process
async def test_a_line_that_was_begun_comes_whole_and_those_dropped_meanwhile_are_counted(tmp_path: Path) -> None:
    code = """
for dropped in 3, 2:
    log.info("long", text="x" * logs.PIPE_BYTES)
    for _ in range(dropped):
        log.info("dropped")
    print("said", flush=True)
    input()
log.info("last")
"""
    said = ""
    with unread() as (reader, stderr):
        async with speaking(tmp_path, code, stderr) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for _ in range(2):
                assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"said\n"
                said += read_all(reader)
                process.stdin.write(b"\n")
            assert await end_of(process) == 0
        lines = [json.loads(line) for line in (said + read_all(reader)).splitlines()]
    assert [line.get("lines", line["event"]) for line in lines] == ["long", 3, "long", 2, "last"]


@pytest.mark.process
async def test_a_worker_whose_reader_stalls_works_and_ends_and_tells_what_it_dropped(tmp_path: Path) -> None:
    async def reserve(times: int) -> None:
        for _ in range(times):
            answer = await asyncio.wait_for(post(f"{url}/reserve", {"duration": 0}), PATIENCE)
            assert answer.status == 200

    with unread() as (reader, stderr):
        async with working(tmp_path, stderr) as (process, url):
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 16 * 1024)  # less than what is said of 60
            await reserve(60)
            said = read_all(reader)
            await reserve(1)
            lines = [json.loads(line) for line in (said + read_all(reader)).splitlines()]
            (dropped,) = [line["lines"] for line in lines if line["event"] == "log_lines_dropped"]
            assert dropped > 0
            assert len([line for line in lines if "seq" in line]) + dropped == 61 * 3  # queued, held, expired
            await reserve(60)
            process.send_signal(signal.SIGTERM)
            assert await end_of(process) == 0
