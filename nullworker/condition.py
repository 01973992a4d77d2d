"""Whether this worker may take a reservation, and if not, why: for /readyz, the autoscaler, the metrics and people.

The one rule: every part of the worker that can stand in the way writes its cause here, in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

WorkerState = Literal["starting", "ready", "errored", "draining"]
WORKER_STATES: Final[tuple[WorkerState, ...]] = ("starting", "ready", "errored", "draining")


class Check(NamedTuple):
    """One line of /readyz."""

    ok: bool
    why: str


class Condition:
    """The causes, each None while all is well.

    Attributes:
        key: why requests cannot be verified yet.
        starting: why the consumer has not been healthy even once.
        unhealthy: why the consumer, once healthy, is not any more.
        log: why the event log cannot be written.
        draining: why the worker stops.
        listeners: called whenever a cause comes, goes or changes.
    """

    def __init__(self, *, key: str | None, starting: str | None) -> None:
        self.listeners: list[Callable[[], None]] = []
        self.key = key
        self.starting = starting
        self.unhealthy: str | None = None
        self.log: str | None = None
        self.draining: str | None = None

    def __setattr__(self, name: str, cause: Any) -> None:
        changed = cause != getattr(self, name, cause)
        super().__setattr__(name, cause)
        if changed:
            for listener in self.listeners:
                listener()

    @property
    def refusal(self) -> str | None:
        """The reason with which a claim is refused now, a word of fsm/table.py; None: it is not."""
        if self.draining:
            return "draining"
        if self.log:
            return "log_unavailable"
        if self.unhealthy:
            return "errored"
        if self.starting or self.key:
            return "not_ready"
        return None

    @property
    def state(self) -> WorkerState:
        """One word for all of it."""
        if self.draining:
            return "draining"
        if self.log or self.unhealthy:
            return "errored"
        if self.starting or self.key:
            return "starting"
        return "ready"

    @property
    def loaded(self) -> bool:
        """Whether the worker has been able to work, as the autoscaler means it: max_perf is reported from then on."""
        return not (self.starting or self.key)

    @property
    def error_msg(self) -> str:
        """What the autoscaler is told: the cause, or nothing. A drain or a slow start is no error."""
        return "; ".join(cause for cause in (self.log, self.unhealthy) if cause)

    def checks(self) -> dict[str, Check]:
        """Each thing that must be right, and why it is not."""
        return {
            "log": Check(not self.log, self.log or "the event log is writable"),
            "key": Check(not self.key, self.key or "requests can be verified"),
            "consumer": Check(
                not (self.starting or self.unhealthy), self.unhealthy or self.starting or "the consumer is healthy"
            ),
            "draining": Check(not self.draining, self.draining or "not draining"),
        }
