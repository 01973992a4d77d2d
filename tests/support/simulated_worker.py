"""A worker as its consumer sees it, without sockets: for tests in simulated time."""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from nullworker.clock import iso
from nullworker.consumer import Reservation, reservations
from nullworker.consumer.control_port import AsyncControlClient
from nullworker.consumer.liveness import Attachment
from nullworker.errors import WorkerUnreachable
from stress.simulated_world import BEGINNING

#: The module: `nullworker.consumer.reservations` itself is the function of that name.
reservations_module = importlib.import_module("nullworker.consumer.reservations")

#: Where its control port would be.
URL = "http://127.0.0.1:18999"
#: The result of what was released without one.
NO_RESULT = "there is no result"


class SimulatedWorker:
    """Holds one reservation at a time, for whoever calls `reservations()` in this process.

    Attributes:
        held: the reservation that is held, as GET /reservation shows it; None: none.
        ended: those that have ended, by their ids.
        silent: nobody answers.
        lost_answers: so many releases are made, but their answers do not arrive.
        refuses_results: each release with a result is answered with 422.
        attachment: what a new liveness connection becomes.
        max_hold: what such a connection says about NULL_MAX_HOLD_SECONDS.
        connections: all of them, the newest last.
        asked: method and path of each request, and when it came.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, Any] | None = None
        self.ended: dict[str, dict[str, Any]] = {}
        self.silent = False
        self.lost_answers = 0
        self.refuses_results = False
        self.attachment: Attachment = "attached"
        self.max_hold: float | None = None
        self.connections: list[Connection] = []
        self.asked: list[tuple[str, float]] = []
        self._begun = 0.0
        self._ends: dict[str, asyncio.Event] = {}
        monkeypatch.setattr(reservations_module, "AsyncControlClient", functools.partial(_Client, self))
        monkeypatch.setattr(reservations_module, "LivenessConnection", functools.partial(Connection, self))

    def hold(self, reservation_id: str, *, seconds: float = 600.0, **fields: Any) -> None:
        """Hold a session from now on; `fields` go over those of its JSON."""
        assert self.held is None
        self._begun = now()
        begun, ends_at = (iso(BEGINNING + at) for at in (self._begun, self._begun + seconds))
        row = {"id": reservation_id, "kind": "session", "state": "held", "reason": None, "metadata": None}
        self.held = {**row, "held_at": begun, "ends_at": ends_at, "held_seconds": 0.0, "result": None, **fields}

    def end(self, state: str, reason: str, result: Any = None) -> None:
        """End what is held."""
        assert self.held is not None
        self.ended[self.held["id"]] = {**self.held, "state": state, "reason": reason, "result": result}
        self._ends.setdefault(self.held["id"], asyncio.Event()).set()
        self.held = None
        self.connections[-1].changed()

    async def end_of(self, reservation_id: str) -> dict[str, Any]:
        """Wait for the end of a reservation; its JSON."""
        await self._ends.setdefault(reservation_id, asyncio.Event()).wait()
        return self.ended[reservation_id]

    def times(self, request: str) -> list[float]:
        """When requests came that begin with this."""
        return [at for asked, at in self.asked if asked.startswith(request)]

    async def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """What its control port would answer."""
        self.asked.append((f"{method} {path}", now()))
        address = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path == "/reservation":
            until = now() + float(query["wait"])
            while not self.silent and self.held is None and now() < until:  # noqa: ASYNC110  # simulated time
                await asyncio.sleep(0.1)
        if self.silent:
            raise WorkerUnreachable("no worker answers on the simulated machine")
        if address.path == "/reservation":
            row = self.held and {**self.held, "held_seconds": now() - self._begun}
            return (204, None) if row is None else (200, row)
        if address.path == "/reservations":
            rows = [row for row in (self.held, self.ended.get(query["id"])) if row and row["id"] == query["id"]]
            return 200, {"reservations": rows}
        if address.path == "/release":
            return self._release(body)
        assert address.path == "/extend", path
        return self._extend(body)

    def _release(self, body: Any) -> tuple[int, Any]:
        if self.refuses_results and "result" in body:
            return 422, {"error": "result is wrong", "result": "must be small"}
        if self.held is not None and self.held["id"] == body["reservation_id"]:
            self.end("released", body["reason"], body.get("result", NO_RESULT))
            answer = {"released": True, "reservation_id": body["reservation_id"]}
        elif body["reservation_id"] in self.ended:
            known = self.ended[body["reservation_id"]]
            fate = f"the reservation has ended: {known['state']}, {known['reason']}"
            answer = {"released": False, "reason": fate, "state": known["state"]}
        else:
            return 404, {"error": f"there is no reservation {body['reservation_id']}"}
        if self.lost_answers:
            self.lost_answers -= 1
            raise WorkerUnreachable("the connection broke")
        return 200, answer

    def _extend(self, body: Any) -> tuple[int, Any]:
        if self.held is None or self.held["id"] != body["reservation_id"]:
            return 409, {"error": "it is not held"}
        self.held["ends_at"] = iso(BEGINNING + now() + body["seconds"])
        return 200, {"reservation_id": self.held["id"], "ends_at": self.held["ends_at"]}


class Connection:
    """In the place of a LivenessConnection."""

    def __init__(
        self, worker: SimulatedWorker, url: str, reservation_id: str, *, extend: str, changed: Callable[[], None]
    ) -> None:
        self.reservation_id, self.extend, self.changed = reservation_id, extend, changed
        self.state: Attachment = "connecting"
        self.max_hold = worker.max_hold
        self.closed = False
        self._worker = worker

    def start(self) -> None:
        self._worker.connections.append(self)
        if self._worker.attachment == "over":  # it has ended meanwhile
            self._worker.end("cancelled", "client_disconnect")
        self.become(self._worker.attachment)

    def become(self, state: Attachment) -> None:
        self.state = state
        self.changed()

    def close(self) -> None:
        self.closed = True


class _Client(AsyncControlClient):
    """Asks a simulated worker in place of a port."""

    def __init__(self, worker: SimulatedWorker, url: str | None) -> None:
        super().__init__(url)
        self._worker = worker

    async def _ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        return await self._worker.answer(method, path, None if body is None else json.loads(body))


def now() -> float:
    """The loop's time."""
    return asyncio.get_running_loop().time()


async def first(found: AsyncGenerator[Reservation, None]) -> Reservation:
    """The next reservation."""
    return await found.__anext__()


async def held(worker: SimulatedWorker, reservation_id: str = "r1", **fields: Any) -> Reservation:
    """The one that the worker holds from now on."""
    worker.hold(reservation_id, **fields)
    return await first(reservations(URL))
