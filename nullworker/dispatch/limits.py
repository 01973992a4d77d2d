"""Spending limits over the last 24 hours, as pure functions.

They count the time for which workers were held in the last 24 hours, including open holds, and one lifetime for each
claim that may still be held, which is the least that such a hold costs. Machines that start, load or idle are not
counted, because the dispatcher does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from nullworker.dispatch.ledger import HeldTime

DAY_SECONDS: Final = 86_400.0


class Limits(NamedTuple):
    """The limits of the user; None: no limit."""

    hours: float | None = None  # held hours in 24 hours
    dollars: float | None = None  # dollars in 24 hours
    price: float | None = None  # dollars per hour of every instance; None: each has its own price


class Spent(NamedTuple):
    """The sums over the last 24 hours."""

    hours: float
    dollars: float


class Room(NamedTuple):
    """How many claims may still be opened."""

    opens: int | None  # claims; None: no limit
    spent: Spent
    reached: Literal["hours", "dollars"] | None = None  # the limit that allows no claim
    over: bool = False  # past and current holds alone have reached it
    again_at: float | None = None  # epoch seconds at which one claim may be opened, if all holds ended now
    never: bool = False  # one lifetime alone exceeds the limit


def spent(now: float, holds: Iterable[HeldTime], price: float, window: float = DAY_SECONDS) -> Spent:
    """Hours and dollars of the last 24 hours. `price`: dollars per hour for holds without a known price.

    A hold that ended in the future, by a clock that was set back, counts as one that has just ended.
    """
    hours = dollars = 0.0
    for hold in holds:
        seconds = now - hold.held_at if hold.seconds is None else hold.seconds
        end = min(now, hold.held_at + seconds)
        held = max(0.0, min(seconds, end - (now - window))) / 3600
        hours += held
        dollars += held * (price if hold.price is None else hold.price)
    return Spent(hours, dollars)


def room(
    now: float, holds: Sequence[HeldTime], waiting_claims: int, limits: Limits, *, lifetime: float, price: float
) -> Room:
    """How many claims may be opened now. `waiting_claims`: pending and granted ones; `price`: of the next machine."""
    used = spent(now, holds, price)
    if limits.hours is None and limits.dollars is None:
        return Room(None, used)
    one = lifetime / 3600
    rooms = []
    if limits.hours is not None:
        rooms.append(("hours", _fits(limits.hours - used.hours, one), used.hours >= limits.hours))
    if limits.dollars is not None:
        rooms.append(("dollars", _fits(limits.dollars - used.dollars, one * price), used.dollars >= limits.dollars))
    name, fits, over = min(rooms, key=lambda room: (room[1], not room[2]))
    opens = max(0, fits - waiting_claims)
    if opens:
        return Room(opens, used)
    reached: Literal["hours", "dollars"] = "hours" if name == "hours" else "dollars"
    if fits:  # all of it is needed for the claims that wait for a worker
        return Room(0, used, reached)
    again = _again(now, holds, limits, one, price)
    return Room(0, used, reached, over, again, again is None)


def _fits(left: float, one: float) -> int:
    if left <= 0:
        return 0
    return math.floor(left / one + 1e-9) if one > 0 else 1_000_000


def _again(now: float, holds: Sequence[HeldTime], limits: Limits, one: float, price: float) -> float | None:
    """When one claim fits, if every hold ended now: the sums of the last 24 hours then only fall."""
    ended = [hold._replace(seconds=now - hold.held_at) if hold.seconds is None else hold for hold in holds]

    def fits(at: float) -> bool:
        used = spent(at, ended, price)
        return (limits.hours is None or used.hours + one <= limits.hours) and (
            limits.dollars is None or used.dollars + one * price <= limits.dollars
        )

    early, late = now, now + DAY_SECONDS
    if not fits(late):
        return None  # one lifetime alone exceeds the limit
    while late - early > 1.0:
        middle = (early + late) / 2
        early, late = (early, middle) if fits(middle) else (middle, late)
    return late
