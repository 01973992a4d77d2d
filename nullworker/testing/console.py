"""The terminal output of the fake autoscaler: one line for each event, without keys, tokens or signatures. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from nullworker.testing import payloads

TIMES = ("entered_queue_at", "work_started_at", "work_completed_at")  # epoch seconds; 0: did not happen


def lines(call: str, payload: Mapping[str, Any], accepted: bool, how: str | int | None) -> Iterator[str]:
    """The lines for one call; `how` is its fault, if any."""
    if how is not None:
        yield f"{call:<16} answered with a fault: {how} ({'accepted' if accepted else 'not accepted'})"
    elif not accepted:
        yield f"{call:<16} refused"
    elif call == "pubkey":
        yield f"{call:<16} a worker fetched the key"
    if accepted and call == "worker_status":
        yield f"{call:<16} {status(payload)}"
    elif accepted and call == "delete_requests":
        for outcome in payload["requests"]:
            yield f"{call:<16} worker {payload['worker_id']}: {ending(outcome)}"


def status(payload: Mapping[str, Any]) -> str:
    """The line for a worker_status."""
    payload = {**payloads.SILENT, **payload}
    state = payload["error_msg"] or ("ready" if payload["max_perf"] else "starting")
    return (
        f"worker {payload['id']}: {state}, load {payload['cur_load']:g} of {payload['max_perf']:g} "
        f"(new {payload['new_load']:g}, rejected {payload['rej_load']:g}, served {payload['cur_perf']:g})"
    )


def ending(outcome: Mapping[str, Any]) -> str:
    """The line for one outcome of a delete_requests."""
    line = f"request {outcome['request_idx']} {outcome.get('status')}"
    queued, started, ended = (outcome.get(name, 0) for name in TIMES)
    if queued and started:
        line += f", queued {started - queued:.1f} s"
    if started and ended:
        line += f", held {ended - started:.1f} s"
    return line
