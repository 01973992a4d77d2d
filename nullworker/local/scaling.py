"""How many workers the endpoint's parameters ask for, for the local fleet. Pure.

It follows what Vast documents of min_load, target_util, cold_workers, max_workers and inactivity_timeout, and ignores
prices, forecasts, cold_mult and min_cold_load. The result is never more than max_workers.
"""

from __future__ import annotations

import math

from nullworker.testing import Parameters

#: What a sum of floats may be off, in workers: 300 of load over 100 each are three workers and not four.
TOLERANCE = 1e-9


def wanted(parameters: Parameters, *, load: float, perf: float, running: int) -> int:
    """Workers for a load, in the unit of `perf`, a worker's max_perf; `running` are those that there are.

    `load` is all that is asked for: what is held, what waits on a worker, what waits for one. There are no further
    workers for it while all of it is worth at most target_queue_time seconds of those that run. min_load is met always.
    """
    needed = _workers(load, perf, parameters.target_util)
    if running and load / (running * perf) <= parameters.target_queue_time:
        needed = min(needed, running)
    floor = _workers(parameters.min_load, perf, parameters.target_util)
    if parameters.inactivity_timeout < 0:  # never to zero
        floor = max(floor, 1)
    return min(max(needed, floor), parameters.max_workers)


def _workers(load: float, perf: float, target_util: float) -> int:
    return math.ceil(load / (perf * target_util) - TOLERANCE)
