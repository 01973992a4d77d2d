"""The messages to the autoscaler: `worker_status` and `delete_requests`. Pure: no I/O, no clock.

Every field was read in the source of vastai 1.9.1 (server/lib/backend.py, metrics.py, data_types.py) and checked on the
wire of its own worker. Figures "since the last report" are reset only when a report was delivered. Only authenticated
requests are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from nullworker.eventlog.queries import Finished
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import Outcome, ending

#: The protocol version of the SDK's own worker (server/lib/backend.py, VERSION).
PROTOCOL_VERSION: Final = "1.1.0"
STATUS_PATH: Final = "/worker_status/"
OUTCOMES_PATH: Final = "/delete_requests/"
KEY_PATH: Final = "/pubkey/"
#: Decimals of a load; sums of floats have rounding errors.
LOAD_DIGITS: Final = 6

#: The SDK reports a cancelled request as a success (server/lib/metrics.py, _request_canceled).
_SUCCESS: Final[dict[Outcome, bool]] = {"Success": True, "Cancelled": True, "Rejected": False, "Error": False}


def outcome_of(reservation: Reservation) -> Outcome | None:
    """The outcome that is reported for an ended reservation; None for a duplicate, which has another one's number."""
    return ending(reservation.state, reservation.reason, was_held=reservation.held_at is not None).outcome


def workload(cost: float | None, perf: float) -> float:
    """The load of one reservation: a session's is the cost of its grant, as with the SDK; a request's is max_perf."""
    return perf if cost is None else cost


@dataclass
class Load:
    """The load of reservations since the last delivered report, in the unit of `cost`.

    A claim that is refused at once counts as `rejected` only, not as `received`, as in the SDK's worker.
    """

    received: float = 0.0
    cancelled: float = 0.0
    rejected: float = 0.0
    served: float = 0.0

    def begun(self, load: float) -> None:
        """A claim was made."""
        self.received += load

    def ended(self, outcome: Outcome | None, load: float, *, at_once: bool) -> None:
        """A reservation has ended; `at_once`: in the commit that made it."""
        if outcome is None:
            self.received -= load
        elif outcome == "Success":
            self.served += load
        elif outcome == "Cancelled":
            self.cancelled += load
        elif outcome == "Rejected":
            self.rejected += load
            if at_once:
                self.received -= load
        # "Error" is not counted: the SDK's worker has it in `workload_errored`, which it does not report

    def copy(self) -> Load:
        """A copy of the counts, for a report."""
        return Load(self.received, self.cancelled, self.rejected, self.served)

    def set_back(self, delivered: Load) -> None:
        """Subtract the counts of a delivered report; later ones stay."""
        self.received -= delivered.received
        self.cancelled -= delivered.cancelled
        self.rejected -= delivered.rejected
        self.served -= delivered.served


class HeldTime:
    """Seconds in which a reservation was held, since the last delivered report. Times are epoch seconds."""

    def __init__(self, held_since: float | None) -> None:
        self._since = held_since
        self._before = 0.0  # of the holds that have ended
        self._delivered = 0.0

    def held(self, at: float) -> None:
        """A hold has begun."""
        self._since = at

    def ended(self, at: float) -> None:
        """It has ended."""
        if self._since is not None:
            self._before += at - self._since
        self._since = None

    def total(self, now: float) -> float:
        """Seconds held up to now, delivered ones included."""
        return self._before + (0.0 if self._since is None else now - self._since)

    def undelivered(self, total: float) -> float:
        """The part of a total that has not been reported yet."""
        return total - self._delivered

    def delivered(self, total: float) -> None:
        """A report up to this total has arrived."""
        self._delivered = total


@dataclass(frozen=True)
class Identity:
    """The reporting worker. `perf` is its max_perf and the workload of one request."""

    worker_id: int
    mtoken: str
    url: str
    perf: float

    def __repr__(self) -> str:
        return f"Identity(worker_id={self.worker_id}, url={self.url!r})"


def worker_status(
    identity: Identity,
    *,
    load: Load,
    served: float,
    live: Iterable[Reservation],
    requests_received: int,
    load_seconds: float | None,
    error_msg: str,
    disk_gb: float,
    disk_added_gb: float,
) -> dict[str, Any]:
    """The body of POST /worker_status/ (server/lib/data_types.py, WorkerStatusData; the spelling is theirs).

    `load_seconds`: how long it took to be ready; None: it is not yet.
    """
    working = list(live)
    return {
        "id": identity.worker_id,
        "mtoken": identity.mtoken,
        "version": PROTOCOL_VERSION,
        "loadtime": load_seconds or 0.0,
        "cur_load": round(sum(workload(r.terms.cost, identity.perf) for r in working), LOAD_DIGITS),
        "rej_load": round(load.rejected, LOAD_DIGITS),
        "new_load": round(max(load.received - load.cancelled, 0), LOAD_DIGITS),
        "error_msg": error_msg,
        "max_perf": 0.0 if load_seconds is None else identity.perf,
        "cur_perf": round(served, LOAD_DIGITS),
        "cur_capacity": 0,
        "max_capacity": 0,
        "num_requests_working": len(working),
        "num_requests_recieved": requests_received,
        "additional_disk_usage": disk_added_gb,
        "disk_usage": disk_gb,
        "working_request_idxs": [r.terms.request_idx for r in working if r.terms.request_idx is not None],
        "url": identity.url,
    }


def failed_start(identity: Identity, error_msg: str) -> dict[str, Any]:
    """The body of a /worker_status/ that says why the worker cannot start."""
    return worker_status(
        identity,
        load=Load(),
        served=0.0,
        live=(),
        requests_received=0,
        load_seconds=None,
        error_msg=error_msg,
        disk_gb=0.0,
        disk_added_gb=0.0,
    )


def delete_requests(identity: Identity, finished: Iterable[Finished]) -> dict[str, Any]:
    """The body of POST /delete_requests/ (server/lib/metrics.py). 0 for a time that did not occur."""
    return {
        "worker_id": identity.worker_id,
        "mtoken": identity.mtoken,
        "requests": [
            {
                "request_idx": end.request_idx,
                "success": _SUCCESS[end.outcome],
                "status": end.outcome,
                "entered_queue_at": end.queued_at,
                "work_started_at": end.held_at or 0,
                "work_completed_at": end.ended_at if end.outcome == "Success" else 0,
            }
            for end in finished
            if end.outcome is not None
        ],
    }
