"""Tests on an event loop whose time passes at once when nobody has anything to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from stress.simulated_world import SimulatedLoop

P = ParamSpec("P")


def simulated(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on such a loop. What it leaves running is cancelled."""

    @functools.wraps(test)
    def run_it(*arguments: P.args, **fixtures: P.kwargs) -> None:
        with contextlib.closing(SimulatedLoop()) as loop:
            try:
                loop.run_until_complete(test(*arguments, **fixtures))
            finally:
                loop.end()
                loop.run_until_complete(loop.shutdown_asyncgens())

    return run_it
