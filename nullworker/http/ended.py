"""EndedClaims: finds the final status of an ended claim by the auth_data of its request.

A caller whose answer was lost sends the same body again, or asks by the session's id. Ended reservations are in the
log; only the hashes of the newest are in memory, so that a claim needs no search.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from nullworker.eventlog import queries
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.queries import ReservationJson
from nullworker.fsm.table import ENDED
from nullworker.http.auth import owns
from nullworker.http.reservations import find
from nullworker.service import Commit, Service

#: Number of ended claims that are known by their auth_data.
REMEMBERED: Final = 1000


class EndedClaims:
    """Ended claims by their auth. Add `observe` to the service's observers.

    A request that its own caller hung up on is not remembered: asking again for it is a new claim.
    """

    def __init__(self, service: Service, event_log: EventLog) -> None:
        self._service = service
        self._log = event_log
        self._ids: OrderedDict[tuple[str, str], str] = OrderedDict()
        for kind, auth_sha256, reservation_id in queries.ended_holds(event_log.conn, limit=REMEMBERED):
            self._ids[kind, auth_sha256] = reservation_id

    def observe(self, commit: Commit) -> None:
        """An event was committed."""
        reservation = commit.reservation
        auth_sha256 = reservation.terms.auth_sha256
        if commit.event.kind not in ENDED or reservation.held_at is None or auth_sha256 is None:
            return
        if reservation.reason == "client_disconnect":
            return
        self._ids[reservation.terms.kind, auth_sha256] = reservation.id
        if len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)

    def made_with(self, kind: str, auth_sha256: str) -> ReservationJson | None:
        """The ended reservation of that kind that was made with this auth and was held; None: there is none."""
        reservation_id = self._ids.get((kind, auth_sha256))
        return None if reservation_id is None else find(self._service, self._log, reservation_id)

    def session(self, session_id: str, auth: Any) -> ReservationJson | None:
        """The ended session with that id, for a caller with its auth_data; None for any other caller.

        Raises:
            Invalid: the auth nests too deep to be compared.
        """
        reservation = self._service.find(session_id)
        kind, auth_sha256 = (
            queries.claimed_by(self._log.conn, session_id)
            if reservation is None
            else (reservation.terms.kind, reservation.terms.auth_sha256)
        )
        if kind != "session" or auth_sha256 is None or not owns(auth, auth_sha256):
            return None
        row = find(self._service, self._log, session_id)
        return row if row is not None and row["state"] in ENDED else None
