"""`--metadata`: what a worker would refuse is told at once, in a sentence, and not by a worker for each claim."""

from __future__ import annotations

import click
import pytest

from nullworker.cli.options import json_object
from nullworker.http.bodies import MAX_DEPTH

OPTION = click.Option(["--metadata"])
CONTEXT = click.Context(click.Command("dispatch"))


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job=1", "'job=1' is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a": NaN}', "is not JSON"),
        ('{"a": 1e999}', "is not JSON"),
        (nested(MAX_DEPTH + 1), "nests more than 100 deep"),
        (nested(100_000), "nests more than 100 deep"),
    ],
)
def test_metadata_that_no_worker_takes_is_refused(text: str, said: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        json_object(CONTEXT, OPTION, text)
    assert said in refused.value.message


def test_metadata_is_a_json_object_or_nothing() -> None:
    assert json_object(CONTEXT, OPTION, '{"job": "42"}') == {"job": "42"}
    assert json_object(CONTEXT, OPTION, nested(MAX_DEPTH - 1)) is not None  # its value is a level too
    assert json_object(CONTEXT, OPTION, None) is None
