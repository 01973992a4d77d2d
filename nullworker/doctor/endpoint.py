"""Checks an endpoint for `nullworker doctor --endpoint NAME`: scaling parameters and workers, through the vastai SDK.

An endpoint's defaults suit workers that take many requests at once. Here a worker is one reservation. The arithmetic is
in docs/deploying.md. `judge` is pure; each of its findings has the command that fixes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nullworker.client.hold import STAND_IN_KEY
from nullworker.client.vastai_sdk import Patience, connect
from nullworker.client.worker_http import HoldError
from nullworker.doctor.finding import Finding, failed, ok, warning

#: Seconds for the autoscaler's answers.
ANSWER_SECONDS: Final = 30.0
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
        async with connect(name, api_key or STAND_IN_KEY, autoscaler, patience) as found:
            config, number = vars(found.sdk.data.config), int(found.sdk.id)
            workers = [(each.id, each.status, float(each.perf)) for each in await patience.within(found.workers())]
    except HoldError as error:
        fix = "see what there is with: vastai show endpoints; for the client: pip install 'nullworker[client]'"
        return [failed("endpoint", str(error), why="its parameters cannot be looked at", fix=fix)]
    return list(judge(config, number, workers, cost=cost))


def judge(
    config: Mapping[str, Any], number: int, workers: Sequence[tuple[int, str, float]], *, cost: float
) -> Iterator[Finding]:
    """The findings. `workers`: id, status, max_perf; `cost`: what clients send with a request."""
    values = {name: default if config.get(name) is None else config[name] for name, default in DEFAULTS.items()}

    def update(name: str, value: float) -> str:
        return f"vastai update endpoint {number} --{name} {value:g}"

    if values["target_util"] != 1:
        yield failed(
            "target_util",
            f"target_util is {values['target_util']:g}",
            why=f"one reservation of {cost:g} asks for {cost / values['target_util']:.0f} of load, and workers are "
            "whole: that is a second one",
            fix=update("target_util", 1.0),
        )
    else:
        yield ok("target_util", "1")
    if values["max_queue_time"] > 1:
        yield failed(
            "max_queue_time",
            f"max_queue_time is {values['max_queue_time']:g} s",
            why="a worker that is held counts as 1 s of queue whatever its hold will take, so up to "
            f"{values['max_queue_time']:g} requests are sent to wait behind it",
            fix=update("max_queue_time", 1),
        )
    else:
        yield ok("max_queue_time", f"{values['max_queue_time']:g} s")
    if values["target_queue_time"] >= 1:
        yield failed(
            "target_queue_time",
            f"target_queue_time is {values['target_queue_time']:g} s",
            why="workers that are all held count as 1 s of queue: above that, further ones are started late or never",
            fix=update("target_queue_time", 0.5),
        )
    else:
        yield ok("target_queue_time", f"{values['target_queue_time']:g} s")
    if values["min_load"] % cost:
        up = (values["min_load"] // cost + 1) * cost
        yield failed(
            "min_load",
            f"min_load is {values['min_load']:g}",
            why=f"workers are whole: it is no multiple of {cost:g}, the load of one reservation",
            fix=f"{update('min_load', up)}  ({up / cost:.0f} always ready)",
        )
    else:
        yield ok("min_load", f"{values['min_load']:g}: {values['min_load'] / cost:.0f} always ready")
    yield from _judge_rest(config, values, number, update)
    yield from _judge_workers(workers, number, cost)


def _judge_rest(config: Mapping[str, Any], values: Mapping[str, float], number: int, update: Any) -> Iterator[Finding]:
    inactivity = config.get("inactivity_timeout")
    if inactivity is None or inactivity < 0:
        yield warning(
            "inactivity_timeout",
            "inactivity_timeout is not set" if inactivity is None else f"inactivity_timeout is {inactivity:g}",
            why="the endpoint is not told when it may go to zero" if inactivity is None else "it never goes to zero",
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
            why="they start faster than new ones, and their storage is billed for as long as they are kept",
            fix=f"{update('cold_workers', 0)}  (if slow starts are worth less than that)",
        )
    state = config.get("endpoint_state")
    if state not in (None, "active"):
        yield failed(
            "endpoint_state",
            f"the endpoint is {state}",
            why="it takes no requests",
            fix=f"vastai update endpoint {number} --endpoint_state active",
        )


def _judge_workers(workers: Sequence[tuple[int, str, float]], number: int, cost: float) -> Iterator[Finding]:
    for worker, status, perf in workers:
        if status == "ERROR":
            yield failed(
                "workers",
                f"worker {worker} is errored",
                why="it takes no requests until it is well again or replaced",
                fix=f"vastai get endpt-logs {number}; on the instance: curl -s http://127.0.0.1:18999/readyz",
            )
        elif perf and perf != cost:
            yield failed(
                "cost",
                f"worker {worker} reports max_perf {perf:g}, and clients send cost={cost:g}",
                why="one request must be worth one worker: else too many or too few are started",
                fix=f"NULL_MAX_PERF={cost:g} in the template's environment, or cost={perf:g} in every request",
            )
        else:
            yield ok("workers", f"worker {worker} is {status}")
