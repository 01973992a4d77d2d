"""The dispatcher's decision: the formulae, the two estimates, reclaimed work, and the pause of machines that flap."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nullworker.dispatch.decision import (
    LONGEST_PAUSE_SECONDS,
    NOTHING,
    Counts,
    Decision,
    EndedHold,
    Hold,
    Memory,
    Open,
    Pause,
    Policy,
    decide,
)

T = 1_800_000_000.0
IDLE, ONE = Counts(0, 0), Counts(1, 0)
#: The look before has seen too many, too.
SEEN = Memory(surplus=99)


def hold(name: str = "a", *, age: float = 60.0, before: Counts = IDLE, reclaim: bool = False, now: float = T) -> Hold:
    return Hold(name, now - age - 1, now - age, before, reclaim)


def holds(number: int, *, age: float = 60.0) -> tuple[Hold, ...]:
    return tuple(hold(f"h{i}", age=age) for i in range(number))


def ended(
    name: str = "a",
    *,
    seconds: float = 1.0,
    now: float = T,
    failed: bool = False,
    worked: bool = False,
    before: Counts = ONE,
    reclaim: bool = False,
) -> EndedHold:
    return EndedHold(hold(name, age=seconds, before=before, reclaim=reclaim, now=now), now, failed, worked)


@pytest.mark.parametrize(
    ("waiting", "in_flight", "pending", "held", "policy", "desired", "opens", "gives_up"),
    [
        (0, 0, 0, 0, Policy(4), 0, 0, 0),
        (1, 0, 0, 0, Policy(4), 1, 1, 0),
        (9, 0, 0, 0, Policy(4), 4, 4, 0),
        (9, 0, 1, 1, Policy(4), 4, 2, 0),
        (9, 4, 0, 4, Policy(4), 4, 0, 0),
        (2, 3, 0, 3, Policy(8), 5, 2, 0),
        (2, 3, 2, 3, Policy(8), 5, 0, 0),  # what has been asked for counts, though nobody works there yet
        (0, 3, 2, 3, Policy(8), 3, 0, 2),  # others have taken the two jobs
        (0, 3, 2, 3, Policy(8, min=4), 4, 0, 1),
        (1, 5, 0, 5, Policy(8), 6, 1, 0),
        (1, 9, 0, 2, Policy(20), 10, 1, 0),  # jobs in flight are being worked on, wherever that is
        (25, 0, 0, 0, Policy(9, jobs_per_worker=10), 3, 3, 0),
        (22, 3, 0, 3, Policy(9, jobs_per_worker=10), 3, 0, 0),
        (1, 30, 0, 3, Policy(9, jobs_per_worker=10), 4, 1, 0),
        (3, 8, 0, 1, Policy(9, jobs_per_worker=2), 6, 2, 0),
        (0, 0, 0, 0, Policy(4, min=2), 2, 2, 0),
        (1, 0, 0, 1, Policy(4, min=2), 2, 1, 0),
        (5, 0, 0, 6, Policy(4), 4, 0, 0),  # --max was lowered: what is held stays
        (5, 0, 2, 6, Policy(4), 4, 0, 2),
        (0, 0, 3, 0, Policy(4), 0, 0, 3),
        (0, 0, 3, 0, Policy(4, min=1), 1, 0, 2),
    ],
)
def test_desired_opens_and_gives_up(
    waiting: int, in_flight: int, pending: int, held: int, policy: Policy, desired: int, opens: int, gives_up: int
) -> None:
    made = decide(T, Counts(waiting, in_flight), Open(pending, 0, holds(held)), memory=SEEN, policy=policy)
    assert (made.desired, made.opens, made.gives_up, made.reclaim) == (desired, opens, gives_up, False)


def test_a_granted_claim_counts_as_open_and_is_never_given_up() -> None:
    assert decide(T, Counts(1, 0), Open(granted=1), policy=Policy(4)).opens == 0
    assert decide(T, IDLE, Open(pending=1, granted=2), memory=SEEN, policy=Policy(4)).gives_up == 1


def test_a_pending_claim_is_given_up_when_it_was_too_many_at_two_looks_in_a_row() -> None:
    """A job is done, and not in flight any more, a moment before its hold is over."""
    run = Run(Policy(4))
    working = holds(2)
    assert run.look(1, 2, *working, pending=1).gives_up == 0
    assert run.look(1, 0, *working, pending=1).gives_up == 0
    assert run.look(1, 0, pending=1).gives_up == 0
    assert [run.look(0, 0, pending=1).gives_up for _ in range(2)] == [0, 1]
    assert Run(Policy(4)).look(0, 0, pending=1).gives_up == 0


@pytest.mark.parametrize(
    ("waiting", "young", "old", "pending", "opens", "gives_up"),
    [
        (3, 0, 0, 0, 3, 0),
        (3, 3, 0, 0, 0, 0),  # they may not have taken their jobs yet
        (3, 0, 3, 0, 3, 0),  # they have
        (3, 1, 2, 0, 2, 0),
        (0, 2, 0, 1, 0, 1),  # high: two are worked on, three are open
        (1, 2, 0, 1, 0, 0),  # low: one is missing; high: none is too many
        (1, 2, 0, 0, 0, 0),
    ],
)
def test_where_in_flight_is_unknown_it_opens_by_the_low_estimate_and_gives_up_by_the_high_one(
    waiting: int, young: int, old: int, pending: int, opens: int, gives_up: int
) -> None:
    held = holds(young, age=9.9) + tuple(hold(f"o{i}", age=10.1) for i in range(old))
    made = decide(T, Counts(waiting), Open(pending, 0, held), memory=SEEN, policy=Policy(8))
    assert (made.opens, made.gives_up, made.low, made.high) == (opens, gives_up, old, young + old)


def test_each_hold_is_taken_to_have_as_many_jobs_as_a_worker_takes() -> None:
    held = (hold("old", age=10.1), hold("older", age=60.0), hold("young", age=9.9))
    made = decide(T, Counts(9), Open(held=held), memory=SEEN, policy=Policy(8, jobs_per_worker=4))
    assert (made.low, made.high, made.desired, made.desired_high, made.opens) == (8, 12, 5, 6, 2)


class Run:
    """Decides again and again, as the dispatcher does, with a clock of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.now, self.memory = policy, T, NOTHING
        self.over: list[EndedHold] = []

    def look(self, waiting: int, in_flight: int | None, *held: Hold, after: float = 5.0, pending: int = 0) -> Decision:
        self.now += after
        made = decide(
            self.now, Counts(waiting, in_flight), Open(pending, 0, held), self.over, self.memory, policy=self.policy
        )
        self.memory, self.over = made.memory, []
        return made

    def flap(self, before: Counts, *, failed: bool = False, reclaim: bool = False, seconds: float = 0.5) -> None:
        """A hold is opened now, and is over when the next look comes."""
        began = Hold(f"f{self.now}", self.now, self.now + 0.1, before, reclaim)
        self.over.append(EndedHold(began, self.now + 0.1 + seconds, failed))


def test_work_that_somebody_dropped_is_reclaimed_by_one_hold_after_settle() -> None:
    run = Run(Policy(8))
    assert [run.look(0, 3).opens for _ in range(5)] == [0, 0, 0, 1, 1]
    run = Run(Policy(8))
    for _ in range(4):
        made = run.look(0, 3)
    assert (made.opens, made.reclaim, made.desired) == (1, True, 3)


def test_in_flight_that_was_only_high_for_a_moment_is_not_reclaimed() -> None:
    run = Run(Policy(8))
    assert [run.look(0, n).opens for n in (1, 1, 0, 1, 1, 0, 1)] == [0] * 7


def test_nothing_is_reclaimed_where_open_claims_cover_what_is_in_flight_or_the_maximum_is_open() -> None:
    run = Run(Policy(2))
    working = holds(2)
    assert [run.look(0, 9, *working).opens for _ in range(5)] == [0] * 5
    run = Run(Policy(8, jobs_per_worker=10))
    assert [run.look(0, 20, *working).opens for _ in range(5)] == [0] * 5


def test_reclaiming_what_cannot_be_reclaimed_becomes_rare() -> None:
    """`echo 0 1`: one stale entry in `jobs:busy`, and consumers that find nothing."""
    run = Run(Policy(8))
    opened = []
    while run.now < T + 3600:
        if run.look(0, 1).opens:
            opened.append(run.now)
            run.flap(Counts(0, 1), reclaim=True)
    gaps = [later - earlier for earlier, later in itertools.pairwise(opened)]
    assert len(opened) <= 12
    assert gaps == sorted(gaps)
    assert gaps[-1] >= LONGEST_PAUSE_SECONDS


def test_a_reclaiming_hold_that_idles_for_longer_than_settle_has_brought_nothing_either() -> None:
    run = Run(Policy(8))
    run.flap(Counts(0, 1), reclaim=True, seconds=20.0)
    assert run.look(0, 1, after=21.0).paused == 1


def test_a_reclaiming_hold_that_did_the_dropped_job_starts_no_pause() -> None:
    run = Run(Policy(8))
    run.flap(Counts(0, 2), reclaim=True)
    assert run.look(0, 1).paused == 0


def test_a_hold_that_brings_nothing_counts_as_open_for_a_time_that_doubles_to_ten_minutes() -> None:
    run = Run(Policy(1))
    pauses = []
    for _ in range(1000):
        made = run.look(1, 0)
        if made.paused:
            assert made.opens == 0
        if made.opens:
            pauses.append(made.pause_seconds)
            run.flap(Counts(1, 0))
    assert pauses[:9] == [0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0]
    assert set(pauses[9:]) == {600.0}


def test_a_crowd_that_flaps_together_doubles_the_pause_once() -> None:
    run = Run(Policy(4))
    for _ in range(4):
        run.flap(Counts(9, 0))
    made = run.look(9, 0)
    assert (made.paused, made.pause_seconds, made.opens) == (4, 5.0, 0)


@pytest.mark.parametrize(
    ("before", "after", "pauses"),
    [
        (Counts(9, 0), Counts(8, 0), 0),  # it has taken a job
        (Counts(9, 0), Counts(9, 0), 1),
        (Counts(9, 0), Counts(12, 0), 1),
        (Counts(9, 0), Counts(12, 1), 0),  # the queue grows, and somebody has taken a job
        (Counts(9), Counts(8), 0),
        (Counts(9), Counts(9), 1),
        (Counts(9), Counts(8, 3), 0),
    ],
)
def test_what_the_queue_shows_of_a_short_hold(before: Counts, after: Counts, pauses: int) -> None:
    made = decide(T, after, Open(), [ended(before=before)], policy=Policy(8))
    assert made.paused == pauses


def test_a_failed_short_hold_pauses_whatever_the_queue_shows_and_a_long_one_never() -> None:
    before, after = Counts(9, 0), Counts(8, 1)
    assert decide(T, after, Open(), [ended(before=before, failed=True)], policy=Policy(8)).paused == 1
    assert decide(T, after, Open(), [ended(before=before, failed=True, seconds=11)], policy=Policy(8)).paused == 0
    assert decide(T, before, Open(), [ended(before=before, seconds=11)], policy=Policy(8)).paused == 0


def test_a_result_that_says_that_jobs_were_done_needs_no_look_at_the_queue() -> None:
    assert decide(T, Counts(9), Open(), [ended(before=Counts(9), worked=True)], policy=Policy(8)).paused == 0
    assert decide(T, Counts(9), Open(), [ended(before=Counts(9), worked=True, failed=True)], policy=Policy(8)).paused


def test_the_pause_ends_as_soon_as_a_hold_brings_something() -> None:
    run = Run(Policy(8))
    for _ in range(3):
        run.flap(Counts(9, 0))
        made = run.look(9, 0, after=60.0)
    run.flap(Counts(9, 0))
    made = run.look(9, 0, after=1.0)
    assert (made.paused, made.pause_seconds) == (1, 40.0)
    working = hold("w", age=1.0, before=Counts(9, 0), now=run.now)
    made = run.look(8, 1, working, after=1.0)
    assert (made.paused, made.pause_seconds, made.opens) == (0, 0.0, 7)


def test_a_hold_that_outlives_settle_brings_something_but_not_one_that_reclaims() -> None:
    for reclaim, paused in ((False, 0), (True, 1)):
        run = Run(Policy(8))
        run.flap(Counts(9, 3))
        assert run.look(9, 3, after=1.0).paused == 1
        long = hold("w", age=11.0, before=Counts(9, 3), now=run.now, reclaim=reclaim)
        assert run.look(9, 3, long, after=1.0).paused == paused
        assert run.look(9, 3, hold("w", age=3.0, before=Counts(9, 3), now=run.now), after=1.0).paused == paused


def test_a_hold_that_lasted_and_ended_well_ends_the_pause_and_a_failed_one_does_not() -> None:
    for failed, paused in ((False, 0), (True, 1)):
        run = Run(Policy(8))
        run.flap(Counts(9, 3))
        assert run.look(9, 3, after=1.0).paused == 1
        run.over.append(ended("long", seconds=60.0, now=run.now, failed=failed, before=Counts(9, 3)))
        assert run.look(9, 3, after=1.0).paused == paused


def test_a_hold_that_seemed_useful_and_failed_within_settle_starts_a_pause() -> None:
    for failed, paused in ((False, 0), (True, 1)):
        run = Run(Policy(8))
        working = hold("w", age=1.0, before=Counts(9, 0), now=run.now)
        assert run.look(8, 1, working, after=1.0).paused == 0
        run.over.append(EndedHold(working, run.now, failed))
        assert run.look(9, 0, after=1.0).paused == paused


def test_a_hold_that_was_seen_and_brought_nothing_pauses_as_one_that_was_not_seen() -> None:
    run = Run(Policy(8))
    idle = hold("w", age=1.0, before=Counts(9, 0), now=run.now)
    run.look(9, 0, idle, after=1.0)
    run.over.append(EndedHold(idle, run.now + 0.5, failed=False))
    assert run.look(9, 0, after=1.0).paused == 1


def test_what_others_do_does_not_acquit_a_hold_that_failed() -> None:
    run = Run(Policy(8))
    run.flap(Counts(9, 0), failed=True)
    assert run.look(9, 0, after=1.0).paused == 1
    assert run.look(8, 0, after=1.0).paused == 1


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_memory_and_an_end_move_with_a_clock_that_is_set(seconds: float) -> None:
    over = ended()
    assert over.shifted(seconds) == ended(now=T + seconds)
    memory = Memory(T - 3, (Pause(over, T + 5),), 5.0, T - 1, frozenset("a"), 2)
    pauses = (Pause(over, T + 5 + seconds),)
    assert memory.shifted(seconds) == Memory(T - 3 + seconds, pauses, 5.0, T - 1 + seconds, frozenset("a"), 2)
    assert NOTHING.shifted(seconds).dropped_since is None


def test_a_reclaiming_hold_is_not_acquitted_by_more_in_flight() -> None:
    made = decide(T, Counts(9, 5), Open(), [ended(before=Counts(9, 4), reclaim=True)], policy=Policy(8))
    assert made.paused == 1


def test_what_is_not_said_is_nothing() -> None:
    assert Open().total == 0
    assert not Hold("a", T, T, IDLE).reclaim


def test_a_queue_that_falls_later_acquits_a_short_hold() -> None:
    run = Run(Policy(1))
    run.flap(Counts(3, 0))
    assert run.look(3, 0, after=1.0).paused == 1
    assert run.look(2, 0, after=1.0).paused == 0


def test_a_flapping_hold_pauses_the_minimum_too_and_gives_no_pending_claim_up() -> None:
    made = decide(T, Counts(0, 0), Open(), [ended(before=IDLE)], policy=Policy(4, min=1))
    assert (made.paused, made.opens) == (1, 0)
    made = decide(T, Counts(1, 0), Open(pending=1), [ended(before=Counts(1, 0))], policy=Policy(4))
    assert (made.opens, made.gives_up) == (0, 0)


def test_200_short_jobs_do_not_look_like_flapping() -> None:
    """8 workers, a job of 2 s a hold, a look each second, and in flight unknown to the queue or not."""
    for known in (True, False):
        run, waiting, held, opened = Run(Policy(8, interval=1.0, settle=1.5)), 200, list[Hold](), 0
        while waiting or held:
            for each in [each for each in held if run.now + 1.0 - each.held_at >= 2.0]:
                held.remove(each)
                run.over.append(EndedHold(each, each.held_at + 2.0, failed=False))
            made = run.look(waiting, len(held) if known else None, *held, after=1.0)
            assert made.paused == 0
            for _ in range(made.opens):
                opened += 1
                held.append(Hold(f"h{opened}", run.now, run.now, Counts(waiting, len(held) if known else None)))
                waiting = max(0, waiting - 1)
        assert opened == 200


counts_ = st.builds(Counts, st.integers(0, 50), st.none() | st.integers(0, 50))
policies = st.builds(
    lambda low, more, per_worker: Policy(low + more, low, per_worker),
    st.integers(0, 5),
    st.integers(1, 20),
    st.integers(1, 5),
)
ages = st.floats(0, 1000)
open_ = st.builds(
    lambda pending, granted, old: Open(
        pending, granted, tuple(hold(f"h{i}", age=age, before=Counts(9, 0)) for i, age in enumerate(old))
    ),
    st.integers(0, 10),
    st.integers(0, 5),
    st.lists(ages, max_size=10),
)
over = st.lists(
    st.builds(
        lambda i, seconds, failed, reclaim, before: ended(
            f"e{i}", seconds=seconds, failed=failed, reclaim=reclaim, before=before
        ),
        st.integers(0, 10**6),
        ages,
        st.booleans(),
        st.booleans(),
        counts_,
    ),
    max_size=5,
)
memories = st.builds(
    Memory,
    st.none() | ages.map(lambda age: T - age),
    st.just(()),
    st.sampled_from([0.0, 5.0, 600.0]),
    st.just(T - 50),
    surplus=st.integers(0, 5),
)


@given(counts_, open_, over, memories, policies)
def test_what_holds_for_every_decision(
    counts: Counts, open_: Open, over: list[EndedHold], memory: Memory, policy: Policy
) -> None:
    made = decide(T, counts, open_, over, memory, policy=policy)
    counted = open_.total + made.paused
    by_waiting = math.ceil(counts.waiting / policy.jobs_per_worker)
    assert policy.min <= made.desired <= made.desired_high <= policy.max
    assert made.low <= made.high
    assert 0 <= made.opens <= max(0, policy.max - counted)
    assert made.opens <= max(by_waiting, policy.min - counted, int(made.reclaim))
    assert counted + made.opens >= min(policy.min, counted + made.opens)
    assert not made.opens or made.desired > counted
    assert counted + made.opens >= policy.min
    assert 0 <= made.gives_up <= open_.pending
    assert made.gives_up <= memory.surplus
    assert open_.total - made.gives_up >= min(open_.total, made.desired_high)
    assert not (made.opens and made.gives_up)
    assert made.pause_seconds <= LONGEST_PAUSE_SECONDS
    assert len(made.memory.pauses) == made.paused
    assert all(T < pause.until <= T + LONGEST_PAUSE_SECONDS for pause in made.memory.pauses)
    assert made.memory.useful <= {each.claim_id for each in open_.held}
    assert decide(T, counts, open_, over, memory, policy=policy) == made  # a pure function


@given(counts_, open_, policies)
def test_more_open_claims_never_open_more(counts: Counts, open_: Open, policy: Policy) -> None:
    one_more = open_._replace(pending=open_.pending + 1)
    opens = [decide(T, counts, each, policy=policy).opens for each in (open_, one_more)]
    assert opens[1] <= opens[0]


@given(st.integers(0, 50), st.integers(0, 50), open_, policies)
def test_more_waiting_never_opens_fewer(waiting: int, in_flight: int, open_: Open, policy: Policy) -> None:
    opens = [decide(T, Counts(n, in_flight), open_, policy=policy).opens for n in (waiting, waiting + 1)]
    assert opens[0] <= opens[1]


def test_numbers_leave_out_the_estimates_where_in_flight_is_known() -> None:
    made = decide(T, Counts(3, 2), Open(), policy=Policy(8)).numbers
    assert {"waiting", "in_flight", "desired", "opens", "paused"} <= made.keys()
    unknown = decide(T, Counts(3), Open(), policy=Policy(8)).numbers
    assert unknown.keys() - made.keys() == {"low", "high", "desired_high"}
    assert "memory" not in unknown.keys() | made.keys()
