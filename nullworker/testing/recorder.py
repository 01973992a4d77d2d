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
    """One call. `at`: epoch seconds; `accepted`: False when a fault or a check refused it."""

    at: float
    call: str
    payload: Json
    accepted: bool


class Totals(NamedTuple):
    """Sums over all accepted worker_status reports: workload received, rejected and served."""

    new_load: float
    rej_load: float
    cur_perf: float


class Recorder:
    """Keeps calls and accepted messages, the latter with `received_at` (epoch seconds) added.

    Attributes:
        seen: every call, accepted or not.
        statuses: accepted worker_status reports.
        batches: accepted delete_requests.
        outcomes: the entries of the batches, each with its `worker_id`.
    """

    def __init__(self, record: TextIO | None = None) -> None:
        self.seen: list[Seen] = []
        self.statuses: list[Json] = []
        self.batches: list[Json] = []
        self.outcomes: list[Json] = []
        self._record = record
        self._wakers: set[asyncio.Future[None]] = set()

    async def wait_for(self, predicate: Callable[[], T], timeout: float = 5.0) -> T:
        """Return the value of `predicate()` once it is true; it is called now and after each call that arrives.

        Raises:
            TimeoutError: it was not true within `timeout` seconds; the message says what has arrived.
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
        """The accepted outcomes of one request, oldest first; several if a worker had to repeat it."""
        return [outcome for outcome in self.outcomes if outcome["request_idx"] == request_idx]

    def totals(self) -> Totals:
        """Sums over the accepted reports. A report repeated after a "late" answer counts twice, as at Vast."""
        return Totals(*(sum(status.get(name, 0) for status in self.statuses) for name in Totals._fields))

    def take_status(self, status: Json, at: float) -> None:
        """Keep an accepted worker_status."""
        self.statuses.append({**status, "received_at": at})

    def take_batch(self, batch: Json, at: float) -> None:
        """Keep an accepted delete_requests, whole and entry by entry."""
        self.batches.append({**batch, "received_at": at})
        known = {"worker_id": batch["worker_id"], "received_at": at}
        self.outcomes.extend({**outcome, **known} for outcome in batch["requests"])

    def note(self, seen: Seen) -> None:
        """Keep a call and wake `wait_for`. An accepted message is in the record file before it is answered."""
        self.seen.append(seen)
        if self._record is not None and seen.accepted and seen.payload:
            self._record.write(json.dumps({"at": seen.at, "call": seen.call, "payload": seen.payload}) + "\n")
            self._record.flush()
        for waker in self._wakers:
            if not waker.done():
                waker.set_result(None)
