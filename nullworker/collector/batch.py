"""Parses and checks the body of POST /events: CloudEvents in, `Received` out. No I/O.

An event needs the attributes that CloudEvents 1.0 requires (specversion, id, source, type), as strings. Unknown types,
fields, versions and kinds are stored unchanged, without a `kind`, and the views ignore them.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from nullworker.clock import from_iso
from nullworker.errors import BodyTooLarge, Invalid
from nullworker.eventlog.cloudevents import RESERVATION_TYPE, SPECVERSION, VERSION, WORKER_TYPE
from nullworker.fsm.table import EVENT_KINDS

#: A sink sends at most 500 events or 1 MiB; the rest is room for another sender.
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
MAX_EVENTS: Final = 10_000
#: Characters of an id, a source, a type, a subject.
MAX_ATTRIBUTE: Final = 512
#: Levels of objects and arrays: SQLite's JSON functions end at 1000, and no event of ours comes near.
MAX_DEPTH: Final = 200
#: The year 2100 in epoch seconds; a later time is invalid.
LATEST: Final = 4_102_444_800.0
_ID: Final = re.compile(r"(\d{1,18})-([0-9A-Za-z]+)")
_SOURCE: Final = re.compile(r"nullworker/([^/]+)/([^/]+)")


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One event, ready to be stored.

    `kind` and all fields after it are None if the views ignore the event.
    """

    source: str
    event_id: str
    type: str
    seq: int | None  # in its log, from the id
    digest: str  # of the content, independent of the order of keys and of white space
    body: str  # the JSON as it came
    kind: str | None = None  # of a reservation's event
    reservation_id: str | None = None
    reason: str | None = None
    at: float | None = None  # epoch seconds of the sender's clock
    worker: dict[str, Any] | None = None  # data of a nullworker.worker event


class _Attributes(msgspec.Struct):
    """The attributes that CloudEvents 1.0 requires, and the others that are used here."""

    specversion: str
    id: str
    source: str
    type: str
    subject: Any = None
    time: Any = None
    data: Any = None


_attributes: Final = msgspec.json.Decoder(_Attributes)
_sorted: Final = msgspec.json.Encoder(order="deterministic")


def parse(body: bytes, *, single: bool = False) -> list[Received]:
    """The events of a batch (a JSON array), or with `single`, the one event in the body.

    Raises:
        Invalid: the body or an event is malformed, and nothing may be stored.
        BodyTooLarge: there are more than MAX_EVENTS.
    """
    try:
        raws = [msgspec.Raw(body)] if single else msgspec.json.decode(body, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"the body is not a JSON array of CloudEvents: {error}") from None
    if len(raws) > MAX_EVENTS:
        raise BodyTooLarge(f"a batch may have at most {MAX_EVENTS} events; this one has {len(raws)}")
    return [_event(bytes(raw), index) for index, raw in enumerate(raws)]


def source_parts(source: str) -> tuple[str, str]:
    """The worker and the instance of a source: `("123/ab12", "123")` of `nullworker/123/ab12`.

    A source in another format is its own worker and instance.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        return source, source
    instance = unquote(match[1], errors="replace")
    return f"{instance}/{match[2]}", instance


def _event(raw: bytes, index: int) -> Received:
    try:
        text = raw.decode()
        attributes = _attributes.decode(raw)
        content = msgspec.json.decode(raw)
        too_deep = _depth(content) > MAX_DEPTH
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"event {index} is not a CloudEvent: {error}", index=index) from None
    if too_deep:
        raise Invalid(f"event {index} has more than {MAX_DEPTH} levels of objects and arrays", index=index)
    for name in ("specversion", "id", "source", "type"):
        value = getattr(attributes, name)
        if not value or len(value) > MAX_ATTRIBUTE or "\0" in value:
            raise Invalid(f"event {index}: {name} must have 1 to {MAX_ATTRIBUTE} characters", index=index)
    match = _ID.fullmatch(attributes.id)
    known = _known(attributes, None if match is None else int(match[1]))
    return Received(
        source=attributes.source,
        event_id=attributes.id,
        type=attributes.type,
        seq=None if match is None else int(match[1]),
        digest=hashlib.sha256(_sorted.encode(content)).hexdigest()[:32],
        body=text,
        **known,
    )


def _known(attributes: _Attributes, seq: int | None) -> dict[str, Any]:
    """The fields that the views show; empty for an event that they ignore."""
    data = attributes.data
    if attributes.specversion != SPECVERSION or not isinstance(data, dict):
        return {}
    at = _at(data.get("at"), attributes.time)
    if at is None:
        return {}
    if attributes.type.startswith(WORKER_TYPE):
        return {"at": at, "worker": data}
    if data.get("version", VERSION) != VERSION:
        return {}
    kind, reason = attributes.type.removeprefix(RESERVATION_TYPE), data.get("reason")
    reservation_id = attributes.subject
    fits = (
        attributes.type.startswith(RESERVATION_TYPE)
        and kind in EVENT_KINDS
        and seq is not None
        and isinstance(reservation_id, str)
        and 0 < len(reservation_id) <= MAX_ATTRIBUTE
        and "\0" not in reservation_id
        and (reason is None or isinstance(reason, str))
        and isinstance(data.get("data", {}), dict)
    )
    return {"kind": kind, "reservation_id": reservation_id, "reason": reason, "at": at} if fits else {}


def _at(at: Any, time: Any) -> float | None:
    """The time in epoch seconds: of the data, else of the attribute `time`; None: there is none."""
    if isinstance(at, (int, float)) and not isinstance(at, bool):
        return float(at) if math.isfinite(at) and 0 <= at <= LATEST else None
    try:
        seconds = from_iso(time)
    except (ValueError, AttributeError, TypeError, OverflowError):
        return None
    return seconds if 0 <= seconds <= LATEST else None


def _depth(value: Any) -> int:
    """Levels of objects and arrays."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, (dict, list)):
            deepest = max(deepest, level)
            stack += [(inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest
