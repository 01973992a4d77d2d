"""Writes a log line for each committed event, with the kinds and reasons of the event log."""

from __future__ import annotations

from typing import Any

from nullworker.clock import elapsed
from nullworker.fsm.table import ENDED, ending
from nullworker.logs import get_log
from nullworker.service import Commit

log = get_log("nullworker")


def write_log_line(commit: Commit) -> None:
    """An observer: one line for each event."""
    event, reservation = commit.event, commit.reservation
    fields: dict[str, Any] = {"reservation_id": event.reservation_id, "seq": commit.seq}
    if event.reason is not None:
        fields["reason"] = event.reason
    if event.kind == "queued":
        fields["request_idx"] = reservation.terms.request_idx
        fields["claim"] = reservation.terms.kind
    elif event.kind == "held":
        fields["queued_seconds"] = elapsed(reservation.queued_at, event.at)
        if reservation.terms.metadata is not None:  # once, so that shipped lines can be joined to jobs
            fields["metadata"] = reservation.terms.metadata
    elif event.kind in ENDED:
        fields["status"] = ending(event.kind, event.reason, was_held=reservation.held_at is not None).status
        if reservation.held_at is not None:
            fields["held_seconds"] = elapsed(reservation.held_at, event.at)
    log.info(f"reservation_{event.kind}", **fields)
