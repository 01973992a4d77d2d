"""The JSON of a reservation, live or from the log, and the final answer to its caller."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

from aiohttp import web
from msgspec import UNSET

from nullworker.clock import elapsed, from_shown, iso, tidy
from nullworker.errors import RETRY_AFTER_SECONDS, Gone
from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.queries import ReservationJson
from nullworker.fsm.book import Reservation
from nullworker.fsm.table import ending
from nullworker.http.responses import RESERVATION_HEADER, json_response
from nullworker.logs import get_log
from nullworker.service import Service

log = get_log(__name__)


def reservation_json(reservation: Reservation, now: float) -> ReservationJson:
    """A live reservation, in the shape that the log's view `reservations` gives one."""
    held_at, ended_at = reservation.held_at, reservation.ended_at
    held, ends, ended = (None if at is None else iso(at) for at in (held_at, reservation.ends_at, ended_at))
    return {
        "id": reservation.id,
        "kind": reservation.terms.kind,
        "state": reservation.state,
        "reason": reservation.reason,
        "queued_at": iso(reservation.queued_at),
        "held_at": held,
        "ends_at": ends,
        "ended_at": ended,
        "queued_seconds": elapsed(reservation.queued_at, held_at or ended_at or now),
        "held_seconds": None if held_at is None else elapsed(held_at, ended_at or now),
        "duration_cap": tidy(reservation.terms.duration_cap),
        "request_idx": reservation.terms.request_idx,
        "metadata": reservation.terms.metadata,
        "result": None if reservation.result is UNSET else reservation.result,
    }


class FinalStatusJson(TypedDict):
    """How a reservation ended, for its owner; fields as in ReservationJson."""

    state: str
    reason: str | None
    held_at: str | None
    ended_at: str | None
    held_seconds: float | None
    result: Any


def final_status(known: ReservationJson) -> FinalStatusJson:
    """The final status of a reservation; of a live one, its present status."""
    return {
        "state": known["state"],
        "reason": known["reason"],
        "held_at": known["held_at"],
        "ended_at": known["ended_at"],
        "held_seconds": known["held_seconds"],
        "result": known["result"],
    }


def find(service: Service, event_log: EventLog, reservation_id: str) -> ReservationJson | None:
    """A reservation by its id: live, ended but not yet written, or in the log. None: it is unknown."""
    reservation = service.find(reservation_id)
    if reservation is not None:
        return reservation_json(reservation, service.now())
    return queries.reservation(event_log.conn, reservation_id)


async def newest(
    service: Service, event_log: EventLog, *, state: str | None, limit: int, before: str | None
) -> list[ReservationJson]:
    """The newest reservations first: those with events not yet written, then those of the log.

    Yields after each batch of the search so that the event loop stays responsive.

    Raises:
        ValueError: before is neither a known id nor a time.
    """
    unwritten = {commit.reservation.id: commit.reservation for commit in reversed(service.unwritten)}
    first = list(unwritten.values())
    if before in unwritten:
        first, before = first[list(unwritten).index(before) + 1 :], None
    elif before is not None:
        try:
            at = from_shown(before)
        except ValueError:  # an id of the log: those in memory were on an earlier page
            at = 0.0
        first = [reservation for reservation in first if reservation.queued_at < at]
    rows = [reservation_json(reservation, service.now()) for reservation in first if state in (None, reservation.state)]
    batches = queries.batches(event_log.conn, state=state, limit=limit + len(unwritten), before=before)
    while len(rows) < limit and (batch := next(batches, None)) is not None:
        rows += [row for row in batch if row["id"] not in unwritten]
        await asyncio.sleep(0)
    return rows[:limit]


def ended_error(row: ReservationJson) -> Gone:
    """The answer to the owner of an ended reservation, for a claim, a ping or a wait."""
    message = f"{row['kind']} {row['id']} has ended"
    return Gone(message, about=row["id"], reservation_id=row["id"], **final_status(row))


def warn_if_capped(reservation: Reservation, duration: float | None) -> None:
    """Say that this worker holds for less long than its caller believes. Seconds."""
    cap = reservation.terms.duration_cap
    if duration is not None and duration > cap and reservation.reason is None:
        log.warning(
            "duration_capped",
            reservation_id=reservation.id,
            asked_seconds=tidy(duration),
            cap_seconds=tidy(cap),
            message="it is held for the cap only: raise MAX_RESERVATION_SECONDS, or extend it",
        )


def verdict(reservation: Reservation) -> tuple[int, dict[str, Any]]:
    """Status and body for the caller of /reserve: how the reservation has ended.

    Whoever waits for a session's end gets 410 in place of 503: the official client repeats a 503, and loses the reason.
    """
    assert reservation.ended_at is not None
    held_at = reservation.held_at
    edge = ending(reservation.state, reservation.reason, was_held=held_at is not None)
    assert edge.status is not None
    if edge.status == 503 and reservation.terms.kind == "session" and held_at is not None:
        ended = reservation_json(reservation, reservation.ended_at)
        return 410, {"error": edge.says, "reservation_id": reservation.id, **final_status(ended)}
    if edge.status != 200:
        return edge.status, {"error": edge.says, "reservation_id": reservation.id, "reason": reservation.reason}
    assert held_at is not None
    if reservation.state == "expired":
        assert reservation.ends_at is not None
        return 200, {"released": reservation.reason, "duration": elapsed(held_at, reservation.ends_at)}
    body = {
        "released": reservation.reason,
        "duration_cap": tidy(reservation.terms.duration_cap),
        "reservation_id": reservation.id,
        "queued_seconds": elapsed(reservation.queued_at, held_at),
        "held_seconds": elapsed(held_at, reservation.ended_at),
    }
    if reservation.result is not UNSET:
        body["result"] = reservation.result
    return 200, body


def verdict_response(reservation: Reservation) -> web.Response:
    """The answer to /reserve without a stream."""
    status, body = verdict(reservation)
    headers = {RESERVATION_HEADER: reservation.id}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return json_response(body, status, headers)
