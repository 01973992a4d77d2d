"""The worker under a soak, and a fake autoscaler that keeps only what the audit needs.

A warning or error line that is not in EXPLAINED fails the soak, as does any output that is no log line.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from nullworker.testing import FakeAutoscaler, Seen
from stress.crash_worker import Worker, _parse

Json = dict[str, Any]

#: Why a line of warning or error level is as it should be in a soak.
EXPLAINED = {
    "report_not_delivered": "the autoscaler has its outages",
    "key_not_loaded": "a start falls into an outage of the autoscaler",
    "last_reports_unsent": "a stop falls into an outage of the autoscaler",
    "consumer_unhealthy": "the consumer's health endpoint flaps",
    "callback_failed": "the owners of sessions answer one callback in five with 500",
    "duration_capped": "callers ask for more than the cap of two seconds",
}
#: Alarms that are kept: the first ones tell the story.
MOST_ALARMS = 100


class Watched(Worker):
    """One instance over all its lives. `explained` counts the lines whose reason is known."""

    def __init__(self, folder: Path, rng: random.Random, report_addr: str, health_url: str) -> None:
        super().__init__(folder, rng, report_addr)
        self.explained: Counter[str] = Counter()
        self._env |= {
            "BACKEND_HEALTH_URL": health_url,
            "NULL_HEALTH_INTERVAL": "1",
            "NULL_HEALTH_TIMEOUT": "1",
            # what Python says of a socket or a task that was forgotten comes on stderr, and is an alarm
            "PYTHONWARNINGS": "error",
        }

    @property
    def pid(self) -> int:
        """The process of this life."""
        return self._process.pid

    @property
    def dead(self) -> bool:
        """It has ended."""
        return self._process.returncode is not None

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            self.heard(_parse(raw))

    def heard(self, line: Json) -> None:
        """One log line."""
        if line.get("event") == "worker_started":
            self._started.set()
        if line.get("level") in ("debug", "info"):
            return
        if line.get("event") in EXPLAINED:
            self.explained[line["event"]] += 1
        elif len(self.alarms) < MOST_ALARMS:
            self.alarms.append(json.dumps(line)[:4000])


class Ear(FakeAutoscaler):
    """Keeps of each report and each outcome what the audit reads, so that hours of them are a few MB.

    A report is `sure` when its answer went out at once, so that the worker had it; the last one of a life never is.
    """

    def take_status(self, status: Json, at: float) -> None:
        """Keep the two figures of a report that must add up."""
        sure = "worker_status" not in self.faults.active
        self.statuses.append({"cur_perf": status["cur_perf"], "rej_load": status["rej_load"], "sure": sure})

    def take_batch(self, batch: Json, at: float) -> None:
        """Keep whose outcome it was, and which."""
        self.outcomes.extend(
            {"request_idx": each["request_idx"], "status": each["status"]} for each in batch["requests"]
        )

    def note(self, seen: Seen) -> None:
        """Wake who waits, and forget it."""
        super().note(seen)
        self.seen.clear()

    def life_over(self) -> None:
        """The worker has ended: perhaps before it had the last answer."""
        if self.statuses:
            self.statuses[-1]["sure"] = False

    def sure(self) -> list[Json]:
        """The reports that the worker must have seen acknowledged."""
        return [status for status in self.statuses if status["sure"]]
