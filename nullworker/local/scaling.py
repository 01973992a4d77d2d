"""How many workers the endpoint's parameters ask for, for the local fleet. Pure.

It follows what Vast documents of min_load, target_util, cold_workers, max_workers and inactivity_timeout, and ignores
prices, forecasts, cold_mult and min_cold_load. The result is never more than max_workers.
"""

from __future__ import annotations

import math

from nullworker.testing import Parameters

#: Rounding error of a sum of floats, in workers: a load of 300 is three workers of 100, not four.
TOLERANCE = 1e-9


def wanted(
    parameters: Parameters, *, load: float, perf: float, running: int, working: float = 0.0, stalls: bool = False
) -> int:
    """The number of workers for a load in the unit of `perf`, a worker's max_perf. `running`: workers that exist.

    `stalls`: as the engine of May 2026, which took a `working` load (of held reservations) of exactly target_util for
    being on target, from the second worker on: a third was not started for claims that waited.

    `load` is the sum of held reservations, queues and requests that wait for a worker. No worker is added while the
    load is worth at most target_queue_time seconds of the running workers. min_load is always met.
    """
    needed = _workers(load, perf, parameters.target_util)
    if running and load / (running * perf) <= parameters.target_queue_time:
        needed = min(needed, running)
    if stalls and running > 1 and working <= running * perf * parameters.target_util + TOLERANCE:
        needed = min(needed, running)
    floor = _workers(parameters.min_load, perf, parameters.target_util)
    if parameters.inactivity_timeout < 0:  # never scales to zero
        floor = max(floor, 1)
    return min(max(needed, floor), parameters.max_workers)


def _workers(load: float, perf: float, target_util: float) -> int:
    return math.ceil(load / (perf * target_util) - TOLERANCE)
