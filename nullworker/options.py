"""What options of several commands have in common."""

from __future__ import annotations

import math
from typing import Any

import click


class Seconds(click.FloatRange):
    """A number of seconds from 0 up; `inf` and `nan`, which float() takes, are none."""

    name = "seconds"

    def __init__(self, *, more_than_0: bool = False) -> None:
        super().__init__(min=0, min_open=more_than_0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number.

        Raises:
            click.BadParameter: it is none.
        """
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds >= 0) or (self.min_open and seconds == 0):
            self.fail(
                f"{value!r} is not a number of seconds, {'more than 0' if self.min_open else '0 or more'}", param, ctx
            )
        return seconds


SECONDS = Seconds()
