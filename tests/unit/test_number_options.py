"""Options that are numbers: what click would let through, and a cost that no worker takes."""

from __future__ import annotations

import click
import pytest

from nullworker.cli import options
from nullworker.http import auth

CONTEXT = click.Context(click.Command("dispatch"))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "ten", "", "-1", "0", "1000001"])
def test_a_number_is_finite_and_in_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        options.COST.convert(text, None, CONTEXT)
    assert text in str(refused.value)


def test_a_cost_is_what_a_worker_takes() -> None:
    assert options.COST.convert("1e3", None, CONTEXT) == 1000.0
    assert options.MAX_COST == auth.MAX_COST
