"""The events of the log: one frozen struct for each kind of data, and their encoding as table rows.

Times are epoch seconds and are passed in. The stored `kind` is a word from the registry `DATA_OF`, never a class name,
so old logs still replay after a rename. A new field needs a default, and an existing field keeps its meaning; the
golden logs in tests/eventlog check that.

Events hold no secrets: a claim's auth_data is stored as its SHA-256.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from nullworker.errors import LogDamaged
from nullworker.fsm.table import EventKind

ReservationKind = Literal["request", "session"]


class SessionTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """The terms with which a session was created."""

    lifetime: float  # seconds, at most the cap; a ping moves the deadline to now + lifetime
    on_close_route: str | None = None
    on_close_payload: Any = None


class Queued(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `queued`: a claim was made. It has all that is needed to continue after a restart."""

    kind: ReservationKind
    duration_cap: float  # seconds for which it may be held
    give_up_at: float  # epoch seconds at which it leaves the queue; if refused at once, the time of the claim
    request_idx: int | None = None  # the autoscaler's number of the request; None without an envelope
    metadata: dict[str, Any] | None = None
    session: SessionTerms | None = None
    auth_sha256: str | None = None  # of the auth_data it was made with; None for a bare payload's request
    cost: float | None = None  # of a session's grant: its load; None is the load of any reservation, NULL_MAX_PERF


class Held(msgspec.Struct, frozen=True):
    """Data of `held`: the hold began."""

    ends_at: float  # epoch seconds


class Extended(msgspec.Struct, frozen=True):
    """Data of `extended`: its deadline was moved."""

    ends_at: float  # epoch seconds


class Ended(msgspec.Struct, frozen=True):
    """Data of `released`, `expired` and `cancelled`: it has ended."""

    result: Any | UnsetType = UNSET  # given by the consumer with its release
    attached_at: float | UnsetType = UNSET  # epoch seconds at which a consumer first attached


Data = Queued | Held | Extended | Ended

#: The registry of stored kinds: the type of their data.
DATA_OF: Final[dict[EventKind, type[Data]]] = {
    "queued": Queued,
    "held": Held,
    "extended": Extended,
    "released": Ended,
    "expired": Ended,
    "cancelled": Ended,
}


class Event(msgspec.Struct, frozen=True):
    """A change of one reservation."""

    at: float  # epoch seconds
    reservation_id: str
    kind: EventKind
    reason: str | None
    data: Data


_encoder = msgspec.json.Encoder()
_decoders: Final = {kind: msgspec.json.Decoder(data) for kind, data in DATA_OF.items()}

#: The columns of the table `events` after `seq`.
Row = tuple[float, str, str, "str | None", str]


def to_row(event: Event) -> Row:
    """Encode an event as a row."""
    return (event.at, event.reservation_id, event.kind, event.reason, _encoder.encode(event.data).decode())


def from_row(row: Row) -> Event:
    """Decode a row.

    Raises:
        LogDamaged: it is not a valid event.
    """
    at, reservation_id, kind, reason, data = row
    try:
        decoder = _decoders[kind]  # type: ignore[index]  # an unknown kind is the KeyError below
        return Event(float(at), str(reservation_id), kind, reason, decoder.decode(data))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise LogDamaged(f"an event of kind {kind!r} for {reservation_id!r} cannot be read: {error}") from error
