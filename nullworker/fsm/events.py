"""The events of the log: one frozen struct for each kind of data, and their encoding as table rows.

Times are epoch seconds and are passed in. The stored `kind` is a word from the registry `DATA_OF`, never a class name,
so old logs still replay after a rename. A new field needs a default, and an existing field keeps its meaning; the
golden logs in tests/eventlog check that.

Events hold no secrets: a session's auth_data is stored as a SHA-256.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from nullworker.errors import LogDamaged
from nullworker.fsm.table import EventKind

ReservationKind = Literal["request", "session"]


class SessionTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a session was created with."""

    lifetime: float  # seconds; each ping renews by it
    auth_sha256: str  # of the auth_data that may end it
    on_close_route: str | None = None
    on_close_payload: Any = None


class Queued(msgspec.Struct, frozen=True, omit_defaults=True):
    """A claim was made: `queued`. It holds all that is needed to go on with it after a restart."""

    kind: ReservationKind
    duration_cap: float  # seconds that it may be held
    give_up_at: float  # epoch seconds at which waiting ends; of one that is refused at once, those of its claim
    request_idx: int | None = None  # the autoscaler's number for it; None without an envelope
    metadata: dict[str, Any] | None = None
    session: SessionTerms | None = None


class Held(msgspec.Struct, frozen=True):
    """It got the slot: `held`."""

    ends_at: float  # epoch seconds


class Extended(msgspec.Struct, frozen=True):
    """Its deadline was moved: `extended`."""

    ends_at: float  # epoch seconds


class Ended(msgspec.Struct, frozen=True):
    """It is over: `released`, `expired`, `cancelled`."""

    result: Any | UnsetType = UNSET  # what the consumer handed over with its release
    attached_at: float | UnsetType = UNSET  # epoch seconds at which a consumer first attached


Data = Queued | Held | Extended | Ended

#: The explicit registry: a stored kind and the type of its data.
DATA_OF: Final[dict[EventKind, type[Data]]] = {
    "queued": Queued,
    "held": Held,
    "extended": Extended,
    "released": Ended,
    "expired": Ended,
    "cancelled": Ended,
}


class Event(msgspec.Struct, frozen=True):
    """One thing that has happened to one reservation."""

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
    """The event as it is stored."""
    return (event.at, event.reservation_id, event.kind, event.reason, _encoder.encode(event.data).decode())


def from_row(row: Row) -> Event:
    """The event that was stored.

    Raises:
        LogDamaged: the row is no event of this project.
    """
    at, reservation_id, kind, reason, data = row
    try:
        decoder = _decoders[kind]  # type: ignore[index]  # an unknown kind is the KeyError below
        return Event(float(at), str(reservation_id), kind, reason, decoder.decode(data))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise LogDamaged(f"an event of kind {kind!r} for {reservation_id!r} cannot be read: {error}") from error
