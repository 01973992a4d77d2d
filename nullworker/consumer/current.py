"""The reservations whose bodies run in this process: for the threads that must know without asking the event loop."""

from __future__ import annotations

import threading
from typing import Final

from nullworker.clock import stopwatch

#: Seconds for which a job may go on after its reservation: to clean up, or to end by SIGTERM.
PATIENCE_SECONDS: Final = 15.0

#: Set when the consumer was told to stop. A cancellation alone may be lost: clients of queues have swallowed some.
stopping = threading.Event()

_held: dict[str, str] = {}  # the url of the control port, by the reservation's id
_ended: dict[str, float] = {}


def entered(url: str, reservation_id: str) -> None:
    """Its body has begun."""
    _held[reservation_id] = url


def ended(reservation_id: str) -> None:
    """It has ended, and its body has not."""
    _held.pop(reservation_id, None)
    _ended.setdefault(reservation_id, stopwatch())


def left(reservation_id: str) -> None:
    """Its body has ended."""
    _held.pop(reservation_id, None)
    _ended.pop(reservation_id, None)


def held() -> list[tuple[str, str]]:
    """Those that are held: control port and id."""
    return [(url, reservation_id) for reservation_id, url in tuple(_held.items())]


def overdue() -> str | None:
    """For the health endpoint: a job that still runs long after its reservation, in words."""
    for reservation_id, since in tuple(_ended.items()):
        seconds = stopwatch() - since
        if seconds > PATIENCE_SECONDS:
            return f"the job of reservation {reservation_id}, which ended {seconds:.0f} s ago, still runs"
    return None
