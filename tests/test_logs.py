"""Log lines: what they look like, and that nothing about them can stop the work."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, ROOT
from programs import free_port, listens, until

from nullworker import logs


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


def test_a_library_whose_words_do_not_fit_is_heard_and_not_harmed(
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
    logs.close()


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
async def test_a_worker_whose_stderr_is_closed_or_full_works_and_ends_as_it_should(tmp_path: Path, stderr: str) -> None:
    port, control = free_port(), free_port()
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        f'exec "$0" -m nullworker serve {stderr}',
        sys.executable,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "UNSECURED": "true",
            "WORKER_PORT": str(port),
            "NULL_CONTROL_PORT": str(control),
            "WORKER_HTTP_PORT": str(free_port()),
        },
    )
    await until(lambda: listens(port) and listens(control))
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
