"""Chooses the worker for the next request, from the workers' reports alone. Pure: time is passed in.

The load of a worker is what it last reported, less what it has ended since, plus the grants that it has not shown yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FRESH_SECONDS = 30.0  # three reports of an idle worker, which come every 10 s (vastai 1.9.1, server/lib/metrics.py)
GRANT_SECONDS = 5.0  # after that, a grant that no report shows was not used; changes are reported within 1 s
DOWNGRADE = 0.9  # a guess: that it happens is known, and not how fast


@dataclass
class Parameters:
    """The endpoint's parameters, under Vast's names (vastai 1.9.1, data/endpoint.py). Times are in seconds.

    Routing uses only `max_queue_time`: a busy worker gets another request only while its load including that request is
    worth at most so many seconds (load / max_perf); an idle worker always gets one. With workers whose max_perf is the
    workload of one request, a value up to 1 means one request at a time for each worker, and n means n.
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
    """A worker as known from its last report."""

    status: Mapping[str, Any]
    reported_at: float
    ended: set[int] = field(default_factory=set)  # request_idxs of outcomes that arrived after this report
    granted: dict[int, tuple[float, float]] = field(default_factory=dict)  # (cost, at) by request_idx, not reported yet
    perf: float = 0.0  # what the engine takes it to be worth: max_perf, unless it was downgraded

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
    """Routes requests to the workers that have reported.

    `engine`: "strict" follows what Vast documents. "may-2026" does what Vast's own null worker saw then: a worker that
    reports load and a cur_perf of 0 is downgraded with each report, until it reports some.
    """

    parameters: Parameters
    engine: str = "strict"
    workers: dict[int | str, ReportedWorker] = field(default_factory=dict)
    retired: set[int | str] = field(default_factory=set)  # ids of workers that get no more requests
    stopped: set[int | str] = field(default_factory=set)  # ids of those whose machine is stopped, and still listed

    def report(self, status: Mapping[str, Any], now: float) -> None:
        """Process a worker_status. Grants that it lists are now part of its reported load."""
        before = self.workers.get(status["id"])
        shown = set(status["working_request_idxs"])
        granted = {} if before is None else {i: grant for i, grant in before.granted.items() if i not in shown}
        perf = status["max_perf"]
        if self.engine == "may-2026" and before is not None and status["cur_load"] and not status["cur_perf"]:
            perf = min(perf, before.perf) * DOWNGRADE
        self.workers[status["id"]] = ReportedWorker(status, now, granted=granted, perf=perf)

    def end(self, worker_id: int | str, request_idx: int) -> None:
        """Process an outcome: its request is no load any more, whatever the last report says."""
        if worker := self.workers.get(worker_id):
            worker.ended.add(request_idx)
            worker.granted.pop(request_idx, None)

    def grant(self, request_idx: int, cost: float, now: float) -> str | None:
        """The url of the least loaded worker that may take `cost`, which is added to its load; None if there is none.

        A request that asks again has not used its earlier grant, which is dropped.
        """
        for worker in self.workers.values():
            worker.granted.pop(request_idx, None)
        able = [worker for worker in self.ready(now) if self._takes(worker, cost, now)]
        if not able:
            return None
        best = min(able, key=lambda worker: worker.load(now))
        best.granted[request_idx] = (cost, now)
        return str(best.status["url"])

    def ready(self, now: float) -> list[ReportedWorker]:
        """The workers that are ready, have reported within FRESH_SECONDS and are not retired, busy or not."""
        return [
            worker
            for number, worker in self.workers.items()
            if worker.ready and now < worker.reported_at + FRESH_SECONDS and number not in self.retired
        ]

    def _takes(self, worker: ReportedWorker, cost: float, now: float) -> bool:
        load = worker.load(now)
        return load == 0 or (load + cost) / worker.status["max_perf"] <= self.parameters.max_queue_time
