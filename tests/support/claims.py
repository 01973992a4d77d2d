"""Claims under way: each a signed POST /reserve in its own task, identified by its request_idx on both sides."""

from __future__ import annotations

import asyncio
from typing import Any

from harness import PATIENCE, Answer, WorkerProcess, post, signed

from nullworker.testing import FakeAutoscaler


class Claim:
    """One POST /reserve. Attributes: `idx`, its request_idx; `id`, its reservation, once `reserve` has returned."""

    def __init__(self, worker: WorkerProcess, vast: FakeAutoscaler, body: dict[str, Any]) -> None:
        self.idx: int = body["auth_data"]["request_idx"]
        self.id = ""
        self._worker, self._vast = worker, vast
        self._task = asyncio.ensure_future(post(worker.url + "/reserve", body))

    async def queued(self) -> Claim:
        """Wait until it is in the log."""
        line = await self._worker.line("reservation_queued", where=lambda line: line["request_idx"] == self.idx)
        self.id = line["reservation_id"]
        return self

    async def held(self) -> Claim:
        """Wait until it has the slot."""
        await self._worker.line("reservation_held", where=lambda line: line["reservation_id"] == self.id)
        return self

    async def answer(self) -> Answer:
        """Wait for the worker's answer."""
        return await asyncio.wait_for(self._task, PATIENCE)

    async def hang_up(self) -> None:
        """Close its connection, and wait until the worker has seen it."""
        self._task.cancel()
        await self._worker.line("reservation_cancelled", where=lambda line: line["reservation_id"] == self.id)

    async def outcome(self) -> str:
        """Wait until the stand-in has heard how it ended. It may hear that more than once, but always the same."""
        outcomes = await self._vast.wait_for(lambda: self._vast.outcomes_of(self.idx))
        (status,) = {outcome["status"] for outcome in outcomes}
        return str(status)


async def reserve(worker: WorkerProcess, vast: FakeAutoscaler, **payload: Any) -> Claim:
    """A claim that is in the log: held, queued, or refused."""
    return await Claim(worker, vast, signed(vast, worker.url, payload)).queued()


def data_of(stream: str) -> list[str]:
    """The `data:` of each event of a text/event-stream."""
    return [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
