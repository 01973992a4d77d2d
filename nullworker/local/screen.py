"""The terminal output of `nullworker dev`: lines for events, and in a terminal a live table below them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from typing import Final, Protocol

import click

from nullworker.clock import iso
from nullworker.local.chart import table
from nullworker.local.fleet import Fleet
from nullworker.local.fleet_worker import Change, FleetWorker
from nullworker.testing import FakeAutoscaler

#: Seconds between two redraws.
DRAW_SECONDS: Final = 0.25

_UP_AND_CLEAR: Final = "\033[{lines}F\033[J"
_WORDS: Final = {"cold": "stopped, and kept as cold", "gone": "gone", "dead": "dead"}


class Show(Protocol):
    """The output of `nullworker dev`."""

    def say(self, line: str) -> None:
        """Print a line."""

    def heard(self, line: str) -> None:
        """Print a line of the fake autoscaler."""

    def changed(self, change: Change) -> None:
        """Print a change of a worker's state."""

    async def draw(self, vast: FakeAutoscaler, fleet: Fleet) -> None:
        """Redraw the table, forever."""


class Lines:
    """Plain lines, each with its time (UTC)."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def say(self, line: str) -> None:
        click.echo(f"{iso(self._now())[11:19]}  {line}")

    def heard(self, line: str) -> None:
        """Only routing and outcomes; the workers' states come from the fleet."""
        call, _, rest = line.partition(" ")
        if call in ("route", "delete_requests"):
            self.say(rest.strip())

    def changed(self, change: Change) -> None:
        self.say(f"worker {change.worker}: {_WORDS.get(change.state, change.state)}{_because(change)}")

    async def draw(self, vast: FakeAutoscaler, fleet: Fleet) -> None:
        await asyncio.Event().wait()


class Screen(Lines):
    """Lines, and below them a table that is redrawn."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self._said: list[str] = []  # since the last redraw
        self._drawn = 0

    def say(self, line: str) -> None:
        self._said.append(f"{iso(self._now())[11:19]}  {line}")

    async def draw(self, vast: FakeAutoscaler, fleet: Fleet) -> None:
        try:
            while True:
                self._put(picture(vast, fleet, self._now()))
                await asyncio.sleep(DRAW_SECONDS)
        finally:
            self._put(picture(vast, fleet, self._now()))

    def _put(self, picture: str) -> None:
        back = _UP_AND_CLEAR.format(lines=self._drawn) if self._drawn else ""
        columns = shutil.get_terminal_size().columns or 80  # before Python 3.11 it may say 0
        drawn = ["", *(line[: columns - 1] for line in picture.splitlines())]  # a line that wraps would count as two
        click.echo(back + "\n".join([*self._said, *drawn]))
        self._said.clear()
        self._drawn = len(drawn)


def picture(vast: FakeAutoscaler, fleet: Fleet, now: float) -> str:
    """A head and a table with a row for each worker."""
    waiting = ", ".join(map(str, vast.waiting)) or "none"
    head = (
        f"endpoint {vast.endpoint!r} at {vast.url}   workers: {len(fleet.processes)} of {vast.parameters.max_workers}"
    )
    names = ("worker", "state", "for", "held by", "queue", "control port")
    rows = [_row(member, now) for _, member in sorted(fleet.members.items()) if member.state != "gone"]
    return f"{head}   waiting requests: {waiting}\n\n{table(names, rows)}"


def _row(member: FleetWorker, now: float) -> tuple[object, ...]:
    runs = member.worker is not None
    return (
        member.number,
        member.state,
        f"{now - member.since:.0f} s",
        None if member.held_by is None else f"request {member.held_by}",
        member.queued if runs else None,
        member.control_port if runs else None,
    )


def _because(change: Change) -> str:
    return f" ({change.why})" if change.why else ""
