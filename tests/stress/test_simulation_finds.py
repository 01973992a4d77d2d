"""The simulation finds what it is for: each mend of a promise that was broken once, taken out again, fails some seed.

Each has a seed that finds it soon. Another one is searched when the order of events in the world has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from nullworker import service, session_callbacks
from nullworker.autoscaler import connection
from nullworker.autoscaler.reporter import Reporter
from nullworker.clock import SystemClock
from nullworker.eventlog import opening, schema
from nullworker.eventlog.log import EventLog
from nullworker.fsm import book
from nullworker.service import Service
from stress import simulation

Patch = pytest.MonkeyPatch


class Mend(NamedTuple):
    """What is taken out, a seed that finds that, its claims, and how it says so."""

    take_out: Callable[[Patch], None]
    seed: int
    steps: int
    found: str


def _without(owner: Any, name: str, value: Any = lambda *_, **__: None) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def _one_address_refuses_for_all(patch: Patch) -> None:
    patch.setattr(connection, "_verdict", lambda deliveries: "refused" if "refused" in deliveries else "failed")


def _schema_stays_in_the_wal(patch: Patch) -> None:
    migrate = schema.migrate
    patch.setattr(schema, "migrate", lambda conn: migrate(conn) and False)


def _second_hold_from_a_shell(patch: Patch) -> None:
    guard = "NEW.kind = 'held' AND EXISTS (SELECT 1 FROM live WHERE state = 'held')"
    rules = [rule.replace(guard, "0") for rule in schema._RULES_AND_VIEWS]
    patch.setattr(schema, "_RULES_AND_VIEWS", rules)


def _promoted_without_a_commit(patch: Patch) -> None:
    patch.setattr(service, "_seen_before_its_commit", lambda events: events)


def _wrong_clock_is_kept(patch: Patch) -> None:
    patch.setattr(SystemClock, "moved", lambda _: None)


def _no_flush(patch: Patch) -> None:
    async def flush(*_: Any) -> None:
        """Nothing is sent."""

    patch.setattr(Reporter, "flush", flush)


def _hanging_owners_are_in_the_way(patch: Patch) -> None:
    patch.setattr(session_callbacks, "FIRST_TRIES_AT_ONCE", 8)
    init = session_callbacks.Callbacks.__init__

    def one_lane(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self._repeats = self._first_tries

    patch.setattr(session_callbacks.Callbacks, "__init__", one_lane)


MENDS = {
    "an outcome is refused for good only when every address refuses it": Mend(
        _one_address_refuses_for_all, 10, 100, "every outcome arrives"
    ),
    "a silent address costs a second": Mend(_without(connection, "SILENT_SECONDS", 1e9), 26, 100, "is told"),
    "the last reports are sent at a stop": Mend(_no_flush, 18, 100, "the last outcomes are told"),
    "a failed commit is taken back": Mend(_without(EventLog, "take_back"), 6, 100, "refused stays refused"),
    "a shell cannot hold a second one": Mend(_second_hold_from_a_shell, 1, 100, "a shell may say"),
    "a lost -wal is noticed": Mend(_without(opening, "_verify_newest"), 1, 100, "a loss is said"),
    "a new log's tables are in the file": Mend(_schema_stays_in_the_wal, 45, 100, "a loss is said"),
    "a -wal removed under the worker is saved": Mend(_without(EventLog, "_check_files"), 29, 100, "is not lost"),
    "the clock goes on from the newest event after a reboot": Mend(
        _without(EventLog, "latest", lambda _: 0.0), 5, 100, "time runs back"
    ),
    "the worker follows a clock that was set": Mend(_wrong_clock_is_kept, 6, 100, "ahead of the wall clock"),
    "who hangs keeps no owner waiting": Mend(_hanging_owners_are_in_the_way, 75, 400, "is called after"),
    "nobody is held without a commit": Mend(_promoted_without_a_commit, 3, 100, "before that is in the log"),
    "a lock of a moment is waited out": Mend(_without(service, "PATIENCE_SECONDS", 0.0), 3, 100, "a lock of a moment"),
    "a dead consumer is noticed over a restart": Mend(_without(Service, "listening"), 65, 100, "dead over a restart"),
    "a consumer has time after a restart": Mend(_without(book, "RESTART_GRACE_SECONDS", 0.0), 31, 100, "attach again"),
}


@pytest.mark.parametrize("mend", MENDS.values(), ids=MENDS)
def test_a_seed_finds_each_mend_that_is_taken_out(mend: Mend, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (mend.seed, *range(1, 100)):
        with monkeypatch.context() as patch:
            mend.take_out(patch)
            try:
                simulation.simulate(seed, mend.steps)
            except AssertionError as error:
                if mend.found in str(error):
                    break
    else:
        pytest.fail("no seed finds it")
    simulation.simulate(seed, mend.steps)
