"""Prints the tables of docs/performance.md: beside the SDK's worker and the bound, what a user feels, and growth.

    python -m bench [--rounds 5] [--only cycles,...] [--into docs/performance.md]

Workers are measured in turns, in one run. What fails, or takes too long, is said on stderr, its cells stay empty, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from bench import compare, felt, growth, quiet
from bench.figures import PEERS, Figures, Table, markdown
from nullworker.aio import Interrupted, run_until_signalled, wait_for
from nullworker.http.sockets import raise_fd_limit
from nullworker.testing import FakeAutoscaler

T = TypeVar("T")
Measure = Callable[[str, FakeAutoscaler, Path], Awaitable[Figures]]

#: Bytes of a commit.
PAGES = 16 * 1024
#: Seconds for one measurement of one peer, and of one row of the table of growth.
PEER_SECONDS, GROWTH_SECONDS = 180.0, 600.0
COMPARED: dict[str, Measure] = {
    "cycles": compare.cycles,
    "queue": compare.queue,
    "forged": compare.forged,
    "command": compare.command,
}
FELT: dict[str, Measure] = {"told": felt.told, "killed": felt.consumer_killed, "jobs": felt.jobs}
#: The tables stand in the page between these lines.
BEGIN, END = "<!-- printed by make bench -->\n", "<!-- end of what make bench prints -->\n"


class Bench:
    """One run."""

    def __init__(self, names: Sequence[str]) -> None:
        self.compared, self.felt = Table(), Table()
        self.grown = list[growth.Row]()
        self.others = list[dict[str, float]]()
        self.failed = False
        self._names, self._rounds = names, 0

    async def run(self, rounds: int) -> None:
        """All rounds; growth once."""
        self._rounds = rounds
        async with FakeAutoscaler() as vast:
            for number in range(rounds):
                self.others.append(await quiet.others())
                first = number % len(PEERS)
                peers = PEERS[first:] + PEERS[:first]
                for name in filter(COMPARED.__contains__, self._names):
                    for peer in peers:
                        await self._measured(self.compared, name, COMPARED[name], peer, vast, f"{number + 1}/{rounds}")
                # They wait for most of the time, and are in nobody's way.
                waits = [
                    self._measured(self.felt, name, FELT[name], peer, vast, f"{number + 1}/{rounds}")
                    for name in filter(FELT.__contains__, self._names)
                    for peer in ("nullworker", "SDK")
                ]
                await asyncio.gather(*waits)
        for name in filter(growth.MEASURES.__contains__, self._names):
            self.others.append(await quiet.others())
            _progress(f"growth: {name}")
            self.grown += await self._tried(f"growth: {name}", growth.MEASURES[name], GROWTH_SECONDS) or []
        _progress("")

    async def _measured(
        self, table: Table, name: str, measure: Measure, peer: str, vast: FakeAutoscaler, number: str
    ) -> None:
        _progress(f"round {number}: {name}, {peer}")
        with tempfile.TemporaryDirectory(prefix="nullworker-bench-", ignore_cleanup_errors=True) as folder:
            figures = await self._tried(f"{name}, {peer}", lambda: measure(peer, vast, Path(folder)), PEER_SECONDS)
        table.add(peer, figures or {})

    async def _tried(self, what: str, measure: Callable[[], Awaitable[T]], seconds: float) -> T | None:
        """What it gives, within the time; None if it fails."""
        try:
            return await wait_for(measure(), seconds)
        except Exception as error:
            why = f"not done within {seconds:g} s" if type(error) is asyncio.TimeoutError and not str(error) else error
            print(f"\n{what}: {type(error).__name__}: {why}", file=sys.stderr)
            self.failed = True
            return None

    def lines(self) -> list[str]:
        """What is printed: the page's text between BEGIN and END."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "vastai", "cryptography"))
        at_once, rested = fdatasync(0.0), fdatasync(0.003)
        parts = [
            f"{quiet.verdict(self.others)}.\n",
            f"Rounds: {self._rounds}; growth once.",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}.",
            f"One fdatasync of 16 kB: {at_once:.2f} ms, and {rested:.2f} ms when the disk has rested for 3 ms.",
        ]
        tables = {"Beside the SDK's worker, and the bound": self.compared, "What a user feels": self.felt}
        for head, table in tables.items():
            if table.values:
                parts += [f"\n## {head}\n", *table.lines()]
        if self.grown:
            parts += ["\n## Growth\n", *markdown(growth.HEADS, [row.cells() for row in self.grown])]
        return parts


def fdatasync(rest: float) -> float:
    """Median milliseconds of what a commit asks of the disk: pages written over and synced, every `rest` seconds."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1024 * PAGES))
        os.fsync(file.fileno())
        took = []
        for number in range(200):
            time.sleep(rest)
            started = time.perf_counter()
            os.pwrite(file.fileno(), bytes([number]) * PAGES, number % 1024 * PAGES)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - started) * 1e3)
    return statistics.median(took)


def insert(page: Path, text: str) -> None:
    """Put the tables into the page, in place of those that it has."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no lines {BEGIN.strip()!r} and {END.strip()!r}")
    page.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}")


def _progress(text: str) -> None:
    print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    everything = (*COMPARED, *FELT, *growth.MEASURES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(everything), help="of " + ", ".join(everything))
    parser.add_argument("--into", type=Path, help="a page whose tables are replaced")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(everything):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(everything)}")
    raise_fd_limit()
    bench = Bench(names)
    try:
        asyncio.run(run_until_signalled(bench.run(options.rounds), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.signal)
    text = "\n".join(bench.lines())
    print(text)
    if options.into is not None:
        insert(options.into, text)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
