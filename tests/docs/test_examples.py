"""What belongs to each example beside its consumer; tests/stress/test_consumer_faults.py runs them."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from harness import ROOT
from queues import QUEUES


@pytest.mark.parametrize("name", sorted(QUEUES))
def test_each_example_has_a_program_file_for_the_supervisor_and_a_readme(name: str) -> None:
    folder = ROOT / "examples" / name
    parsed = configparser.RawConfigParser()
    parsed.read(folder / "consumer.conf")
    program = parsed["program:consumer"]
    script = Path(program["command"].split()[-1])
    assert (folder / script.name).is_file()
    assert int(program["stopwaitsecs"]) == 10
    assert program["autorestart"] == "true"
    told = {pair.partition("=")[0] for pair in program["environment"].split(",")}
    assert told - {"PROC_NAME", "PYTHONPATH"} <= {
        word for word in told if word in (folder / script.name).read_text()
    } | {"AWS_DEFAULT_REGION"}
    readme = (folder / "README.md").read_text()
    for word in (script.name, "consumer.conf", "BACKEND_HEALTH_URL"):
        assert word in readme
