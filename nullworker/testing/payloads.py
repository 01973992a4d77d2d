"""Messages that the fake autoscaler accepts and returns, field by field, as vastai 1.9.1 sends and parses them. Pure.

A figure that is not known here is 0, never invented.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from nullworker.testing.routing import Parameters, ReportedWorker

ENDPOINT_ID = 1
DOLLARS_AN_HOUR = 0.4  # of every worker: so that what a job cost can be shown
NUMBER = (int, float)

Kinds = Mapping[str, type | tuple[type, ...]]

# Required fields. A worker_status (server/lib/data_types.py, WorkerStatusData) may have only these: Vast's
# start_server.sh sends no others when a start fails.
STATUS: Kinds = {"id": (int, str), "mtoken": str, "url": str, "error_msg": str}
BATCH: Kinds = {"worker_id": (int, str), "mtoken": str, "requests": list}
ROUTE: Kinds = {"endpoint": str, "api_key": str, "cost": NUMBER, "request_idx": int}

# Fields of a worker_status that routing uses, and their defaults.
LOADS = ("max_perf", "cur_load", "new_load", "rej_load", "cur_perf")
SILENT: Mapping[str, Any] = {**dict.fromkeys(LOADS, 0), "working_request_idxs": []}
REPORT: Kinds = {**dict.fromkeys(LOADS, NUMBER), "working_request_idxs": list}


def wrong(message: Mapping[str, Any], kinds: Kinds) -> str | None:
    """The name of the first field that is missing or of the wrong type, or None."""
    return next((name for name, kind in kinds.items() if not isinstance(message.get(name), kind)), None)


def endpoint_key(name: str) -> str:
    """The API key of the endpoint, which clients get from /api/v0/endptjobs/. It is not the account's."""
    return f"key-of-{name}"


def endpoint(name: str, parameters: Parameters, created_at: float) -> dict[str, Any]:
    """An entry of GET /api/v0/endptjobs/ (data/endpoint.py, EndpointData.from_dict)."""
    return {
        "id": ENDPOINT_ID,
        "endpoint_name": name,
        "api_key": endpoint_key(name),
        "user_id": 1,
        "created_at": created_at,
        "auto_delete_in_seconds": None,
        "auto_delete_due_24h": False,
        "endpoint_state": "active",
        **asdict(parameters),
    }


def worker(reported: ReportedWorker, now: float, *, stopped: bool = False) -> dict[str, Any]:
    """An entry of POST /get_endpoint_workers/ (client/worker.py, Worker.from_dict; states as in docs.vast.ai)."""
    status = reported.status
    state = "ERROR" if status["error_msg"] else "IDLE" if reported.ready else "MODEL_LOADING"
    state = "STOPPED" if stopped else state
    return {
        "id": status["id"],
        "status": state,
        "cur_load": reported.load(now),
        "new_load": status["new_load"],
        "cur_load_rolling_avg": 0.0,
        "cur_perf": status["cur_perf"],
        "perf": reported.perf,
        "measured_perf": status["max_perf"],
        "dlperf": 0.0,
        "reliability": 1.0,
        "reqs_working": len(status["working_request_idxs"]),
        "disk_usage": status.get("disk_usage", 0.0),
        "loaded_at": 0.0,
        "started_at": 0.0,
    }


def instance(machine: ReportedWorker) -> dict[str, Any]:
    """An entry of GET /api/v1/instances/ (api/instances.py), with the fields that tell a worker's url and its price."""
    parts = urlsplit(machine.status["url"])
    return {
        "id": machine.status["id"],
        "actual_status": "running",
        "public_ipaddr": parts.hostname,
        "ports": {"3000/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(parts.port)}]},  # noqa: S104  # as docker tells
        "dph_total": DOLLARS_AN_HOUR,
    }
