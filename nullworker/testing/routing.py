"""Chooses the worker for the next request, from the workers' reports alone. Pure: time is passed in.

The load of a worker is what it last reported, less what it has ended since, plus the grants that it has not shown yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FRESH_SECONDS = 30.0  # three of the 10 s between a quiet worker's reports (vastai 1.9.1, server/lib/metrics.py)
GRANT_SECONDS = 5.0  # a grant that no report shows by then was not used: reports of a change follow within a second


@dataclass
class Parameters:
    """The endpoint's parameters, under Vast's names (vastai 1.9.1, data/endpoint.py). Times are in seconds.

    Only `max_queue_time` moves anything here. A busy worker gets one more request only while its whole load, with that
    request, is worth at most so many seconds (load / max_perf); an idle one always gets one. So with workers whose
    max_perf is the workload of one request, anything up to 1 means one request at a time each, and n means n.
    """

    min_load: float = 0.0
    max_workers: int = 16
    cold_workers: int = 0
    target_util: float = 1.0
    max_queue_time: float = 1.0
    target_queue_time: float = 0.5
    inactivity_timeout: float = 10.0


@dataclass
class ReportedWorker:
    """One worker, as its reports tell."""

    status: Mapping[str, Any]
    reported_at: float
    ended: set[int] = field(default_factory=set)  # outcomes that came in after this report
    granted: dict[int, tuple[float, float]] = field(default_factory=dict)  # request_idx: (cost, at), not shown yet

    @property
    def ready(self) -> bool:
        return bool(self.status["url"]) and self.status["max_perf"] > 0 and not self.status["error_msg"]

    def load(self, now: float) -> float:
        working = self.status["working_request_idxs"]
        share = sum(idx not in self.ended for idx in working) / len(working) if working else 1.0
        return float(self.status["cur_load"]) * share + sum(
            cost for cost, at in self.granted.values() if now < at + GRANT_SECONDS
        )


@dataclass
class Router:
    """Every worker that has reported, by its id."""

    parameters: Parameters
    machines: dict[int | str, ReportedWorker] = field(default_factory=dict)
    retired: set[int | str] = field(default_factory=set)  # workers that get no more requests, whatever they report

    def report(self, status: Mapping[str, Any], now: float) -> None:
        """Takes in one worker_status. Grants that it shows are load of the report's own from here on."""
        before = self.machines.get(status["id"])
        shown = set(status["working_request_idxs"])
        granted = {} if before is None else {i: grant for i, grant in before.granted.items() if i not in shown}
        self.machines[status["id"]] = ReportedWorker(status, now, granted=granted)

    def end(self, worker_id: int | str, request_idx: int) -> None:
        """Takes in one outcome: what has ended is no load, whatever the last report said."""
        if machine := self.machines.get(worker_id):
            machine.ended.add(request_idx)
            machine.granted.pop(request_idx, None)

    def grant(self, request_idx: int, cost: float, now: float) -> str | None:
        """The url of the least loaded worker that may take `cost`, which is its load from now on; None: nobody may.

        A request that asks again has not used the grant it had: that one is forgotten.
        """
        for machine in self.machines.values():
            machine.granted.pop(request_idx, None)
        able = [machine for machine in self.ready(now) if self._takes(machine, cost, now)]
        if not able:
            return None
        best = min(able, key=lambda machine: machine.load(now))
        best.granted[request_idx] = (cost, now)
        return str(best.status["url"])

    def ready(self, now: float) -> list[ReportedWorker]:
        """The workers that are ready, have reported lately and are not retired, busy or not."""
        return [
            machine
            for number, machine in self.machines.items()
            if machine.ready and now < machine.reported_at + FRESH_SECONDS and number not in self.retired
        ]

    def _takes(self, machine: ReportedWorker, cost: float, now: float) -> bool:
        load = machine.load(now)
        return load == 0 or (load + cost) / machine.status["max_perf"] <= self.parameters.max_queue_time
