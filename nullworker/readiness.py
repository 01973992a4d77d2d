"""Whether this worker takes reservations, and why not: for /readyz, the autoscaler, the metrics and the status page.

Each cause has one owner, and only the owner sets and clears it: the key ring the missing key, the health poll the
consumer, the service the log and the drain, the worker a task of its own that has died.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

WorkerState = Literal["starting", "ready", "errored", "draining"]
WORKER_STATES: Final[tuple[WorkerState, ...]] = ("starting", "ready", "errored", "draining")


class Check(NamedTuple):
    """One line of /readyz."""

    ok: bool
    why: str


class Readiness:
    """The causes for which claims are refused, each a sentence or None.

    Attributes:
        listeners: called whenever a cause changes.
    """

    def __init__(self, *, key: str | None = None, consumer_starting: str | None = None) -> None:
        self.listeners: list[Callable[[], None]] = []
        self._key = key
        self._starting = consumer_starting
        self._asked = consumer_starting is not None
        self._late: str | None = None
        self._unhealthy: str | None = None
        self._log: str | None = None
        self._draining: str | None = None
        self._dead_part: str | None = None

    # -- setters, one owner each -----------------------------------------------------------------------------------

    def key_is_missing(self, why: str) -> None:
        """Requests cannot be verified. Owner: the key ring."""
        self._set(_key=why)

    def key_is_loaded(self) -> None:
        """Requests can be verified. Owner: the key ring."""
        self._set(_key=None)

    def consumer_is_starting(self, why: str) -> None:
        """The consumer has not been healthy even once. Owner: the health poll."""
        self._set(_starting=why)

    def consumer_is_late(self, why: str) -> None:
        """The consumer has not been healthy even once, for longer than a start should take. Owner: the health poll."""
        self._set(_late=why)

    def consumer_is_unhealthy(self, why: str) -> None:
        """The consumer, once healthy, is not any more. Owner: the health poll, through the service."""
        self._set(_unhealthy=why)

    def consumer_is_healthy(self) -> None:
        """The consumer's last answer was good. Owner: the health poll."""
        self._set(_starting=None, _late=None, _unhealthy=None)

    def log_has_failed(self, why: str) -> None:
        """The event log cannot be written. Owner: the service."""
        self._set(_log=why)

    def log_works(self) -> None:
        """The event log can be written. Owner: the service."""
        self._set(_log=None)

    def drain(self, why: str) -> None:
        """The worker is stopping, for good. Owner: the service."""
        self._set(_draining=why)

    def part_has_died(self, why: str) -> None:
        """A task of the worker has died, for good. Owner: the worker."""
        self._set(_dead_part=why)

    # -- derived state --------------------------------------------------------------------------------------------

    @property
    def key(self) -> str | None:
        """Why requests cannot be verified."""
        return self._key

    @property
    def log(self) -> str | None:
        """Why the event log cannot be written."""
        return self._log

    @property
    def draining(self) -> str | None:
        """Why the worker stops."""
        return self._draining

    @property
    def consumer(self) -> str | None:
        """Why no reservation is taken for the consumer: it has not been healthy yet, or is unhealthy."""
        return self._unhealthy or self._starting

    @property
    def consumer_healthy(self) -> bool | None:
        """Whether the consumer is healthy; None: it is not polled."""
        return self.consumer is None if self._asked else None

    @property
    def late(self) -> bool:
        """Whether the consumer's start takes longer than it should."""
        return self._late is not None

    @property
    def starting(self) -> bool:
        """Whether the consumer has not been healthy even once."""
        return self._starting is not None

    @property
    def unhealthy(self) -> bool:
        """Whether the consumer was healthy once and is not any more."""
        return self._unhealthy is not None

    @property
    def refusal(self) -> str | None:
        """The reason (of fsm/table.py) with which a claim is refused now; None: it is accepted."""
        if self._draining:
            return "draining"
        if self._log:
            return "log_unavailable"
        if self._unhealthy or self._dead_part:
            return "errored"
        if self._starting or self._key:
            return "not_ready"
        return None

    @property
    def state(self) -> WorkerState:
        """The state of the worker."""
        if self._draining:
            return "draining"
        if self._log or self._unhealthy or self._dead_part:
            return "errored"
        if self._starting or self._key:
            return "starting"
        return "ready"

    @property
    def loaded(self) -> bool:
        """Whether the worker is loaded in the autoscaler's sense: from then on max_perf is reported."""
        return not (self._starting or self._key)

    @property
    def error_msg(self) -> str:
        """The causes as reported to the autoscaler, or "". Neither a drain nor a start that is not late is an error."""
        return "; ".join(cause for cause in (self._dead_part, self._log, self._unhealthy or self._late) if cause)

    def checks(self) -> dict[str, Check]:
        """The checks of /readyz by name."""
        stops = self._dead_part or self._draining
        healthy = "the consumer is healthy" if self._asked else "the consumer is not asked: BACKEND_HEALTH_URL is unset"
        return {
            "log": Check(not self._log, self._log or "the event log is writable"),
            "key": Check(not self._key, self._key or "requests can be verified"),
            "consumer": Check(not self.consumer, self.consumer or healthy),
            "draining": Check(not stops, stops or "not draining"),
        }

    def _set(self, **causes: str | None) -> None:
        changed = any(getattr(self, name) != cause for name, cause in causes.items())
        vars(self).update(causes)
        if changed:
            for listener in self.listeners:
                listener()
