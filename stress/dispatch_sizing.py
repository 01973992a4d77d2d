"""A model of what idle time and a minimum of workers cost and save: the table of docs/dispatch.md.

    python -m stress.dispatch_sizing --jobs-per-hour 6 --minutes 4 --start 180 --price 0.40

Jobs arrive at random. Each takes an idle machine, or waits for one that starts. A machine that has been idle for the
endpoint's inactivity_timeout is stopped, unless that leaves fewer than the minimum. Machines cost from their start on.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from collections.abc import Iterator
from random import Random

DAYS = 60


def model(seed: int, per_hour: float, work: float, start: float, idle: float, least: int) -> tuple[list[float], float]:
    """The wait of each job, and the hours of machines for each hour, over DAYS."""
    random, day = Random(seed), DAYS * 86_400.0
    free: list[float] = [0.0] * least  # since when each idle machine is free
    busy: list[float] = []  # when each busy machine will be free
    waits, paid, now = [], 0.0, 0.0
    while now < day:
        now += random.expovariate(per_hour / 3600)
        while busy and busy[0] <= now:
            free.append(heapq.heappop(busy))
        free.sort()  # the one that has been idle for longest is stopped first, and taken last
        for since in list(free):
            if now - since >= idle and len(free) + len(busy) > least:
                free.remove(since)
                paid += idle
        if free:
            since = free.pop()
            paid += now - since
            wait = 0.0
        else:
            wait = start
            paid += start
        waits.append(wait)
        seconds = random.lognormvariate(0, 0.5) * work / 1.133
        paid += seconds
        heapq.heappush(busy, now + wait + seconds)
    return waits, paid / day


def table(arguments: argparse.Namespace) -> Iterator[str]:
    yield f"{'idle time':>10} {'min':>5} {'mean wait':>10} {'waits at all':>12} {'$ an hour':>9}"
    for idle, least in ((10, 0), (300, 0), (1800, 0), (10, 1), (10, 2)):
        waits, machines = model(1, arguments.jobs_per_hour, arguments.minutes * 60, arguments.start, float(idle), least)
        share = sum(wait > 0 for wait in waits) / len(waits)
        dollars = machines * arguments.price
        yield f"{idle:>8} s {least:>5} {statistics.mean(waits):>8.0f} s {share:>11.0%} {dollars:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs-per-hour", type=float, default=6)
    parser.add_argument("--minutes", type=float, default=4, help="of one job")
    parser.add_argument("--start", type=float, default=180, help="seconds of a cold machine")
    parser.add_argument("--price", type=float, default=0.40, help="dollars an hour")
    print("\n".join(table(parser.parse_args())))


if __name__ == "__main__":
    main()
