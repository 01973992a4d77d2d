"""What comes in at POST /events is taken whole or refused whole, and what is not known is kept and passed over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nullworker.collector import batch
from nullworker.errors import BodyTooLarge, Invalid
from nullworker.eventlog import cloudevents


def event(**changes: Any) -> dict[str, Any]:
    made = {
        "specversion": "1.0",
        "id": "5-ab12",
        "source": "nullworker/1/x",
        "type": "nullworker.reservation.held",
        "subject": "r1",
        "time": "2026-11-26T10:00:00.000Z",
        "data": {"version": 1, "at": 1_764_000_000.0, "reason": None, "data": {"ends_at": 1.0}},
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not ...}


def parse(*events: Any) -> list[batch.Received]:
    return batch.parse(json.dumps(events).encode())


def test_an_event_of_a_worker_is_known() -> None:
    [received] = parse(event())
    assert (received.seq, received.kind, received.reservation_id) == (5, "held", "r1")
    assert (received.at, received.reason) == (1_764_000_000.0, None)
    assert json.loads(received.body) == event()


def test_what_a_log_sends_is_known() -> None:
    row = (1, 5.0, "r", "queued", None, '{"kind": "request"}')
    sent = cloudevents.encode(cloudevents.reservation_event("nullworker/1/x", row))
    [received] = batch.parse(b"[" + sent + b"]")
    assert (received.seq, received.kind, received.at, received.body) == (1, "queued", 5.0, sent.decode())


def test_time_of_the_envelope_is_used_where_the_data_have_none() -> None:
    [received] = parse(event(data={"data": {}}))
    assert received.at == 1_795_687_200.0


@pytest.mark.parametrize(
    "strange",
    [
        event(type="com.example.other"),
        event(type="nullworker.reservation.paused"),
        event(specversion="2.0"),
        event(data={"version": 2, "at": 1.0}),
        event(id="not-a-seq"),
        event(subject=...),
        event(subject=5),
        event(data=...),
        event(data="text"),
        event(data={"at": "soon"}, time="later"),
        event(data={"at": -1}),
        event(data={"at": 1e15}),
        event(data={"at": 1.0, "reason": 5}),
        event(data={"at": 1.0, "data": [1]}),
        event(subject="a\0b"),
    ],
)
def test_what_is_not_known_is_kept_as_it_is_and_passed_over(strange: dict[str, Any]) -> None:
    [received] = parse(strange)
    assert (received.kind, received.reservation_id, received.at, received.worker) == (None, None, None, None)
    assert json.loads(received.body) == strange


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not a JSON array"),
        (b"{}", "not a JSON array"),
        (b"[1]", "event 0 is not a CloudEvent"),
        (b'[{"specversion": "1.0"}]', "event 0 is not a CloudEvent"),
        (b"[" + json.dumps(event()).encode() + b", null]", "event 1 is not a CloudEvent"),
        (json.dumps([event(id="")]).encode(), "event 0: id"),
        (json.dumps([event(source="x" * 513)]).encode(), "event 0: source"),
        (json.dumps([event(type="a\0")]).encode(), "event 0: type"),
        (b'[{"specversion":"1.0","id":"1-a","source":"\\ud800","type":"t"}]', "no"),
        (b"\xff\xfe", "not a JSON array"),
        (json.dumps([event(data={"a": json.loads("[" * 250 + "]" * 250)})]).encode(), "200 levels"),
        (b"[" * 100_000, "not a JSON array"),
        (
            b'[{"specversion":"1.0","id":"1-a","source":"s","type":"t","data":' + b"[" * 5000 + b"]" * 5000 + b"}]",
            "no|levels",
        ),
    ],
    ids=range(13),
)
def test_one_malformed_event_refuses_the_whole(body: bytes, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        batch.parse(body)


def test_more_events_than_are_allowed() -> None:
    with pytest.raises(BodyTooLarge, match="10000 events"):
        batch.parse(b"[" + b",".join([b"0"] * 10_001) + b"]")


def test_content_is_the_same_in_another_order_and_spacing() -> None:
    one = json.dumps([event()]).encode()
    other = json.dumps([dict(reversed(event().items()))], indent=3).encode()
    assert batch.parse(one)[0].digest == batch.parse(other)[0].digest
    assert batch.parse(one)[0].digest != parse(event(subject="r2"))[0].digest


def test_source_names_worker_and_instance() -> None:
    assert batch.source_parts("nullworker/a%2Fb/12ab") == ("a/b/12ab", "a/b")
    assert batch.source_parts("https://example.com/x") == ("https://example.com/x", "https://example.com/x")
