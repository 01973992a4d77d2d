"""The fleet's database: each event once, whole batches, pinned sources, and views that nothing confuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nullworker.clock import wall
from nullworker.collector import batch, queries
from nullworker.collector.batch import Received
from nullworker.collector.store import Added, Store, StoreUnavailable, open_store
from nullworker.errors import CannotStart, Forbidden
from nullworker.eventlog import cloudevents
from nullworker.eventlog import queries as log_queries

NOW = float(int(wall()))
ONE, TWO = "nullworker/1/a", "nullworker/2/b"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "fleet.db")
    opened.set_options(price=None, prices={}, silence=180)
    opened.conn.create_function("julianday", 1, lambda _: NOW / 86400 + 2440587.5)  # no time passes for its views
    yield opened
    opened.close()


def event(
    source: str, seq: int, kind: str, rid: str = "r1", at: float = NOW, reason: str | None = None, /, **data: Any
) -> Received:
    row = (seq, at, rid, kind, reason, json.dumps(data))
    sent = cloudevents.encode(cloudevents.reservation_event(source, row, with_results=True))
    return batch.parse(b"[" + sent + b"]")[0]


def told(source: str, kind: cloudevents.WorkerKind, at: float = NOW, **data: Any) -> Received:
    return batch.parse(b"[" + cloudevents.encode(cloudevents.worker_event(source, kind, at, data)) + b"]")[0]


def story(
    source: str = ONE, rid: str = "r1", first: int = 1, at: float = NOW - 100, held: float = 60
) -> list[Received]:
    return [
        event(source, first, "queued", rid, at, kind="request", duration_cap=600, metadata={"job": rid}),
        event(source, first + 1, "held", rid, at + 1, ends_at=at + 601),
        event(source, first + 2, "released", rid, at + 1 + held, "explicit", result={"exit_code": 0}),
    ]


def rows(store: Store, query: str) -> list[dict[str, Any]]:
    cursor = store.conn.execute(query)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def test_batch_is_stored_and_seen_as_the_worker_saw_it(store: Store) -> None:
    assert store.add(story(), "k", NOW) == Added(3, 0, 0, 0, 0)
    [reservation] = rows(store, "SELECT * FROM reservations")
    assert reservation["worker"] == "1/a"
    assert (reservation["instance"], reservation["id"], reservation["state"]) == ("1", "r1", "released")
    assert (reservation["queued_seconds"], reservation["held_seconds"]) == (1, 60)
    assert json.loads(reservation["metadata"]) == {"job": "r1"}
    assert json.loads(reservation["result"]) == {"exit_code": 0}
    kinds = [(row["kind"], row["log_seq"]) for row in rows(store, "SELECT * FROM timeline ORDER BY seq")]
    assert kinds == [("queued", 1), ("held", 2), ("released", 3)]


def test_each_event_is_there_once(store: Store) -> None:
    whole = story()
    store.add(whole[:2], "k", NOW)
    assert store.add(whole, "k", NOW) == Added(1, 2, 0, 0, 0)
    assert store.add([*whole, *whole], "k", NOW) == Added(0, 6, 0, 0, 0)
    assert len(rows(store, "SELECT * FROM events")) == 3


def test_two_contents_for_one_seq_are_both_kept_and_flagged_and_the_first_is_seen(store: Store) -> None:
    store.add(story(), "k", NOW)
    forged = event(ONE, 3, "cancelled", "r1", NOW, "consumer_lost")
    assert store.add([forged], "k", NOW) == Added(1, 0, 1, 0, 1)
    assert store.add([forged], "k", NOW) == Added(0, 1, 0, 0, 0)
    assert rows(store, "SELECT state FROM reservations") == [{"state": "released"}]
    flagged = rows(store, "SELECT * FROM conflicts")
    assert [(row["log_seq"], row["conflict"], row["type"]) for row in flagged] == [
        (3, 0, "nullworker.reservation.released"),
        (3, 1, "nullworker.reservation.cancelled"),
    ]
    assert [row["conflicts"] for row in rows(store, "SELECT conflicts FROM workers")] == [1]


def test_same_id_with_another_content_is_flagged_too(store: Store) -> None:
    first = event(ONE, 1, "queued", metadata={"job": 1})
    body = json.loads(first.body)
    body["data"]["data"]["metadata"] = {"job": 2}
    store.add([first], "k", NOW)
    assert store.add(batch.parse(json.dumps([body]).encode()), "k", NOW).conflicts == 1


def test_a_reservation_whose_claim_has_two_contents_is_listed_once(store: Store) -> None:
    """An unanswered batch is sent again; after a restart with NULL_SINK_METADATA=false, without the metadata."""
    store.add(story(), "k", NOW)
    store.add([event(ONE, 1, "queued", "r1", NOW)], "k", NOW)
    store.add(story(rid="r2", first=4), "k", NOW)
    listed = log_queries.reservations(store.conn, by_time=True)
    assert sorted(row["id"] for row in listed) == ["r1", "r2"]


def test_log_restored_from_a_backup_shows_both_futures(store: Store) -> None:
    store.add([*story(rid="before"), *story(rid="lost", first=4)], "k", NOW)
    assert store.add(story(rid="after", first=4), "k", NOW).conflicts == 3
    assert {row["id"] for row in rows(store, "SELECT id FROM reservations")} == {"before", "lost", "after"}


def test_events_out_of_order_make_the_same_reservation(tmp_path: Path) -> None:
    seen = []
    for number, order in enumerate(itertools.permutations(story())):
        store = open_store(tmp_path / f"{number}.db")
        for each in order:
            store.add([each], "k", NOW)
        [reservation] = rows(store, "SELECT * FROM reservations")
        seen.append(reservation)
        store.close()
    assert all(each == seen[0] for each in seen)


def test_source_is_pinned_to_the_key_of_its_first_batch(store: Store) -> None:
    store.add(story(), "right", NOW)
    for key in ("wrong", ""):
        with pytest.raises(Forbidden, match="pinned"):
            store.add(story(first=4, rid="r2"), key, NOW)
    with pytest.raises(Forbidden):  # and nothing of a batch in which one of two sources is another's
        store.add([*story(TWO), *story(first=4, rid="r2")], "wrong", NOW)
    assert len(rows(store, "SELECT * FROM events")) == 3
    assert len(rows(store, "SELECT * FROM sources")) == 1
    assert "right" not in json.dumps(rows(store, "SELECT * FROM sources"))
    assert store.add(story(TWO), "another", NOW).stored == 3


def test_batch_that_cannot_be_written_leaves_nothing(store: Store) -> None:
    store.conn.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        store.add(story(), "k", NOW)
    store.conn.execute("PRAGMA query_only = OFF")
    assert rows(store, "SELECT * FROM sources") == []
    assert store.add(story(), "k", NOW).stored == 3


def test_full_disk_leaves_nothing_of_a_batch_and_the_next_one_goes_in(store: Store) -> None:
    pages = store.conn.execute("PRAGMA page_count").fetchone()[0]
    store.conn.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreUnavailable, match="full"):
        store.add([each for n in range(200) for each in story(first=3 * n + 1, rid=f"r{n}")], "k", NOW)
    assert rows(store, "SELECT * FROM received") == []
    store.conn.execute("PRAGMA max_page_count = 1000000")
    assert store.add(story(), "k", NOW).stored == 3


def test_file_that_was_removed_is_noticed(store: Store) -> None:
    store.path.unlink()
    with pytest.raises(StoreUnavailable, match="moved or removed"):
        store.add(story(), "k", NOW)


def test_what_is_unknown_is_kept_and_no_view_stumbles(store: Store) -> None:
    strange = batch.parse(
        json.dumps(
            [
                {"specversion": "9", "id": "1-a", "source": ONE, "type": "nullworker.reservation.held"},
                {"specversion": "1.0", "id": "x", "source": ONE, "type": "t", "data": {"data": "text"}},
                {
                    "specversion": "1.0", "id": "2-b", "source": ONE, "type": "nullworker.reservation.held",
                    "subject": "r9", "data": {"at": 5, "data": {"ends_at": "soon", "metadata": 5}},
                },
            ]
        ).encode()
    )  # fmt: skip
    assert store.add([*strange, *story(first=10)], "k", NOW) == Added(6, 0, 0, 2, 0)
    for (view,) in store.conn.execute("SELECT name FROM sqlite_schema WHERE type = 'view'").fetchall():
        store.conn.execute(f"SELECT * FROM {view}").fetchall()
    queries.totals(store.conn)
    queries.fleet(store.conn, hours=1e6)
    assert len(rows(store, "SELECT * FROM received")) == 6


def test_database_itself_refuses_to_change_what_was_received(store: Store) -> None:
    store.add(story(), "k", NOW)
    shell = sqlite3.connect(store.path, isolation_level=None)
    for statement in (
        "UPDATE received SET body = '{}'",
        "DELETE FROM received",
        "INSERT OR REPLACE INTO received (id, source_id, seq, event_id, digest, conflict, received_at, body)"
        " SELECT id, source_id, seq, event_id, digest, 0, 0, '{}' FROM received",
        "INSERT OR REPLACE INTO received (id, source_id, seq, event_id, digest, conflict, received_at, body)"
        " SELECT 99, source_id, seq, event_id, digest, 0, 0, '{}' FROM received LIMIT 1",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            shell.execute(statement)
    shell.close()
    assert [row["state"] for row in rows(store, "SELECT state FROM reservations")] == ["released"]


def test_workers_say_what_they_hold_and_since_when_nothing_was_heard(store: Store) -> None:
    started = told(ONE, "started", NOW - 200, clock=NOW - 195, version="1.2", url="http://x", gpus=["A", "A", "B"])
    store.add([started, *story()[:2]], "k", NOW - 200)
    store.add(story(TWO, at=NOW - 50)[:2], "j", NOW)
    [first, second] = rows(store, "SELECT * FROM workers")
    assert (first["state"], first["holding"], first["gpu"]) == ("silent while holding", "r1", "2 x A, B")
    assert (first["version"], first["url"], first["skew_seconds"]) == ("1.2", "http://x", 5)
    assert (second["state"], second["holding"]) == ("holding", "r1")
    store.add([told(ONE, "alive", NOW, clock=NOW)], "k", NOW)
    assert rows(store, "SELECT state, skew_seconds FROM workers")[0] == {"state": "holding", "skew_seconds": 0}
    store.add(story()[2:], "k", NOW)
    assert rows(store, "SELECT state FROM workers")[0] == {"state": "idle"}
    store.add([told(ONE, "stopped", NOW)], "k", NOW)
    assert rows(store, "SELECT state FROM workers")[0] == {"state": "stopped"}
    store.add([event(ONE, 9, "queued", "r2", NOW + 1)], "k", NOW)
    assert rows(store, "SELECT state FROM workers")[0] == {"state": "idle"}


def test_hold_of_a_worker_that_is_gone_is_lost_after_its_deadline(store: Store) -> None:
    store.add(story(at=NOW - 2000)[:2], "k", NOW - 1900)
    assert rows(store, "SELECT state FROM workers") == [{"state": "lost"}]
    [cost] = rows(store, "SELECT * FROM cost")
    assert cost["held_seconds"] == 99, "it counts to the last word"


def test_cost_takes_the_price_of_the_instance_before_the_one_of_all(store: Store) -> None:
    store.add(story(held=3600, at=NOW - 4000), "k", NOW)
    store.add(story(TWO, held=1800, at=NOW - 4000), "j", NOW)
    assert [row["dollars"] for row in rows(store, "SELECT dollars FROM cost")] == [None, None]
    store.set_options(price=0.4, prices={"2": 1.0}, silence=180)
    assert [row["dollars"] for row in rows(store, "SELECT dollars FROM cost")] == [0.4, 0.5]
    totals = queries.totals(store.conn)
    assert (totals["held_seconds"], totals["dollars"]) == pytest.approx((5400, 0.9))


def test_fleet_daily_splits_a_hold_at_midnight(store: Store) -> None:
    midnight = NOW // 86_400 * 86_400 - 86_400
    store.set_options(price=1.0, prices={}, silence=180)
    store.add(story(at=midnight - 1801, held=5400), "k", NOW)
    days = rows(store, "SELECT held_hours, dollars, holds, released, workers FROM fleet_daily")
    assert days == [
        {"held_hours": 0.5, "dollars": 0.5, "holds": 1, "released": 0, "workers": 1},
        {"held_hours": 1.0, "dollars": 1.0, "holds": 0, "released": 1, "workers": 1},
    ]


def test_page_document_counts_today_and_shows_what_is_held(store: Store) -> None:
    store.set_options(price=2.0, prices={}, silence=180)
    midnight = NOW // 86_400 * 86_400
    store.add(story(at=midnight - 3601, held=3600 + min(NOW - midnight, 1800)), "k", NOW)
    store.add(
        [event(TWO, 1, "queued", "q", NOW, kind="session", metadata={"job": 7}), event(TWO, 2, "held", "q", NOW)],
        "j",
        NOW,
    )
    document = queries.fleet(store.conn, hours=48)
    assert document["today"]["held_hours"] == pytest.approx(min(NOW - midnight, 1800) / 3600, abs=1e-3)
    assert document["today"]["dollars"] == pytest.approx(2 * document["today"]["held_hours"], abs=1e-3)
    assert [(each["worker"], each["metadata"], each["kind"]) for each in document["workers"]] == [
        ("2/b", {"job": 7}, "session"),
        ("1/a", None, None),
    ]
    assert [(each["worker"], each["id"], each["state"]) for each in document["holds"]] == [
        ("2/b", "q", "held"),
        ("1/a", "r1", "released"),
    ]


def test_pruning_removes_reservations_whole_and_keeps_the_sums(store: Store) -> None:
    store.set_options(price=1.0, prices={}, silence=180)
    for number in range(700):
        store.add(story(rid=f"old{number}", first=3 * number + 1, at=NOW - 9000), "k", NOW - 8000)
    store.add(story(rid="open", first=3000, at=NOW - 9000)[:2], "k", NOW - 8000)
    store.add(story(TWO, rid="new"), "j", NOW)
    before = queries.totals(store.conn)
    assert sum(store.prune(NOW - 7200)) == 700
    after = queries.totals(store.conn)
    assert (after["held_seconds"], after["dollars"]) == pytest.approx((before["held_seconds"], before["dollars"]))
    assert {row["id"] for row in rows(store, "SELECT id FROM reservations")} == {"open", "new"}
    assert len(rows(store, "SELECT * FROM events")) == 5
    assert len(rows(store, "SELECT * FROM sources")) == 2
    with pytest.raises(sqlite3.IntegrityError, match="only a reservation that has ended"):
        store.conn.execute("INSERT INTO pruning SELECT id FROM holds WHERE reservation_id = 'open'")


def test_one_collector_a_file_and_nothing_of_another_program(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"belongs to a collector that is running: pid \d+"):
        open_store(store.path)
    (tmp_path / "link.db").symlink_to(store.path)
    with pytest.raises(CannotStart, match="belongs to a collector"):
        open_store(tmp_path / "link.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as conn:
        conn.execute("PRAGMA application_id = 0x6E756C64")
    with pytest.raises(CannotStart, match=r"ledger\.db is the ledger of a dispatcher; give --db another file"):
        open_store(tmp_path / "ledger.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(CannotStart, match="not a database of `nullworker collect`"):
        open_store(tmp_path / "other.db")
    (tmp_path / "noise.db").write_bytes(b"noise" * 1000)
    with pytest.raises(CannotStart, match="cannot be opened"):
        open_store(tmp_path / "noise.db")
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match="cannot be created"):
        open_store(tmp_path / "file" / "fleet.db")


def test_file_opened_again_goes_on(store: Store, tmp_path: Path) -> None:
    store.add(story()[:2], "k", NOW)
    store.conn.close()
    path = tmp_path / "fleet.db"
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    again = open_store(copy)
    assert again.add(story(), "k", NOW) == Added(1, 2, 0, 0, 0)
    with pytest.raises(Forbidden):
        again.add(story(), "other", NOW)
    again.close()
