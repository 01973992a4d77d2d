"""One step of the dispatcher: what is opened and given up in the ledger, limits, and what a restart remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ledgers import StillClock
from ledgers import opened_ledger as opened_ledger
from ledgers import still_clock as still_clock

from nullworker.dispatch.claims import Claim, Ended
from nullworker.dispatch.core import Core
from nullworker.dispatch.decision import Counts, Policy
from nullworker.dispatch.ledger import Ledger
from nullworker.dispatch.limits import Limits
from nullworker.errors import LogUnavailable

DONE = {"state": "released", "reason": "consumer_exit", "result": {"exit_code": 0}}
FAILED = {"state": "released", "reason": "consumer_exit", "result": {"exit_code": 1}}


@pytest.fixture
def start(ledger: Ledger, clock: StillClock) -> Callable[..., Core]:
    def begin(most: int = 8, **options: Any) -> Core:
        return Core(ledger, clock, Policy(most), **options)

    return begin


def hold(core: Core, claim: Claim) -> None:
    core.book.granted(claim.id, "http://w", "{}")
    core.book.held(claim.id, claim.id, 300.0, core.counts)


def flap(core: Core, clock: StillClock, final: dict[str, Any]) -> None:
    """A claim is held now, and over a second later."""
    claim = core.book.claim(core.counts)
    hold(core, claim)
    clock.time += 1
    core.book.ended(claim.id, "consumer_exit", Ended(final))


def test_claims_are_opened_with_the_numbers_and_the_metadata(start: Any) -> None:
    core = start(metadata={"team": "blue"})
    step = core.step(Counts(3, 1), core.snapshot())
    assert len(step.opened) == 3
    assert step.trouble is None
    for claim in step.opened:
        assert (claim.opened.waiting, claim.opened.in_flight, claim.opened.reclaim) == (3, 1, False)
        assert claim.opened.metadata == {"team": "blue", "claim": claim.id}
    assert core.counts == Counts(3, 1)


def test_the_claims_that_count_are_those_of_before_the_read(start: Any, clock: StillClock) -> None:
    """A hold that has taken a job and ended while the queue was read is in neither of its numbers."""
    core = start()
    core.step(Counts(1, 0), core.snapshot())
    (claim,) = core.book.claims.values()
    hold(core, claim)
    clock.time += 60
    before = core.snapshot()
    core.book.ended(claim.id, "consumer_exit", Ended(DONE))
    assert core.step(Counts(1, 0), before).opened == ()


def test_the_newest_pending_claims_are_given_up(start: Any) -> None:
    core = start()
    opened = core.step(Counts(3, 0), core.snapshot()).opened
    assert core.step(Counts(1, 0), core.snapshot()).given_up == ()
    given_up = core.step(Counts(1, 0), core.snapshot()).given_up
    assert [claim.id for claim in given_up] == [opened[2].id, opened[1].id]
    assert {claim.reason for claim in given_up} == {"not_needed"}
    assert list(core.book.claims) == [opened[0].id]


def test_the_claim_that_reclaims_is_marked(start: Any, clock: StillClock) -> None:
    core = start()
    for _ in range(3):
        assert core.step(Counts(0, 2), core.snapshot()).opened == ()
        clock.time += 5
    clock.time += 1
    (claim,) = core.step(Counts(0, 2), core.snapshot()).opened
    assert claim.opened.reclaim


def test_a_ledger_that_cannot_be_written_opens_nothing_and_says_why(
    start: Any, ledger: Ledger, monkeypatch: Any
) -> None:
    core = start()

    def full(*_: Any) -> None:
        raise LogUnavailable("the disk is full")

    monkeypatch.setattr(ledger, "append", full)
    step = core.step(Counts(3, 0), core.snapshot())
    assert (step.opened, step.trouble, core.book.claims) == ((), "the disk is full", {})


def test_a_limit_bounds_what_is_opened_and_gives_pending_claims_up_when_it_is_over(
    start: Any, clock: StillClock
) -> None:
    core = start(limits=Limits(hours=0.25), lifetime=300.0)
    opened = core.step(Counts(8, 0), core.snapshot()).opened
    assert len(opened) == 3
    step = core.step(Counts(8, 0), core.snapshot())
    assert (step.opened, step.room.reached, step.room.over) == ((), "hours", False)
    hold(core, opened[0])
    clock.time += 901
    step = core.step(Counts(8, 1), core.snapshot())
    assert step.room.over
    assert [(claim.id, claim.reason) for claim in step.given_up] == [(opened[2].id, "limit"), (opened[1].id, "limit")]
    assert [claim.state for claim in core.book.claims.values()] == ["held"]


def test_dollars_of_a_limit_are_counted_at_the_price_of_the_next_machine(start: Any) -> None:
    core = start(limits=Limits(dollars=1.0), lifetime=3600.0, price=lambda: 0.4)
    assert len(core.step(Counts(8, 0), core.snapshot()).opened) == 2


def test_a_restart_remembers_a_pause_and_how_long_it_was(start: Any, clock: StillClock) -> None:
    core = start(1)
    for _ in range(3):
        core.step(Counts(5, 0), core.snapshot())
        flap(core, clock, FAILED)
        clock.time += 100
    flap(core, clock, FAILED)
    again = start(1)
    decision = again.step(Counts(5, 0), again.snapshot()).decision
    assert (decision.paused, decision.pause_seconds, decision.opens) == (1, 40.0, 0)


def test_a_restart_takes_no_healthy_short_holds_for_useless_ones(start: Any, clock: StillClock) -> None:
    core = start()
    for waiting in (9, 8, 7, 6):
        core.counts = Counts(waiting, 0)
        flap(core, clock, DONE)
    again = start()
    assert again.step(Counts(5, 0), again.snapshot()).decision.paused == 0
    # jobs have come meanwhile: only the looks before later holds tell that each has done one
    core.counts = Counts(5, 0)
    open_ = core.book.claim(core.counts)
    hold(core, open_)
    again = start()
    assert again.step(Counts(9, 0), again.snapshot()).decision.paused == 0


@pytest.mark.parametrize(
    ("looks", "paused"),
    [((9, 9, 9), 3), ((9, 8, 9), 2), ((9, 8, 9, 8), 1), ((9, 10, 8), 1), ((9,), 1)],
)
def test_a_restart_judges_each_hold_by_the_looks_before_later_ones(
    start: Any, clock: StillClock, looks: tuple[int, ...], paused: int
) -> None:
    """The queue is as long as at first. A hold after which it fell has done a job, and so have those before it."""
    core = start()
    for waiting in looks:
        core.counts = Counts(waiting, 0)
        flap(core, clock, DONE)
    again = start()
    decision = again.step(Counts(10, 0), again.snapshot()).decision
    assert (decision.paused, decision.memory.pauses[0].until) == (paused, clock.time - paused + 1 + 5.0)


def test_a_restart_believes_a_result_that_tells_of_jobs_and_no_queue_where_it_tells_of_a_failure(
    start: Any, clock: StillClock
) -> None:
    core = start()
    for result, paused in (({"runs": 2}, 0), ({"exit_code": 1}, 1)):
        core.counts = Counts(9, 0)
        flap(core, clock, {**DONE, "result": result})
        again = start()
        assert again.step(Counts(9, 0), again.snapshot()).decision.paused == paused


def test_an_end_that_was_not_judged_yet_moves_with_a_clock_that_is_set(start: Any, clock: StillClock) -> None:
    core = start(1)
    core.step(Counts(5, 0), core.snapshot())
    core.book.ended(next(iter(core.book.claims)), "not_needed")
    flap(core, clock, FAILED)
    clock.time -= 3600
    core.clock_was_set(-3600)
    (pause,) = core.step(Counts(5, 0), core.snapshot()).decision.memory.pauses
    assert pause.until == clock.time + 5.0


def test_a_hold_that_ends_is_judged_at_the_next_step_and_only_there(start: Any, clock: StillClock) -> None:
    core = start(1)
    core.step(Counts(5, 0), core.snapshot())
    core.book.ended(next(iter(core.book.claims)), "not_needed")
    flap(core, clock, FAILED)
    assert core.step(Counts(5, 0), core.snapshot()).decision.paused == 1
    clock.time += 6
    assert core.step(Counts(5, 0), core.snapshot()).decision.paused == 0


def test_a_restart_passes_over_claims_that_were_never_held(start: Any, clock: StillClock) -> None:
    core = start()
    core.book.ended(core.book.claim(Counts(9, 0)).id, "not_needed")
    core.counts = Counts(9, 0)
    flap(core, clock, FAILED)
    again = start()
    assert again.step(Counts(9, 0), again.snapshot()).decision.paused == 1
