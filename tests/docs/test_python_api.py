"""docs/python-api.md, checked: it lists every public name, and each of its examples runs as shown."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleets import Dev
from harness import PATIENCE, ROOT, WorkerProcess
from pages import DOCS, blocks, rows
from programs import answered, caller

PAGE = DOCS / "python-api.md"
EXAMPLES = dict(blocks(PAGE))
PACKAGES = ("nullworker.client", "nullworker.consumer", "nullworker.testing")


async def output(folder: Path, example: str, **addresses: str) -> str:
    """Run an example, with other addresses in it. Its stdout, with the addresses of the page."""
    script = EXAMPLES[f"python {example}"]
    for shown, ours in addresses.items():
        script = script.replace(f"http://127.0.0.1:{shown.strip('_')}", ours)
    (folder / f"{example}.py").write_text(script)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", f"{example}.py"),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 2 * PATIENCE)
    assert process.returncode == 0, err.decode()
    told = out.decode()
    for shown, ours in addresses.items():
        told = told.replace(ours, f"http://127.0.0.1:{shown.strip('_')}")
    return told


@pytest.fixture
async def dev(tmp_path: Path) -> AsyncIterator[Dev]:
    """`nullworker dev` with the consumer of the page."""
    (tmp_path / "consumer.py").write_text(EXAMPLES["python consumer"])
    async with Dev(tmp_path, "--", sys.executable, str(tmp_path / "consumer.py")) as dev:
        yield dev


async def test_clients_of_an_endpoint_run_as_shown(dev: Dev, tmp_path: Path) -> None:
    for example in ("hold", "hold_session", "worker_session", "official"):
        assert await output(tmp_path, example, _8080=dev.url) == EXAMPLES[f"text {example}"]


async def test_clients_of_one_worker_run_as_shown(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        assert await output(tmp_path, "hold_at", _3000=worker.url) == EXAMPLES["text hold_at"]


async def test_a_queue_is_drained_as_shown(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, caller(worker) as asked:
        assert await output(tmp_path, "drain", _18999=worker.control) == EXAMPLES["text drain"]
        assert (await answered(asked))["result"]["failed"] == 1


async def test_the_fake_autoscaler_is_used_as_shown(tmp_path: Path) -> None:
    assert await output(tmp_path, "testing") == EXAMPLES["text testing"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_has_each_public_name_with_a_sentence_and_in_an_example(package: str) -> None:
    _, _, section = PAGE.read_text().partition(f"\n## {package}\n")
    section = section.partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE))
    assert set(listed) == set(importlib.import_module(package).__all__)
    assert all(len(sentence) > 20 for sentence in listed.values())
    imported = set[str]()
    for names in re.findall(rf"^from {re.escape(package)} import (.+)$", section, re.MULTILINE):
        imported |= set(names.split(", "))
    assert imported == set(listed)


def test_every_example_of_the_page_is_run() -> None:
    run = {"hold", "hold_session", "worker_session", "official", "hold_at", "testing", "consumer", "drain"}
    assert {language.partition(" ")[2] for language in EXAMPLES if language.startswith("python")} == run
    assert next(rows(PAGE, "| name |"))
