"""Faults for the fake autoscaler: which call fails, how, and how often.

Each fault says whether the message counts as delivered. fake_autoscaler.py applies them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Call = Literal["pubkey", "worker_status", "delete_requests", "route"]
How = Literal["down", "slow", "late"] | int
CALLS: tuple[Call, ...] = get_args(Call)


@dataclass(frozen=True)
class Fault:
    """How a call fails. Raises ValueError for values that do not fit.

    Attributes:
        how: "down" closes the connection without an answer; "slow" accepts, and answers after `seconds`; "late"
            accepts, and never answers; a number from 400 to 599 is the HTTP status of the answer.
        times: for the next so many calls; None: until cleared.
        seconds: the delay of "slow".
    """

    how: How
    times: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        is_status = isinstance(self.how, int) and not isinstance(self.how, bool) and 400 <= self.how <= 599
        if not is_status and self.how not in ("down", "slow", "late"):
            raise ValueError(f"how must be 'down', 'slow', 'late' or a status from 400 to 599, not {self.how!r}")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times must be 1 or more, not {self.times}")
        if (self.how == "slow") != (self.seconds > 0):
            raise ValueError("seconds goes with 'slow', and only with it")

    @property
    def accepts(self) -> bool:
        """Whether the message counts as delivered, although its answer is late or lost."""
        return self.how in ("slow", "late")


@dataclass
class Faults:
    """The active faults, at most one for each call, with the number of calls that each still applies to."""

    active: dict[Call, Fault] = field(default_factory=dict)
    _left: dict[Call, int | None] = field(default_factory=dict)

    def put(self, call: Call, fault: Fault) -> None:
        """Set the fault of one call, replacing an earlier one. Raises ValueError for an unknown call."""
        call_named(call)
        self.active[call] = fault
        self._left[call] = fault.times

    def clear(self, call: Call | None = None) -> None:
        """Remove the fault of one call, or all faults. Calls under way keep theirs."""
        for cleared in (call,) if call else CALLS:
            self.active.pop(cleared, None)

    def take(self, call: Call) -> Fault | None:
        """The fault for a new call, or None; counts down `times`."""
        fault = self.active.get(call)
        left = self._left.get(call)
        if fault is not None and left is not None:
            self._left[call] = left - 1
            if left == 1:
                self.clear(call)
        return fault


def parse(body: object) -> tuple[Call, Fault]:
    """Parse the body of POST /faults: {"call", "how", "times"?, "seconds"?}. Raises ValueError."""
    if not isinstance(body, Mapping) or not {"call", "how"} <= set(body) <= {"call", "how", "times", "seconds"}:
        raise ValueError(
            'a fault is {"call": name, "how": "down" | "slow" | "late" | status, "times"?: n, "seconds"?: s}'
        )
    times, seconds = body.get("times"), body.get("seconds", 0)
    if not (times is None or type(times) is int) or type(seconds) not in (int, float):
        raise ValueError("times is a whole number, seconds a number")
    return call_named(str(body["call"])), Fault(body["how"], times, seconds)


def call_named(name: str) -> Call:
    """The call of that name. Raises ValueError if there is none."""
    if name not in CALLS:
        raise ValueError(f"call must be one of {', '.join(CALLS)}, not {name!r}")
    return name
