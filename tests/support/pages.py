"""The Markdown pages as tests see them: code blocks, tables, and the output of their commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import PATIENCE, ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
BOUNDARY = "--- the next block ---"
#: Numbers that are others in each run.
PASSING = re.compile(r"\w+_seconds|expiration|created_at|give_up_at|ends_at|seq|last_seq|bytes")


class Block(NamedTuple):
    """A fenced block, and the language that it says it is in."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```([\w ]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def rows(page: Path, head: str) -> Iterator[list[str]]:
    """The cells of the table whose first line begins with `head`."""
    _, _, table = page.read_text().partition(f"\n{head}")
    assert table, f"{page.name} has no table {head}"
    for line in table.split("\n\n")[0].splitlines()[2:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def files() -> Iterator[Path]:
    """Every file of the repository."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name == ".ci" or not name.startswith((".", "__pycache__"))]
        yield from (Path(folder, name) for name in names)


async def shell(script: str, folder: Path, **env: str) -> str:
    """What a script writes. Whatever it has left in the background ends with it."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, cwd=folder, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 3 * PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode == 0, (out.decode(), err.decode())
    return out.decode()


def alike(value: Any, name: str = "") -> Any:
    """A value of JSON, without what is another in each run: ids, times, seconds that have passed."""
    if name == "settings":
        return "settings"
    if isinstance(value, dict):
        return {key: alike(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [alike(each) for each in value]
    if isinstance(value, (int, float)) and PASSING.fullmatch(name):
        return "a number"
    if isinstance(value, str) and name in ("path", "url"):
        return "a place"
    return in_words(value) if isinstance(value, str) else value


def in_words(text: str) -> str:
    text = re.sub(r"\b[a-z2-7]{16}\b", "<id>", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "<time>", text)


def as_json(text: str) -> Any:
    return alike(json.loads(text)) if text.strip() else None


def as_lines(text: str) -> list[str]:
    """Lines of a stream, or of any text."""
    told = []
    for line in text.strip().splitlines():
        data = line.startswith("data: {")
        told.append(json.dumps(alike(json.loads(line[6:]))) if data else re.sub(r"^id: \d+$", "id: <seq>", line))
    return told


def as_http(text: str) -> tuple[str, dict[str, str], Any]:
    """Status, headers and body of an answer."""
    head, _, body = text.replace("\r", "").partition("\n\n")
    status, *lines = head.splitlines()
    headers = {name.lower(): in_words(value) for name, _, value in (line.partition(": ") for line in lines)}
    return status.split()[1], headers, as_json(body)


def check(shown: Block, told: str) -> None:
    """What a command told is what the page shows of it."""
    if shown.language == "json":
        assert as_json(told) == as_json(shown.text)
    elif shown.language == "text":
        assert as_lines(told) == as_lines(shown.text)
    else:
        status, headers, body = as_http(told)
        expected_status, expected_headers, expected_body = as_http(shown.text)
        assert (status, body) == (expected_status, expected_body), told
        assert expected_headers.items() <= headers.items()
