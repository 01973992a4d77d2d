"""A claim's states, and the ledger that keeps its events."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import T
from ledgers import opened_ledger as opened_ledger

from nullworker.clock import Anchor
from nullworker.dispatch import schema
from nullworker.dispatch.claims import (
    EDGES,
    Attached,
    Claim,
    Ended,
    Event,
    EventKind,
    Granted,
    Held,
    Pending,
    Priced,
    Refused,
    apply,
    from_row,
    step,
    to_row,
)
from nullworker.dispatch.ledger import Credential, HeldTime, Ledger, open_ledger
from nullworker.errors import CannotStart, IllegalMove, LogDamaged, LogUnavailable
from nullworker.eventlog.opening import open_log

SECRET = "c2lnbmF0dXJlLW9mLWEtZ3JhbnQ"
DATA: dict[EventKind, Any] = {
    "pending": Pending(3, 1, metadata={"job": "7"}),
    "granted": Granted("https://10.0.0.1:3000"),
    "refused": Refused("taken", 429),
    "held": Held("s1", 300.0, 3, 1),
    "priced": Priced(0.4, 17),
    "attached": Attached(),
    "ended": Ended({"state": "released", "reason": "consumer_exit", "result": {"exit_code": 0}}, 60.0),
}
KINDS = list(DATA)
#: The shortest way to each state.
WAYS: dict[str | None, list[EventKind]] = {
    None: [],
    "pending": ["pending"],
    "granted": ["pending", "granted"],
    "held": ["pending", "granted", "held"],
    "ended": ["pending", "ended"],
}


def event(kind: EventKind, claim_id: str = "c1", at: float = T) -> Event:
    return Event(at, claim_id, kind, DATA[kind], "consumer_exit" if kind == "ended" else None)


def walk(ledger: Ledger, state: str | None, claim_id: str = "c1") -> None:
    for number, kind in enumerate(WAYS[state]):
        credential = {claim_id: Credential("https://10.0.0.1:3000", SECRET)} if kind == "granted" else None
        ledger.append([event(kind, claim_id, T + number)], credential)


def query(ledger: Ledger, sql: str) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(f"file:{ledger.path}?mode=ro", uri=True)) as conn:
        conn.row_factory = sqlite3.Row
        return [dict(row) for row in conn.execute(sql)]


@pytest.mark.parametrize("state", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_the_fold_and_the_database_allow_the_same_steps(ledger: Ledger, state: Any, kind: EventKind) -> None:
    allowed = {(edge.source, edge.event): edge.target for edge in EDGES}
    walk(ledger, state)
    if (state, kind) in allowed:
        assert step(state, kind) == allowed[state, kind]
        ledger.append([event(kind, at=T + 9)])
        after = query(ledger, "SELECT state FROM claims")
        assert after == [{"state": allowed[state, kind]}]
    else:
        with pytest.raises(IllegalMove, match=kind):
            step(state, kind)
        with pytest.raises(LogUnavailable):
            ledger.append([event(kind, at=T + 9)])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET at = 0",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events VALUES (1, 0, 'c1', 'pending', NULL, '{}')",
        "INSERT INTO events VALUES (9, 0, 'c1', 'pending', NULL, '{}')",
        "INSERT INTO events VALUES (9, 0, 'c2', 'paused', NULL, '{}')",
        "INSERT INTO events VALUES (9, 0, 'c2', 'pending', NULL, 'x')",
        "INSERT INTO events VALUES (9, 'now', 'c2', 'pending', NULL, '{}')",
    ],
)
def test_an_event_cannot_be_changed_from_any_shell(ledger: Ledger, statement: str) -> None:
    walk(ledger, "held")
    with contextlib.closing(sqlite3.connect(ledger.path)) as conn, pytest.raises(sqlite3.IntegrityError):
        conn.execute(statement)


def test_an_append_is_all_or_nothing(ledger: Ledger) -> None:
    with pytest.raises(LogUnavailable):
        ledger.append([event("pending"), event("held")])
    assert ledger.open_claims() == {}
    ledger.append([event("pending"), event("granted")])
    assert [claim.state for claim in ledger.open_claims().values()] == ["granted"]


@pytest.mark.parametrize("kind", ["ended", "refused"])
@pytest.mark.parametrize("others", [0, 1])  # events that were written together with it
def test_credentials_are_nowhere_on_disk_once_a_claim_is_over(ledger: Ledger, kind: EventKind, others: int) -> None:
    walk(ledger, "granted")
    assert ledger.credential("c1") == Credential("https://10.0.0.1:3000", SECRET)
    assert any(SECRET.encode() in path.read_bytes() for path in ledger.path.parent.iterdir())
    ledger.append([event(kind), event("pending", "c2")][: 1 + others])
    assert ledger.credential("c1") is None
    assert not any(SECRET.encode() in path.read_bytes() for path in ledger.path.parent.iterdir())


def test_no_view_and_no_event_has_a_credential(ledger: Ledger) -> None:
    walk(ledger, "held")
    for name in ("events", *schema.VIEWS):
        assert SECRET not in json.dumps(query(ledger, f"SELECT * FROM {name}"))


def test_the_files_are_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        (tmp_path / "ledger.db").touch(0o644)
        ledger = open_ledger(tmp_path / "ledger.db")
        walk(ledger, "held")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        ledger.close()
    finally:
        os.umask(old)
    assert set(modes) >= {"ledger.db", "ledger.db-wal", "ledger.db.lock"}
    assert set(modes.values()) == {0o600}


def _try_open(path: Path, answers: multiprocessing.Queue[str]) -> None:
    try:
        open_ledger(path).close()
        answers.put("opened")
    except CannotStart as error:
        answers.put(str(error))


def test_one_process_has_the_ledger_also_by_a_link(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(ledger.path)
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    for name in ("ledger.db", "link.db"):
        process = context.Process(target=_try_open, args=(tmp_path / name, answers))
        process.start()
        said = answers.get(timeout=30)
        process.join()
        assert f"belongs to a dispatcher that is running: pid {os.getpid()}" in said
        assert "--ledger" in said


@pytest.mark.parametrize("content", [b"no database" * 500, b"SQLite format 3\0" + b"\1" * 5000])
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(CannotStart, match="move it away"):
        open_ledger(path)
    assert path.read_bytes() == content
    path.unlink()
    open_ledger(path).close()  # the lock was given back


def test_a_ledger_whose_damage_is_no_text_is_refused_too(ledger: Ledger, tmp_path: Path) -> None:
    ledger.close()
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as conn:
        conn.execute("PRAGMA writable_schema = ON")
        conn.execute("UPDATE sqlite_schema SET name = CAST(x'ff' AS TEXT), sql = 'CREATE' WHERE name = 'daily'")
    with pytest.raises(CannotStart, match="move it away"):
        open_ledger(ledger.path)


@pytest.mark.parametrize(("claim_id", "opens"), [("c1", False), ("c2", True)])
def test_an_event_that_cannot_be_read_is_found_at_the_start_if_its_claim_is_open(
    ledger: Ledger, claim_id: str, opens: bool
) -> None:
    walk(ledger, "granted", "c1")
    walk(ledger, "granted", "c2")
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as conn:
        conn.execute("INSERT INTO events VALUES (8, 0, ?, 'held', NULL, '{}')", (claim_id,))
        conn.execute("INSERT INTO events VALUES (9, 1, 'c2', 'ended', NULL, '{}')")
    ledger.close()
    with contextlib.nullcontext() if opens else pytest.raises(CannotStart, match="event of kind 'held' for claim 'c1'"):
        open_ledger(ledger.path).close()


def test_an_append_is_on_disk_and_waits_half_a_second_at_most_for_another_program(ledger: Ledger) -> None:
    values = {"synchronous": 2, "busy_timeout": 500, "secure_delete": 1, "journal_size_limit": 1024 * 1024}
    assert {name: ledger._conn.execute(f"PRAGMA {name}").fetchone()[0] for name in values} == values
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailable, match="locked"):
            walk(ledger, "pending")
        conn.execute("ROLLBACK")
    walk(ledger, "pending")


def test_a_database_of_another_program_or_a_newer_version_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as conn:
        conn.execute("CREATE TABLE mine (x)")
    with pytest.raises(CannotStart, match="another program"):
        open_ledger(tmp_path / "other.db")
    open_ledger(tmp_path / "newer.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as conn:
        conn.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    with pytest.raises(CannotStart, match="newer"):
        open_ledger(tmp_path / "newer.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as conn:
        conn.execute(f"PRAGMA user_version = {schema.VERSION}")
    open_ledger(tmp_path / "newer.db").close()  # the lock was given back
    open_log(tmp_path / "worker.db").close()
    with pytest.raises(CannotStart, match=r"worker\.db is the event log of a worker; set --ledger to another file"):
        open_ledger(tmp_path / "worker.db")
    (tmp_path / "a_file").touch()
    with pytest.raises(CannotStart, match="set --ledger"):
        open_ledger(tmp_path / "a_file" / "ledger.db")


def test_a_python_with_an_old_sqlite_is_told_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "OLDEST_SQLITE", sqlite3.sqlite_version_info)
    open_ledger(tmp_path / "ledger.db").close()
    monkeypatch.setattr(schema, "OLDEST_SQLITE", (99, 1))
    with pytest.raises(CannotStart, match=rf"has SQLite {sqlite3.sqlite_version}, and the ledger needs 99\.1 or newer"):
        open_ledger(tmp_path / "ledger.db")


def test_a_ledger_that_was_removed_is_noticed(ledger: Ledger) -> None:
    ledger.path.unlink()
    with pytest.raises(LogUnavailable, match="moved or removed"):
        walk(ledger, "pending")


def test_the_views_tell_a_claims_whole_life(ledger: Ledger) -> None:
    kinds: list[EventKind] = ["pending", "granted", "refused", "granted", "held", "priced", "attached", "ended"]
    for number, kind in enumerate(kinds):
        ledger.append([event(kind, at=T + 10 * number)])
    ledger.append([Event(T + 100, "c2", "pending", Pending(0, 4, reclaim=True))])
    ended, pending = query(ledger, "SELECT * FROM claims")
    assert ended == {
        "id": "c1",
        "state": "ended",
        "reason": "consumer_exit",
        "opened_at": "2027-01-15T08:00:00.000Z",
        "granted_at": "2027-01-15T08:00:30.000Z",
        "held_at": "2027-01-15T08:00:40.000Z",
        "attached_at": "2027-01-15T08:01:00.000Z",
        "ended_at": "2027-01-15T08:01:10.000Z",
        "wait_seconds": 40.0,
        "held_seconds": 60.0,
        "dollars": round(60 / 3600 * 0.4, 6),
        "price": 0.4,
        "url": "https://10.0.0.1:3000",
        "instance": 17,
        "session_id": "s1",
        "refusals": 1,
        "reclaim": 0,
        "metadata": '{"job":"7"}',
        "result": '{"exit_code":0}',
        "final_status": '{"state":"released","reason":"consumer_exit","result":{"exit_code":0}}',
        "why": None,
    }
    assert (pending["state"], pending["held_seconds"], pending["dollars"]) == ("pending", None, None)
    assert pending["reclaim"] == 1
    assert [row["id"] for row in query(ledger, "SELECT id FROM open_claims")] == ["c2"]
    assert [row["kind"] for row in query(ledger, "SELECT * FROM timeline")] == [*kinds, "pending"]
    assert query(ledger, "SELECT * FROM timeline LIMIT 1") == [
        {
            "seq": 1,
            "at": "2027-01-15T08:00:00.000Z",
            "claim_id": "c1",
            "kind": "pending",
            "reason": None,
            "data": '{"waiting":3,"in_flight":1,"metadata":{"job":"7"}}',
        }
    ]
    assert query(ledger, "SELECT * FROM daily") == [
        {
            "day": "2027-01-15",
            "claims": 2,
            "held": 1,
            "open": 1,
            "hours": round(60 / 3600, 4),
            "dollars": round(60 / 3600 * 0.4, 4),
            "p50_wait_seconds": 40.0,
            "p95_wait_seconds": 40.0,
        }
    ]


def test_no_span_in_a_view_is_negative(ledger: Ledger) -> None:
    walk(ledger, "held")
    far = Ended({"state": "cancelled"})
    ledger.append([Event(T - 5000, "c1", "ended", far, "worker_restart")])
    (row,) = query(ledger, "SELECT wait_seconds, held_seconds FROM claims")
    assert row == {"wait_seconds": 2.0, "held_seconds": 0.0}
    assert ledger.held_time(T - 9000) == [HeldTime(T + 2, 0.0, None)]


def test_held_time_has_what_is_held_and_what_has_ended_since(ledger: Ledger) -> None:
    walk(ledger, "held", "c1")
    walk(ledger, "held", "c2")
    walk(ledger, "granted", "c3")
    ledger.append([event("priced", "c1"), event("ended", "c1", T + 50)])
    assert sorted(ledger.held_time(T), key=str) == [HeldTime(T + 2, 60.0, 0.4), HeldTime(T + 2, None, None)]
    assert ledger.held_time(T + 60) == [HeldTime(T + 2, None, None)]


def test_the_last_renewal_and_the_clocks_anchor_are_kept_while_they_matter(ledger: Ledger) -> None:
    walk(ledger, "held")
    assert ledger.renewed_at("c1") is None
    ledger.renewed("c1", T + 5)
    ledger.renewed("c1", T + 6)
    ledger.store_anchor(Anchor("boot", 12.5))
    assert ledger.renewed_at("c1") == T + 6
    assert ledger.anchor() == Anchor("boot", 12.5)
    ledger.append([event("ended")])
    assert ledger.renewed_at("c1") is None
    assert ledger.anchor() is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_read_as_it_was_written(kind: EventKind) -> None:
    assert from_row(to_row(event(kind))) == event(kind)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(["c1", "c2", "c3"]), st.sampled_from(KINDS)), max_size=30))
def test_what_a_restart_reads_is_what_the_book_had(steps: list[tuple[str, EventKind]]) -> None:
    claims: dict[str, Claim] = {}
    conn = sqlite3.connect(":memory:", isolation_level=None)
    conn.executescript(schema.SCRIPT)
    done: set[str] = set()
    for seq, (claim_id, kind) in enumerate(steps, 1):
        if claim_id in done:
            continue
        happened = event(kind, claim_id, T + seq)
        try:
            after = apply(claims.get(claim_id), happened)
        except IllegalMove:
            continue
        conn.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (seq, *to_row(happened)))
        if after.state == "ended":
            done.add(claim_id)
            del claims[claim_id]
        else:
            claims[claim_id] = after
    states = dict(conn.execute("SELECT claim_id, state FROM live"))
    assert states == {claim.id: claim.state for claim in claims.values()}
    rows = conn.execute(
        "SELECT at, claim_id, kind, reason, data FROM events WHERE claim_id IN (SELECT claim_id FROM live) ORDER BY seq"
    ).fetchall()
    conn.close()
    read: dict[str, Claim] = {}
    for row in rows:
        happened = from_row(row)
        read[happened.claim_id] = apply(read.get(happened.claim_id), happened)
    assert read == claims


@pytest.mark.parametrize(
    "row",
    [
        (T, "c1", "paused", None, "{}"),
        (T, "c1", "held", None, "{}"),
        (T, "c1", "attached", None, "{"),
        (None, "c1", "attached", None, "{}"),
        ("now", "c1", "attached", None, "{}"),
        (T, "c1", "attached", None, None),
    ],
)
def test_a_row_that_is_no_event_is_damage(row: Any) -> None:
    with pytest.raises(LogDamaged, match="c1"):
        from_row(row)


def test_a_refused_claim_has_no_worker_and_the_first_attachment_counts() -> None:
    claim = None
    for kind in WAYS["granted"]:
        claim = apply(claim, event(kind))
    assert claim is not None
    assert (claim.url, claim.granted_at) == ("https://10.0.0.1:3000", T)
    claim = apply(claim, event("refused"))
    assert (claim.state, claim.url, claim.granted_at) == ("pending", None, None)
    later: list[EventKind] = ["granted", "held", "attached", "attached"]
    for number, kind in enumerate(later):
        claim = apply(claim, event(kind, at=T + number))
    assert claim.attached_at == T + 2


def test_the_ended_claims_since_a_time_come_in_the_order_of_their_ends(ledger: Ledger) -> None:
    for claim_id, end in (("c1", 30.0), ("c2", 20.0), ("c3", 10.0), ("c4", 9.0)):
        walk(ledger, "held", claim_id)
        ledger.append([event("ended", claim_id, T + end)])
    assert [claim.id for claim in ledger.ended_since(T + 10)] == ["c3", "c2", "c1"]


def test_a_ledger_makes_the_folders_above_it(tmp_path: Path) -> None:
    path = tmp_path / "var" / "dispatch" / "ledger.db"
    open_ledger(path).close()
    assert path.exists()


def test_a_move_that_is_not_allowed_says_which_are() -> None:
    with pytest.raises(IllegalMove, match=r"^held is not allowed in state pending; allowed: granted, ended$"):
        step("pending", "held")
    with pytest.raises(IllegalMove, match=r"allowed: nothing$"):
        step("ended", "held")
