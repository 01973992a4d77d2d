"""A short run of the crash harness, and tests that its audit finds planted errors."""

from __future__ import annotations

import asyncio
import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held, Queued
from stress import audit, crash_load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START = 1_700_000_000.0


async def test_nothing_is_lost_doubled_or_left_when_the_worker_is_killed_again_and_again() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "stress.crash", "--kills", "6", "--seed", "1"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    assert re.search(r"^wrong +0$", said, re.MULTILINE), said
    assert re.search(r"^kills +6 in", said, re.MULTILINE), said


# -- the audit -------------------------------------------------------------------------------------------------------


class Evidence:
    """A log of two requests, and all that was seen of them from outside; nothing is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.audit: Any = audit
        load: Any = crash_load
        self.db = folder / "audit.db"
        self.log: EventLog = open_log(self.db)
        self.log.append(
            [
                (1, Event(START, "a", "queued", None, Queued("request", 60, START + 30, request_idx=1))),
                (2, Event(START, "a", "held", None, Held(START + 60))),
                (3, Event(START + 1, "b", "queued", None, Queued("request", 60, START + 31, request_idx=2))),
                (4, Event(START + 3, "a", "released", "explicit", Ended({"token": "t"}))),
                (5, Event(START + 3, "b", "held", None, Held(START + 63))),
                (6, Event(START + 5, "b", "cancelled", "worker_restart", Ended())),
            ]
        )
        body = {
            "released": "explicit",
            "duration_cap": 60,
            "reservation_id": "a",
            "queued_seconds": 0,
            "held_seconds": 3,
            "result": {"token": "t"},
        }
        self.ledger = load.Ledger(
            claims=[load.Claim(1, "request", "answered", 200, body, "a"), load.Claim(2, "request", "lost")],
            releases=[load.Release("t", "a", START + 2.9, START + 3.1, {"released": True, "reservation_id": "a"})],
            holds=[
                load.Hold("a", "request", START, START + 0.1, START + 3.1),
                load.Hold("b", "request", START + 3, START + 3.2, START + 5),
            ],
            kills=[START + 5],
        )
        told = [{"request_idx": 1, "status": "Success"}, {"request_idx": 2, "status": "Cancelled"}]
        self.vast = SimpleNamespace(outcomes=told, statuses=[{"cur_perf": 100, "rej_load": 0}])
        self.lost = copy.copy(self.ledger.claims[1])

    def problems(self) -> list[str]:
        self.log.close()
        history = self.audit.read(self.db)
        return list(self.audit.check(history, self.ledger, self.vast, self.vast.statuses))


def another_answer(evidence: Evidence) -> None:
    evidence.ledger.claims[0].body["held_seconds"] = 4


def an_answer_that_is_not_in_the_log(evidence: Evidence) -> None:
    evidence.ledger.claims[1].reservation_id = "c"


def an_answer_without_a_reservation(evidence: Evidence) -> None:
    evidence.lost.idx, evidence.lost.status, evidence.lost.fate = 3, 429, "answered"
    evidence.ledger.claims.append(evidence.lost)


def a_reservation_that_nobody_claimed(evidence: Evidence) -> None:
    evidence.ledger.claims.pop()


def a_release_that_ended_another(evidence: Evidence) -> None:
    evidence.ledger.releases[0].aimed_at = "b"


def a_release_that_left_no_trace(evidence: Evidence) -> None:
    evidence.ledger.releases.append(copy.copy(evidence.ledger.releases[0]))
    evidence.ledger.releases[1].token = "u"


def an_outcome_that_did_not_arrive(evidence: Evidence) -> None:
    evidence.vast.outcomes.pop()


def outcomes_in_another_order(evidence: Evidence) -> None:
    evidence.vast.outcomes.reverse()


def another_outcome(evidence: Evidence) -> None:
    evidence.vast.outcomes[1]["status"] = "Success"


def figures_that_do_not_add_up(evidence: Evidence) -> None:
    evidence.vast.statuses[0]["cur_perf"] = 200


def two_clients_that_hold_it_at_once(evidence: Evidence) -> None:
    evidence.ledger.releases[0].sent = START + 4
    evidence.ledger.releases[0].done = START + 4
    evidence.ledger.holds[0].over = START + 4


def a_reservation_that_was_left_open(evidence: Evidence) -> None:
    queued = Event(START + 6, "c", "queued", None, Queued("request", 60, START + 36, request_idx=3))
    evidence.log.append([(7, queued)])


def a_hole_in_the_log(evidence: Evidence) -> None:
    queued = Event(START + 6, "c", "queued", None, Queued("request", 60, START + 36, request_idx=3))
    evidence.log.append([(8, queued), (9, Event(START + 6, "c", "cancelled", "draining", Ended()))])


def test_a_run_in_which_all_is_well_has_no_problems(tmp_path: Path) -> None:
    assert Evidence(tmp_path).problems() == []


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (another_answer, "another answer"),
        (an_answer_that_is_not_in_the_log, "is not in the log"),
        (an_answer_without_a_reservation, "is not in the log"),
        (a_reservation_that_nobody_claimed, "no claim"),
        (a_release_that_ended_another, "has ended a"),
        (a_release_that_left_no_trace, "was answered, and the log says"),
        (an_outcome_that_did_not_arrive, "1 have not arrived"),
        (outcomes_in_another_order, "the order differs"),
        (another_outcome, "1 are not in the log"),
        (figures_that_do_not_add_up, "cur_perf"),
        (two_clients_that_hold_it_at_once, "held at once"),
        (a_reservation_that_was_left_open, "c has no end"),
        (a_hole_in_the_log, "holes"),
    ],
)
def test_the_audit_sees(tmp_path: Path, plant: Callable[[Evidence], None], words: str) -> None:
    evidence = Evidence(tmp_path)
    plant(evidence)
    assert any(words in problem for problem in evidence.problems())
