"""Checks an endpoint for `nullworker doctor --endpoint NAME`: scaling parameters and workers, through the vastai SDK.

An endpoint's defaults suit workers that take many requests at once. Here a worker is one reservation. The arithmetic is
in docs/deploying.md. `judge` is pure; each of its findings has the command that fixes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from nullworker.client.vastai_sdk import STAND_IN_KEY, Patience, connect
from nullworker.client.worker_http import HoldError
from nullworker.doctor.finding import Finding, failed, ok, warning

#: Seconds for the autoscaler's answers.
ANSWER_SECONDS: Final = 30.0
#: States of a worker whose machine does not run.
INACTIVE: Final = frozenset(("ERROR", "STOPPED", "INACTIVE", "UNKNOWN"))
#: Vast's values for parameters that are not set (vastai 1.9.1, `vastai update endpoint --help`).
DEFAULTS: Final[Mapping[str, float]] = {
    "target_util": 0.9,
    "max_queue_time": 30.0,
    "target_queue_time": 10.0,
    "min_load": 0.0,
    "max_workers": 20,
    "cold_workers": 5,
}


async def look_at_endpoint(name: str, *, cost: float, autoscaler: str | None, api_key: str | None) -> list[Finding]:
    """All findings about the endpoint of that name."""
    patience = Patience(lambda line: None, ANSWER_SECONDS)
    try:
        async with connect(name, api_key or STAND_IN_KEY, autoscaler, patience) as vast:
            config, number = vars(vast.sdk.data.config), int(vast.sdk.id)
            workers = [
                EndpointWorker(
                    worker.id, worker.status, worker.perf, worker.measured_perf, worker.cur_perf, worker.reqs_working
                )
                for worker in await patience.within(vast.workers())
            ]
    except HoldError as error:
        fix = "see what there is with: vastai show endpoints; for the client: pip install 'nullworker[client]'"
        return [failed("endpoint", str(error), why="its parameters cannot be checked", fix=fix)]
    return list(judge(config, number, workers, cost=cost))


class EndpointWorker(NamedTuple):
    """A worker as the engine sees it (vastai 1.9.1, client/worker.py)."""

    id: int
    status: str
    perf: float  # what the engine takes it to be worth: max_perf, unless it was downgraded
    measured_perf: float = 0.0
    cur_perf: float = 0.0  # of its last report
    reqs_working: int = 0  # requests and sessions that it has

    @property
    def figures(self) -> str:
        """The figures of the engine for this worker."""
        return f"perf {self.perf:g}, measured_perf {self.measured_perf:g}, cur_perf {self.cur_perf:g}"


def judge(
    config: Mapping[str, Any], number: int, workers: Sequence[EndpointWorker], *, cost: float
) -> Iterator[Finding]:
    """The findings. `cost`: the load that clients send with a request."""
    values = {name: default if config.get(name) is None else config[name] for name, default in DEFAULTS.items()}

    def update(name: str, value: float) -> str:
        return f"vastai update endpoint {number} --{name} {value:g}"

    if values["target_util"] != 1:
        yield failed(
            "target_util",
            f"target_util is {values['target_util']:g}",
            why=f"one reservation of {cost:g} requests capacity for {cost / values['target_util']:.0f}, and workers "
            "are whole: that is a second one",
            fix=update("target_util", 1.0),
        )
    else:
        yield ok("target_util", "1")
    if values["max_queue_time"] > 1:
        yield failed(
            "max_queue_time",
            f"max_queue_time is {values['max_queue_time']:g} s",
            why="a held worker counts as 1 s of queue, however long its hold lasts, so up to "
            f"{values['max_queue_time']:g} requests are sent to wait behind it",
            fix=update("max_queue_time", 1),
        )
    else:
        yield ok("max_queue_time", f"{values['max_queue_time']:g} s")
    if values["target_queue_time"] >= 1:
        yield failed(
            "target_queue_time",
            f"target_queue_time is {values['target_queue_time']:g} s",
            why="if all workers are held, they count as 1 s of queue: above that, others are started late or never",
            fix=update("target_queue_time", 0.5),
        )
    else:
        yield ok("target_queue_time", f"{values['target_queue_time']:g} s")
    if values["min_load"] % cost:
        up = (values["min_load"] // cost + 1) * cost
        yield failed(
            "min_load",
            f"min_load is {values['min_load']:g}",
            why=f"workers are whole: it is not a multiple of {cost:g}, the load of one reservation",
            fix=f"{update('min_load', up)}  ({up / cost:.0f} always ready)",
        )
    else:
        yield ok("min_load", f"{values['min_load']:g}: {values['min_load'] / cost:.0f} always ready")
    yield from _judge_rest(config, values, number, update)
    yield from _judge_workers(workers, number, cost)
    yield from _judge_growth(workers, values["max_workers"], number, cost)


def _judge_rest(config: Mapping[str, Any], values: Mapping[str, float], number: int, update: Any) -> Iterator[Finding]:
    inactivity = config.get("inactivity_timeout")
    if inactivity is None or inactivity < 0:
        yield warning(
            "inactivity_timeout",
            "inactivity_timeout is not set" if inactivity is None else f"inactivity_timeout is {inactivity:g}",
            why="it is not defined when the endpoint scales to zero"
            if inactivity is None
            else "it never scales to zero",
            fix=update("inactivity_timeout", 10),
        )
    else:
        yield ok("inactivity_timeout", f"{inactivity:g} s")
    if values["max_workers"] < 1:
        why = "no worker is ever started"
        yield failed("max_workers", "max_workers is 0", why=why, fix=update("max_workers", 1))
    else:
        yield ok("max_workers", f"{values['max_workers']:g}")
    if values["cold_workers"]:
        yield warning(
            "cold_workers",
            f"{values['cold_workers']:g} stopped workers are kept",
            why="they start faster than new ones, and their storage is billed while they are kept",
            fix=f"{update('cold_workers', 0)}  (if slower starts are acceptable)",
        )
    if config.get("auto_delete_in_seconds") is not None or config.get("auto_delete_due_24h"):
        seconds = config.get("auto_delete_in_seconds")
        yield warning(
            "auto_delete",
            "Vast will delete this endpoint" + ("" if seconds is None else f" in {seconds:g} s"),
            why="auto_delete_in_seconds or auto_delete_due_24h is set; Vast documents neither",
            fix="use it, and check again; ask Vast's support if it stays",
        )
    state = config.get("endpoint_state")
    if state not in (None, "active"):
        yield failed(
            "endpoint_state",
            f"the endpoint is {state}",
            why="it takes no requests",
            fix=f"vastai update endpoint {number} --endpoint_state active",
        )


def _judge_workers(workers: Sequence[EndpointWorker], number: int, cost: float) -> Iterator[Finding]:
    for worker in workers:
        name, status, perf = f"worker {worker.id}", worker.status, worker.perf
        if status == "ERROR":
            yield failed(
                "workers",
                f"{name} is errored",
                why="it takes no requests until it recovers or is replaced",
                fix=f"vastai get endpt-logs {number}; on the instance: curl -s http://127.0.0.1:18999/readyz",
            )
        elif worker.reqs_working and perf < cost and worker.measured_perf in (0, cost):
            yield failed(
                "perf",
                f"{name} is held and downgraded: {worker.figures}",
                why="while it is held it reports cur_perf 0, so the engine takes it for one that does not perform, "
                "and starts others late, as Vast's own null worker saw in May 2026",
                fix="NULL_REPORT_PERF=held in the template's environment",
            )
        elif perf and perf != cost:
            yield failed(
                "cost",
                f"{name} reports max_perf {perf:g}, and clients send cost={cost:g}",
                why="one request must be the load of one worker; otherwise too many or too few are started",
                fix=f"NULL_MAX_PERF={cost:g} in the template's environment, or cost={perf:g} in every request",
            )
        else:
            held = f", {worker.reqs_working} at work" if worker.reqs_working else ""
            yield ok("workers", f"{name} is {status}{held}; {worker.figures}")


def _judge_growth(workers: Sequence[EndpointWorker], most: float, number: int, cost: float) -> Iterator[Finding]:
    """Whether claims may wait for ever: the engine may take a load of exactly 100 % for on target."""
    active = [worker for worker in workers if worker.status not in INACTIVE and not _starts(worker)]
    if len(active) < 2 or any(_starts(worker) for worker in workers) or len(active) >= most:
        return
    if all(worker.reqs_working for worker in active):
        yield warning(
            "growth",
            f"all {len(active)} workers are held, max_workers is {most:g}, and nothing starts",
            why="a claim that waits now waits for a release: with all workers held and cost equal to max_perf, the "
            "engine was seen to take that for on target, from the second worker on",
            fix=f"vastai update endpoint {number} --min_load {(len(active) + 1) * cost:g}; or send cost={2 * cost:g}",
        )


def _starts(worker: EndpointWorker) -> bool:
    return any(word in worker.status.upper() for word in ("LOAD", "CREAT", "START"))
