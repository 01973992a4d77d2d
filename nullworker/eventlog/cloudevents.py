"""Encodes events of the log as CloudEvents 1.0, for the sink.

`source` names the log, `id` the event in it, `type` its kind, `subject` the reservation, and `data` is the event itself
(`EventData`). `batch` encodes several as `application/cloudevents-batch+json` or as one line each. `worker_event`
encodes events of the worker itself.

Auth hashes, on_close_route and on_close_payload are never sent. Results are sent only on request, and metadata unless
that is disabled.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec
from msgspec import UNSET, UnsetType

from nullworker.clock import iso
from nullworker.eventlog.queries import public_data

#: Version of `EventData`. A reader that does not know it must pass the event over.
VERSION: Final = 1
SPECVERSION: Final = "1.0"
RESERVATION_TYPE: Final = "nullworker.reservation."
WORKER_TYPE: Final = "nullworker.worker."
BATCH_TYPE: Final = "application/cloudevents-batch+json"
NDJSON_TYPE: Final = "application/x-ndjson"
#: Request header with the log's random key in hexadecimal: who has it may write under the log's `source`.
KEY_HEADER: Final = "Nullworker-Log-Key"
#: Characters of an event's checksum: 64 bits tell two events of one seq apart.
CHECKSUM_CHARACTERS: Final = 16

Format = Literal["cloudevents", "ndjson"]
WorkerKind = Literal["started", "stopped", "alive"]
#: A row of the table `events`: seq, at, reservation_id, kind, reason, data as JSON.
Row = tuple[int, float, str, str, "str | None", str]


class EventData(msgspec.Struct, kw_only=True):
    """`data` of a reservation's CloudEvent: the row of the log's table `events`."""

    version: int = VERSION
    seq: int  # of the event in its log
    at: float  # epoch seconds of the worker's clock
    reservation_id: str
    kind: str
    reason: str | None
    data: dict[str, Any]  # what belongs to the kind; times are epoch seconds, durations seconds


class CloudEvent(msgspec.Struct, kw_only=True):
    """The attributes that nullworker uses, under the names of CloudEvents 1.0."""

    specversion: str = SPECVERSION
    id: str
    source: str
    type: str
    subject: str | UnsetType = UNSET
    time: str
    datacontenttype: str = "application/json"
    data: EventData | dict[str, Any]


_encoder: Final = msgspec.json.Encoder()


def source(instance: str, log_id: str) -> str:
    """The `source` of a log. `instance`: CONTAINER_ID, or the host's name where there is none."""
    return f"nullworker/{quote(instance, safe='')}/{log_id}"


def reservation_event(
    log_source: str, row: Row, *, with_metadata: bool = True, with_results: bool = False
) -> CloudEvent:
    """A row of the log as it leaves the machine.

    Raises:
        ValueError: its data is no JSON object.
    """
    seq, at, reservation_id, kind, reason, text = row
    data = public_data(msgspec.json.decode(text, type=dict[str, Any]))
    metadata, result = data.pop("metadata", UNSET), data.pop("result", UNSET)
    event_id = f"{seq}-{_checksum(seq, at, reservation_id, kind, reason, data)}"
    if metadata is not UNSET and with_metadata:
        data["metadata"] = metadata
    if result is not UNSET and with_results:
        data["result"] = result
    return CloudEvent(
        id=event_id,
        source=log_source,
        type=f"{RESERVATION_TYPE}{kind}",
        subject=reservation_id,
        time=iso(at),
        data=EventData(seq=seq, at=at, reservation_id=reservation_id, kind=kind, reason=reason, data=data),
    )


def worker_event(log_source: str, kind: WorkerKind, at: float, data: dict[str, Any]) -> CloudEvent:
    """An event about the worker itself, which is not in the log.

    Args:
        at: epoch seconds of its clock: when it happened.
        data: of `started`: version, url, instance, gpus (names); of all: clock, epoch seconds of the worker's clock as
            the event is sent.
    """
    return CloudEvent(
        id=f"{kind}-{secrets.token_hex(8)}",
        source=log_source,
        type=f"{WORKER_TYPE}{kind}",
        time=iso(at),
        data={"at": at, **data},
    )


def encode(event: CloudEvent) -> bytes:
    """One event as JSON, on one line."""
    return _encoder.encode(event)


def batch(encoded: Iterable[bytes], form: Format) -> tuple[bytes, str]:
    """A body of encoded events, and its content type."""
    if form == "ndjson":
        return b"".join(event + b"\n" for event in encoded), NDJSON_TYPE
    return b"[" + b",".join(encoded) + b"]", BATCH_TYPE


def _checksum(*parts: Any) -> str:
    """Of what every setting sends: the same with or without metadata and results, and it tells nothing of them."""
    return hashlib.sha256(_encoder.encode(parts)).hexdigest()[:CHECKSUM_CHARACTERS]
