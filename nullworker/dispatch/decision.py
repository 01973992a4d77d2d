"""Decides how many claims to open and to give up, as a pure function.

`decide` gets the time, the queue's numbers, the open claims, the holds that have ended since the last decision and the
memory of that decision. It returns a `Decision` with all numbers that led to it, and the memory for the next one. It
never ends a hold; only consumers do.

The claims must be those that were open when the read of the queue began. Otherwise a hold that takes a job and ends
during the read would be missing from both counts, and one worker too many would be opened.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final, NamedTuple

#: Maximum of the seconds for which a fruitless hold counts as open.
LONGEST_PAUSE_SECONDS: Final = 600.0


class Policy(NamedTuple):
    """The user's options."""

    max: int
    min: int = 0
    jobs_per_worker: int = 1
    interval: float = 5.0  # seconds between two polls of the queue; also the first pause
    settle: float = 10.0  # seconds after which a hold counts as having taken its job


class Counts(NamedTuple):
    """The numbers of one poll of the queue."""

    waiting: int  # jobs that no consumer has taken
    in_flight: int | None = None  # jobs that are being worked on; None: unknown


class Hold(NamedTuple):
    """A claim that a worker holds or has held."""

    claim_id: str
    opened_at: float  # epoch seconds at which the claim was made
    held_at: float  # epoch seconds
    before: Counts  # the last poll of the queue before it was held
    reclaim: bool = False  # opened for dropped work


class EndedHold(NamedTuple):
    """A hold that has ended."""

    hold: Hold
    ended_at: float  # epoch seconds
    failed: bool  # cancelled, expired, or released with a failed result
    worked: bool = False  # its result says that jobs were done, whatever the queue shows

    def shifted(self, seconds: float) -> EndedHold:
        """The same, by a clock that was set forward by `seconds`, or back."""
        hold = self.hold._replace(opened_at=self.hold.opened_at + seconds, held_at=self.hold.held_at + seconds)
        return self._replace(hold=hold, ended_at=self.ended_at + seconds)


class Open(NamedTuple):
    """The claims that were open when the read of the queue began."""

    pending: int = 0
    granted: int = 0
    held: tuple[Hold, ...] = ()

    @property
    def total(self) -> int:
        """The number of open claims."""
        return self.pending + self.granted + len(self.held)


class Pause(NamedTuple):
    """A fruitless hold, which counts as open for a while."""

    ended: EndedHold
    until: float  # epoch seconds


class Memory(NamedTuple):
    """What one decision passes on to the next."""

    dropped_since: float | None = None  # epoch seconds since when more is in flight than the open claims can work on
    pauses: tuple[Pause, ...] = ()
    pause_seconds: float = 0.0  # length of the last pause; 0: the last judged hold was fruitful
    lengthened_at: float = 0.0  # epoch seconds of the end that set the length
    useful: frozenset[str] = frozenset()  # held claims that were fruitful
    surplus: int = 0  # open claims more than were needed

    def shifted(self, seconds: float) -> Memory:
        """The same, by a clock that was set forward by `seconds`, or back."""
        return self._replace(
            dropped_since=None if self.dropped_since is None else self.dropped_since + seconds,
            pauses=tuple(pause._replace(until=pause.until + seconds) for pause in self.pauses),
            lengthened_at=self.lengthened_at + seconds,
        )


#: The memory before the first decision.
NOTHING: Final = Memory()


class Decision(NamedTuple):
    """What to do, and the numbers on which it is based."""

    opens: int
    gives_up: int  # pending claims
    reclaim: bool  # one of `opens` is for dropped work
    desired: int
    desired_high: int  # by the high estimate; equal if the number in flight is known
    waiting: int
    in_flight: int | None
    low: int  # estimate of the jobs in flight, low
    high: int  # estimate of the jobs in flight, high
    pending: int
    granted: int
    held: int
    paused: int  # fruitless holds that count as open
    pause_seconds: float  # length of the last such pause
    memory: Memory

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers, for a log line and for /status."""
        left_out = ("memory", "low", "high", "desired_high") if self.in_flight is not None else ("memory",)
        return {name: value for name, value in self._asdict().items() if name not in left_out}


def decide(
    now: float,
    counts: Counts,
    open_: Open,
    ended: Collection[EndedHold] = (),
    memory: Memory = NOTHING,
    *,
    policy: Policy,
) -> Decision:
    """Decide after one poll of the queue. `ended`: the holds that have ended since the last decision."""
    memory = _judge(now, counts, open_.held, ended, memory, policy)
    paused = len(memory.pauses)
    counted = open_.total + paused

    if counts.in_flight is None:
        low = sum(now - hold.held_at > policy.settle for hold in open_.held) * policy.jobs_per_worker
        high = len(open_.held) * policy.jobs_per_worker
    else:
        low = high = counts.in_flight
    desired, desired_high = (_desired(counts.waiting + in_flight, policy) for in_flight in (low, high))

    dropped = counts.in_flight is not None and counts.in_flight > counted * policy.jobs_per_worker
    since = (now if memory.dropped_since is None else memory.dropped_since) if dropped else None
    reclaim = since is not None and now - since > policy.settle and counted < policy.max

    by_queue = min(desired - counted, math.ceil(counts.waiting / policy.jobs_per_worker))
    opens = max(by_queue, policy.min - counted, int(reclaim), 0)
    # At two polls in a row: a finished job leaves the queue a moment before its hold ends.
    surplus = max(0, open_.total - desired_high)
    return Decision(
        opens=opens,
        gives_up=min(open_.pending, surplus, memory.surplus),
        reclaim=reclaim,
        desired=desired,
        desired_high=desired_high,
        waiting=counts.waiting,
        in_flight=counts.in_flight,
        low=low,
        high=high,
        pending=open_.pending,
        granted=open_.granted,
        held=len(open_.held),
        paused=paused,
        pause_seconds=memory.pause_seconds,
        memory=memory._replace(dropped_since=since, surplus=surplus),
    )


def _desired(jobs: int, policy: Policy) -> int:
    return min(max(math.ceil(jobs / policy.jobs_per_worker), policy.min), policy.max)


def _judge(
    now: float,
    counts: Counts,
    held: tuple[Hold, ...],
    ended: Collection[EndedHold],
    memory: Memory,
    policy: Policy,
) -> Memory:
    """Judge the holds: which were fruitful, which fruitless ones count as open, and for how long."""
    useful = {hold.claim_id for hold in held if _brings(hold, now - hold.held_at, counts, policy)}
    relief = bool(useful - memory.useful)
    useless = []
    for each in ended:
        if each.hold.claim_id in memory.useful and not each.failed:
            continue
        if _brought_nothing(each, counts, policy):
            useless.append(each)
        elif not each.failed:
            relief = True
    for pause in memory.pauses:  # the queue may show the work of a hold only now
        relief |= not pause.ended.failed and seen_in_queue(pause.ended.hold, counts)
    kept = memory.useful | useful
    memory = memory._replace(useful=frozenset(hold.claim_id for hold in held if hold.claim_id in kept))
    if relief:
        memory = memory._replace(pauses=(), pause_seconds=0.0)

    pauses = [pause for pause in memory.pauses if pause.until > now]
    seconds, lengthened_at = memory.pause_seconds, memory.lengthened_at
    for each in useless:
        if seconds == 0.0:
            seconds, lengthened_at = policy.interval, each.ended_at
        elif each.hold.opened_at >= lengthened_at:  # holds that were opened together lengthen the pause once
            seconds, lengthened_at = min(seconds * 2, LONGEST_PAUSE_SECONDS), each.ended_at
        if each.ended_at + seconds > now:
            pauses.append(Pause(each, each.ended_at + seconds))
    return memory._replace(pauses=tuple(pauses), pause_seconds=seconds, lengthened_at=lengthened_at)


def _brought_nothing(ended: EndedHold, counts: Counts, policy: Policy) -> bool:
    if not ended.hold.reclaim and ended.ended_at - ended.hold.held_at > policy.settle:
        return False
    return ended.failed or not (ended.worked or seen_in_queue(ended.hold, counts))


def _brings(hold: Hold, seconds: float, counts: Counts, policy: Policy) -> bool:
    return (seconds > policy.settle and not hold.reclaim) or seen_in_queue(hold, counts)


def seen_in_queue(hold: Hold, counts: Counts) -> bool:
    """Whether the queue's numbers have changed as they do when a job is taken, or dropped work is done.

    More in flight counts beside fewer waiting: in a queue that only grows, short jobs would look like none.
    """
    if counts.in_flight is None or hold.before.in_flight is None:
        return counts.waiting < hold.before.waiting
    if hold.reclaim and counts.in_flight < hold.before.in_flight:
        return True
    return counts.waiting < hold.before.waiting or (not hold.reclaim and counts.in_flight > hold.before.in_flight)
