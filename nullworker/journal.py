"""What the service asks of the log, so that a test can give it another (nullworker.testing).

The one rule: every journal passes the same contract, `nullworker.testing.fakes.check_journal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from nullworker.clock import Anchor
from nullworker.fsm.events import Event


class Journal(Protocol):
    """Where events are kept: the log, or a fake that passes the same contract (nullworker.testing)."""

    @property
    def last_seq(self) -> int:
        """The seq of the last event that is written."""
        ...

    def append(self, events: Sequence[tuple[int, Event]]) -> None:
        """All or none. Raises LogUnavailable."""
        ...

    def live(self) -> Iterator[tuple[int, Event]]:
        """The events of what has not ended."""
        ...

    def store_anchor(self, anchor: Anchor) -> None:
        """Keep the clock's anchor. Raises LogUnavailable."""
        ...

    def probe(self) -> None:
        """Write something that does not matter. Raises LogUnavailable."""
        ...
