"""What the simulated worker talks to: the autoscaler at two addresses, and the owners of sessions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec

from nullworker.autoscaler.connection import CALL_SECONDS, AutoscalerClient, Delivery
from nullworker.autoscaler.messages import OUTCOMES_PATH, STATUS_PATH

ADDRESSES: Final = ("http://a", "http://b")


class Autoscaler(AutoscalerClient):
    """The autoscaler behind a network: down, slow, or taking a message without its answer arriving.

    Only the call of one address is simulated. Which is asked when, and what follows from the answers, is real.

    Attributes:
        heard: request_idx of the outcomes that arrived, in order of first arrival, and how each ended.
        untold: request_idx of the outcomes that have not arrived, with the reservation's id and when it ended.
        served, rejected: sums of the figures in all reports that arrived.
        modes: by address: up, down, hangs, refuses (whatever comes).
        status_at: when the last status arrived.
        contradicted: request_idx that arrived with two different ends.
        doubled: the part of those sums that the worker cannot know to have arrived, so may send again.
        poison: request_idx whose outcome every address refuses.
        refused_at: when it was refused last: it keeps its place in the order until every address has done so.
        is_noted: whether the worker can store how far it has told.
    """

    def __init__(self, random: Random, *, perf: float) -> None:
        super().__init__(ADDRESSES)
        self.heard: dict[int, str] = {}
        self.untold: dict[int, tuple[str, float]] = {}
        self.served = self.rejected = 0.0
        self.status_at = self.refused_at = 0.0
        self.doubled: Counter[str] = Counter()
        self.contradicted: set[int] = set()
        self.poison: set[int] = set()
        self.is_noted: Callable[[], bool] = lambda: True
        self._modes = dict.fromkeys(ADDRESSES, "up")
        self._up_since = dict.fromkeys(ADDRESSES, 0.0)
        self._trouble_rate = 0.0
        self._perf = perf
        self._random = random

    def weather(self, trouble_rate: float = 0.0, **modes: str) -> None:
        """From now on `a` and `b` are as said, else up; `trouble_rate` of the calls to one that is up go wrong."""
        now = asyncio.get_running_loop().time()
        for address in ADDRESSES:
            mode = modes.get(address[-1], "up")
            if mode != "up" or self._modes[address] != "up" or trouble_rate or self._trouble_rate:
                self._up_since[address] = now
            self._modes[address] = mode
        self._trouble_rate = trouble_rate

    def fair_since(self) -> float | None:
        """Since when one address has been up; None: none is, or calls go wrong."""
        up = [since for address, since in self._up_since.items() if self._modes[address] == "up"]
        return None if self._trouble_rate else min(up, default=None)

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = CALL_SECONDS) -> Delivery:
        delivery = await super().post(path, body, seconds=seconds)
        if delivery == "ok" and self.is_noted():
            self._settle(path, body)
        elif delivery == "refused" and len(body.get("requests", ())) == 1:
            self.untold.pop(body["requests"][0]["request_idx"], None)
        return delivery

    async def _post(self, address: str, path: str, data: bytes, seconds: float) -> tuple[Delivery, str | None]:
        return await asyncio.wait_for(self._arrive(address, path, msgspec.json.decode(data)), seconds)

    async def _arrive(self, address: str, path: str, body: dict[str, Any]) -> tuple[Delivery, str | None]:
        mode = self._modes[address]
        if mode == "hangs":
            await asyncio.sleep(1e6)
        if mode == "refuses":
            await asyncio.sleep(0.01)
            return "refused", "answered 400"
        fate = self._random.random() / self._trouble_rate if self._trouble_rate else 2.0
        if mode == "down" or fate < 0.4:  # down at once, or after the time-out
            await asyncio.sleep(20.0 if fate < 0.1 else 0.01)
            return "failed", "is down"
        await asyncio.sleep(self._random.uniform(0.001, 3.0 if fate < 0.7 else 0.02))
        if path == OUTCOMES_PATH and any(each["request_idx"] in self.poison for each in body["requests"]):
            self.refused_at = asyncio.get_running_loop().time()
            return "refused", "answered 400"
        self._take(path, body)  # until the worker knows: a crash in between sends it again
        if 0.7 <= fate < 1.0:
            await asyncio.sleep(1e6)
        return "ok", None

    def _take(self, path: str, body: dict[str, Any]) -> None:
        if path == STATUS_PATH:
            served, rejected = body["cur_perf"] / self._perf, body["rej_load"] / self._perf
            self.served += served
            self.rejected += rejected
            self.doubled.update(served=int(served), rejected=int(rejected))
            self.status_at = asyncio.get_running_loop().time()
            return
        for each in body["requests"]:
            index, status = each["request_idx"], each["status"]
            self.untold.pop(index, None)
            if self.heard.setdefault(index, status) != status:
                self.contradicted.add(index)

    def _settle(self, path: str, body: dict[str, Any]) -> None:
        """The worker knows that it has arrived."""
        if path == STATUS_PATH:
            self.doubled["served"] -= int(body["cur_perf"] / self._perf)
            self.doubled["rejected"] -= int(body["rej_load"] / self._perf)


class Owners:
    """Those to whom the ends of sessions are posted.

    Attributes:
        told: session ids and how often.
        on_call: called with a session's id before each call.
        trouble_rate: of the calls, how many fail.
        patient: whether those at HANGS answer, too.
    """

    HANGS: Final = "http://hangs/"
    HONEST: Final = "http://owner/"

    def __init__(self, random: Random) -> None:
        self.told: Counter[str] = Counter()
        self.on_call: Callable[[str], None] = lambda _: None
        self.trouble_rate = 0.0
        self.patient = False
        self._random = random

    async def __call__(self, route: str, body: dict[str, Any]) -> str | None:
        self.on_call(body["session_id"])
        if route == self.HANGS and not self.patient:
            await asyncio.sleep(10.0)
            return "no answer"
        await asyncio.sleep(self._random.uniform(0.001, 0.2))
        if self._random.random() < self.trouble_rate:
            if self._random.random() < 0.3:
                self.told[body["session_id"]] += 1  # taken, but the answer is lost
            return "down"
        self.told[body["session_id"]] += 1
        return None
