"""The reservations whose bodies run in this process, for threads that cannot wait for the event loop."""

from __future__ import annotations

import threading
from typing import Final

from nullworker.clock import stopwatch

#: Seconds for which a job may run after the end of its reservation, to clean up or to end after SIGTERM.
PATIENCE_SECONDS: Final = 15.0

#: Set while the consumer is stopping. A cancellation alone may be lost: some queue clients swallow it.
stopping = threading.Event()

_held: dict[str, str] = {}  # the url of the control port, by the reservation's id
_ended: dict[str, float] = {}


def entered(url: str, reservation_id: str) -> None:
    """The body of a reservation has begun."""
    _held[reservation_id] = url


def ended(reservation_id: str) -> None:
    """The reservation has ended, but its body has not."""
    _held.pop(reservation_id, None)
    _ended.setdefault(reservation_id, stopwatch())


def left(reservation_id: str) -> None:
    """The body has ended."""
    _held.pop(reservation_id, None)
    _ended.pop(reservation_id, None)


def held() -> list[tuple[str, str]]:
    """The control port and the id of each held reservation."""
    return [(url, reservation_id) for reservation_id, url in tuple(_held.items())]


def overdue() -> str | None:
    """For the health endpoint: a message about a job that still runs long after the end of its reservation."""
    for reservation_id, since in tuple(_ended.items()):
        seconds = stopwatch() - since
        if seconds > PATIENCE_SECONDS:
            return f"the job of reservation {reservation_id}, which ended {seconds:.0f} s ago, still runs"
    return None
