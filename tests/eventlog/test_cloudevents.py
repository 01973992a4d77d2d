"""What leaves the machine: the official SDK must read it, and what must stay does stay."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured_event
from cloudevents.core.v1.event import CloudEvent

from nullworker.eventlog import cloudevents as ce

SOURCE = ce.source("123", "ab12")
SECRETS = {"on_close_route": "http://10.0.0.1/done", "on_close_payload": {"token": "t0ken"}}


def row(seq: int = 7, kind: str = "queued", data: dict[str, Any] | None = None, **changes: Any) -> ce.Row:
    values = {"at": 1_764_000_000.123, "reservation_id": "0123456789abcdef", "reason": None, **changes}
    return (seq, values["at"], values["reservation_id"], kind, values["reason"], json.dumps(data or {}))


def sent(*events: ce.CloudEvent) -> list[dict[str, Any]]:
    body, _ = ce.batch([ce.encode(event) for event in events], "cloudevents")
    found: list[dict[str, Any]] = json.loads(body)
    return found


def by_the_sdk(event: bytes) -> CloudEvent:
    """One event, as the official SDK reads and checks it; of batches it knows nothing."""
    read = from_structured_event(HTTPMessage({"content-type": "application/cloudevents+json"}, event))
    assert isinstance(read, CloudEvent)
    return read


def test_the_official_sdk_reads_a_batch() -> None:
    events = [
        ce.reservation_event(SOURCE, row(7, "queued", {"kind": "request", "metadata": {"job": "ü-1"}})),
        ce.reservation_event(SOURCE, row(8, "held", {"ends_at": 1_764_000_600.5})),
        ce.worker_event(SOURCE, "started", 1_764_000_000.0, {"version": "1"}),
    ]
    body, content_type = ce.batch([ce.encode(event) for event in events], "cloudevents")

    assert content_type == "application/cloudevents-batch+json"
    read = [by_the_sdk(json.dumps(each).encode()) for each in json.loads(body)]

    assert [each.get_type() for each in read] == [
        "nullworker.reservation.queued",
        "nullworker.reservation.held",
        "nullworker.worker.started",
    ]
    assert read[0].get_source() == "nullworker/123/ab12"
    assert read[0].get_subject() == "0123456789abcdef"
    assert read[0].get_id().startswith("7-")
    assert (at := read[0].get_time())
    assert at.timestamp() == pytest.approx(1_764_000_000.123)
    first = read[0].get_data()
    assert isinstance(first, dict)
    assert first["data"]["metadata"] == {"job": "ü-1"}
    assert read[1].get_data() == {
        "version": 1,
        "seq": 8,
        "at": 1_764_000_000.123,
        "reservation_id": "0123456789abcdef",
        "kind": "held",
        "reason": None,
        "data": {"ends_at": 1_764_000_600.5},
    }


def test_ndjson_is_the_same_events_one_a_line() -> None:
    events = [ce.encode(ce.reservation_event(SOURCE, row(seq, data={"metadata": {"text": "a\nb"}}))) for seq in (1, 2)]
    body, content_type = ce.batch(events, "ndjson")
    assert content_type == "application/x-ndjson"
    lines = body.splitlines()
    assert [json.loads(line) for line in lines] == json.loads(ce.batch(events, "cloudevents")[0])
    for line in lines:
        assert by_the_sdk(line).get_source() == SOURCE


def test_no_auth_hash_and_nothing_of_a_callback_is_sent() -> None:
    data = {"kind": "session", "auth_sha256": "f" * 64, "session": {"lifetime": 60, **SECRETS}}
    [event] = sent(ce.reservation_event(SOURCE, row(data=data), with_results=True))
    assert event["data"]["data"]["session"] == {"lifetime": 60}
    text = json.dumps(event)
    assert not any(word in text for word in ("ffff", "10.0.0.1", "t0ken", "on_close"))


@pytest.mark.parametrize(
    ("with_metadata", "with_results"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_metadata_and_results_are_sent_as_they_are_set(*, with_metadata: bool, with_results: bool) -> None:
    event = ce.reservation_event(
        SOURCE,
        row(data={"metadata": {"job": 1}, "result": {"exit_code": 0}, "ends_at": 1.0}),
        with_metadata=with_metadata,
        with_results=with_results,
    )
    data = sent(event)[0]["data"]["data"]
    assert ("metadata" in data, "result" in data, data["ends_at"]) == (with_metadata, with_results, 1.0)


def test_id_is_that_of_the_event_and_not_of_what_the_settings_leave_of_it() -> None:
    full = row(data={"metadata": {"job": 1}, "result": {"exit_code": 0}})
    ids = {
        ce.reservation_event(SOURCE, full, with_metadata=metadata, with_results=results).id
        for metadata in (True, False)
        for results in (True, False)
    }
    assert len(ids) == 1
    others = (row(at=1.0), row(reservation_id="f" * 16), row(kind="held"), row(reason="x"), row(data={"ends_at": 1}))
    assert len({ce.reservation_event(SOURCE, each).id for each in others} | ids) == 6


def test_an_instance_is_no_path() -> None:
    assert ce.source("a/b c", "1") == "nullworker/a%2Fb%20c/1"


def test_what_a_worker_tells_of_itself_says_when_and_no_two_are_the_same() -> None:
    first, second = (ce.worker_event(SOURCE, "stopped", 5.0, {"clock": 6.0}) for _ in range(2))
    assert first.data == {"at": 5.0, "clock": 6.0}
    assert first.time == "1970-01-01T00:00:05.000Z"
    assert first.id != second.id
