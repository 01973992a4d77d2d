"""Measures how much CPU time other processes use while no benchmark runs, to tell whether the machine is quiet."""

from __future__ import annotations

import asyncio
import os

import psutil

#: Seconds that are looked at before each round.
LOOK_SECONDS = 1.0
#: Part of one core that other work may take before a round counts as disturbed.
QUIET_SHARE = 0.05


async def others() -> dict[str, float]:
    """Other processes by name, and the part of one core that each takes: 1.0 is a whole core."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    before = _cpu_seconds(own)
    await asyncio.sleep(LOOK_SECONDS)
    taken: dict[str, float] = {}
    for (pid, name), seconds in _cpu_seconds(own).items():
        share = (seconds - before.get((pid, name), seconds)) / LOOK_SECONDS
        if share >= 0.01:
            taken[name] = taken.get(name, 0.0) + share
    return taken


def _cpu_seconds(without: set[int]) -> dict[tuple[int, str], float]:
    found = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in without and times is not None:
            found[process.pid, str(process.info["name"])] = float(times.user + times.system)
    return found


def verdict(rounds: list[dict[str, float]]) -> str:
    """One line for the head of the table."""
    disturbed = [each for each in rounds if sum(each.values()) > QUIET_SHARE]
    if not disturbed:
        return (
            f"Quiet machine: other work took less than {QUIET_SHARE:.0%} of a core before each of {len(rounds)} rounds"
        )
    names = sorted({name for each in disturbed for name in each})
    most = max(sum(each.values()) for each in disturbed)
    return (
        f"NOT a quiet machine: other work ({', '.join(names)}) took up to {most:.0%} of a core"
        f" before {len(disturbed)} of {len(rounds)} rounds"
    )
