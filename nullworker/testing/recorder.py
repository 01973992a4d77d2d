"""Records the calls to the fake autoscaler, for tests: lists, sums, a record file, and waiting for calls to come.

`seen` has every call; `statuses`, `batches` and `outcomes` only those that were accepted. Nothing is ever dropped.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO, TypeVar

T = TypeVar("T")
Json = dict[str, Any]


class Seen(NamedTuple):
    """One call as it came in. `at`: epoch seconds; `accepted`: False when a fault or a check refused it."""

    at: float
    call: str
    payload: Json
    accepted: bool


class Totals(NamedTuple):
    """Workload over all accepted worker_status reports: what the worker says it received, refused and served."""

    new_load: float
    rej_load: float
    cur_perf: float


class Recorder:
    """Accepted messages are kept as they came, with `received_at` (epoch seconds) added.

    `statuses`: the worker_status reports; `batches`: the delete_requests; `outcomes`: the entries of those, flat, each
    with its `worker_id`.
    """

    def __init__(self, record: TextIO | None = None) -> None:
        self.seen: list[Seen] = []
        self.statuses: list[Json] = []
        self.batches: list[Json] = []
        self.outcomes: list[Json] = []
        self._record = record
        self._wakers: set[asyncio.Future[None]] = set()

    async def wait_for(self, predicate: Callable[[], T], timeout: float = 5.0) -> T:
        """What `predicate()` gives as soon as that is true; it is asked now and after each arrival, never in between.

        Raises TimeoutError, with what has been seen, after `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not (value := predicate()):
            waker = loop.create_future()
            self._wakers.add(waker)
            done, _ = await asyncio.wait({waker}, timeout=deadline - loop.time())
            self._wakers.discard(waker)
            if not done:
                last = "; last: " + str(self.seen[-1]) if self.seen else ""
                raise TimeoutError(
                    f"not within {timeout} s; {len(self.seen)} calls seen, {len(self.statuses)} statuses and "
                    f"{len(self.outcomes)} outcomes accepted{last}"
                )
        return value

    def outcomes_of(self, request_idx: int) -> list[Json]:
        """The delivered outcomes of one request, oldest first: more than one when a worker had to say it again."""
        return [outcome for outcome in self.outcomes if outcome["request_idx"] == request_idx]

    def totals(self) -> Totals:
        """Sums over the accepted reports; a report that was answered "late" and sent again counts twice, as at Vast."""
        return Totals(*(sum(status.get(name, 0) for status in self.statuses) for name in Totals._fields))

    def take_status(self, status: Json, at: float) -> None:
        """Keeps an accepted worker_status."""
        self.statuses.append({**status, "received_at": at})

    def take_batch(self, batch: Json, at: float) -> None:
        """Keeps an accepted delete_requests, whole and entry by entry."""
        self.batches.append({**batch, "received_at": at})
        known = {"worker_id": batch["worker_id"], "received_at": at}
        self.outcomes.extend({**outcome, **known} for outcome in batch["requests"])

    def note(self, seen: Seen) -> None:
        """Keeps any call, and wakes who waits. An accepted message is in the record file before it is answered."""
        self.seen.append(seen)
        if self._record is not None and seen.accepted and seen.payload:
            self._record.write(json.dumps({"at": seen.at, "call": seen.call, "payload": seen.payload}) + "\n")
            self._record.flush()
        for waker in self._wakers:
            if not waker.done():
                waker.set_result(None)
