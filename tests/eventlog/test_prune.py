"""Pruning removes whole reservations, keeps what a reader still needs, and gives the space back."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import DAY, add, names, told_all

from nullworker.errors import LogUnavailable
from nullworker.eventlog import retention
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.eventlog.retention import STEP, ended_before, expendable, prune_gently


def prune(log: EventLog, before: float) -> None:
    log.prune(each for ids in expendable(log.conn, before) for each in ids)


def test_what_is_old_leaves_whole_and_what_is_not_stays_whole(log: EventLog) -> None:
    for day in range(10):
        add(log, f"day{day}", day * DAY)
    told_all(log)
    prune(log, 5 * DAY)
    assert names(log) == {f"day{day}": 4 for day in range(5, 10)}
    last = log.last_seq
    log.close()
    with contextlib.closing(open_log(log.path)) as again:
        assert (again.last_seq, list(again.live())) == (last, [])
        assert add(again, "new", 11 * DAY) == last + 4


async def test_a_running_worker_prunes_in_steps_and_others_have_their_turn(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP", 8)
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0)
    for day in range(6):
        add(log, f"day{day}", day * DAY)
    told_all(log)
    pruning = asyncio.ensure_future(prune_gently(log, 4 * DAY))
    left: list[int] = []
    while not pruning.done():
        await asyncio.sleep(0)
        left.append(len(names(log)))
    assert (left[0], sorted(set(left))) == (4, [2, 4])
    assert log.conn.execute("PRAGMA freelist_count").fetchone() == (0,)
    assert [ended_before(log.conn, day * DAY) for day in (4, 5, 6)] == [0, 1, 2]


async def test_a_pruning_that_fails_says_how_far_it_came_and_ends(
    log: EventLog, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(retention, "STEP", 8)
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0)
    for day in range(6):
        add(log, f"day{day}", day * DAY)
    told_all(log)
    give_back = log.give_back

    def full(pages: int) -> None:
        give_back(pages)
        log.conn.execute("PRAGMA query_only = ON")

    monkeypatch.setattr(log, "give_back", full)
    await prune_gently(log, 4 * DAY)
    assert logged() == ["not_pruned"]
    assert len(names(log)) == 4


def test_what_is_open_stays_however_old(log: EventLog) -> None:
    add(log, "old", 0)
    add(log, "open", 1, end=None)
    told_all(log)
    prune(log, DAY)
    assert names(log) == {"open": 3}
    assert [event.reservation_id for _, event in log.live()] == ["open"] * 3


@pytest.mark.parametrize("behind", ["worker_status", "delete_requests"])
def test_what_the_autoscaler_has_not_acknowledged_stays(log: EventLog, behind: str) -> None:
    ends = [add(log, name, at) for at, name in enumerate("abcd")]
    told_all(log)
    log.move_cursor(behind, ends[1])
    prune(log, DAY)
    assert names(log) == {"c": 4, "d": 4}
    log.conn.execute("DELETE FROM cursors WHERE name = ?", (behind,))
    with pytest.raises(LogUnavailable):
        log.prune(["c"])


def test_what_a_callback_is_owed_for_stays_until_it_is_settled(log: EventLog) -> None:
    owed = add(log, "owed", 0, route="http://10.0.0.1/")
    add(log, "last", 1)
    told_all(log)
    prune(log, DAY)
    assert names(log) == {"owed": 4, "last": 4}
    log.settle("callbacks", [owed], 2, "delivered")
    prune(log, DAY)
    assert names(log) == {"last": 4}
    assert log.conn.execute("SELECT count(*) FROM settled").fetchone() == (0,)


def test_the_last_event_of_all_stays(log: EventLog) -> None:
    add(log, "only", 0)
    told_all(log)
    prune(log, DAY)
    assert names(log) == {"only": 4}


def test_a_clock_that_was_set_back_keeps_what_it_must(log: EventLog) -> None:
    for name, at in (("future", 100 * DAY), ("past", 1.0), ("last", 2.0)):
        add(log, name, at)
    told_all(log)
    prune(log, DAY)
    assert names(log) == {"future": 4, "last": 4}


def test_pruning_takes_more_than_one_step(log: EventLog) -> None:
    for number in range(STEP):
        add(log, f"n{number}", float(number))
    told_all(log)
    steps = list(expendable(log.conn, DAY))
    assert sum(map(len, steps)) == STEP - 1
    assert max(map(len, steps)) <= STEP
    prune(log, DAY)
    assert list(names(log)) == [f"n{STEP - 1}"]


# -- the promise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "DELETE FROM events WHERE reservation_id = 'old'",
        "DELETE FROM events WHERE seq = 1",
        "UPDATE events SET at = 0",
        "INSERT INTO pruning VALUES ('open')",
        "INSERT INTO pruning VALUES ('owed')",
        "INSERT INTO pruning VALUES ('unheard')",
        "INSERT INTO pruning VALUES ('unknown')",
        "INSERT INTO pruning VALUES (NULL)",
        "INSERT OR REPLACE INTO pruning VALUES ('open')",
        "INSERT OR IGNORE INTO pruning VALUES ('open')",
        "INSERT INTO pruning SELECT DISTINCT reservation_id FROM events",
    ],
)
@pytest.mark.parametrize("recursive", ["ON", "OFF"])
def test_no_shell_can_remove_more_than_that(log: EventLog, statement: str, recursive: str) -> None:
    add(log, "old", 0)
    add(log, "owed", 1, route="http://10.0.0.1/")
    told_all(log)
    add(log, "unheard", 2)
    add(log, "open", 3, end=None)
    before = names(log)
    with contextlib.closing(sqlite3.connect(log.path)) as shell:
        shell.execute(f"PRAGMA recursive_triggers = {recursive}")
        with pytest.raises(sqlite3.IntegrityError):
            shell.execute(statement)
        shell.commit()
    assert names(log) == before
    prune(log, DAY)
    assert names(log) == {name: events for name, events in before.items() if name != "old"}
    assert log.conn.execute("SELECT count(*) FROM pruning").fetchone() == (0,)


def test_a_pruning_that_fails_removes_nothing(log: EventLog) -> None:
    for name in "abc":
        add(log, name, 0)
    told_all(log)
    before = names(log)
    with pytest.raises(LogUnavailable, match="only a reservation that has ended"):
        log.prune(["a", "b", "nobody"])
    assert names(log) == before


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_may_go_is_exactly_what_is_not_needed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with contextlib.closing(open_log(tmp_path_factory.mktemp("log") / "nullworker.db")) as log:
        ends: dict[str, int] = {}
        ages = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
        routed = [data.draw(st.booleans()) for _ in ages]
        for number, age in enumerate(ages):
            ends[f"r{number}"] = add(log, f"r{number}", age * DAY, route="http://10.0.0.1/" if routed[number] else None)
        cursors = [data.draw(st.integers(0, log.last_seq)) for _ in range(2)]
        for name, seq in zip(("worker_status", "delete_requests"), cursors, strict=True):
            log.move_cursor(name, seq)
        settled = data.draw(st.sets(st.sampled_from(sorted(ends))))
        log.settle("callbacks", [ends[name] for name in settled], 0, "delivered")
        horizon = data.draw(st.integers(0, 10)) * DAY
        stays = {
            name
            for number, (name, seq) in enumerate(ends.items())
            if ages[number] * DAY + 1 >= horizon
            or seq > min(cursors)
            or seq == log.last_seq
            or (routed[number] and name not in settled)
        }
        prune(log, horizon)
        assert names(log) == {name: 4 for name in ends if name in stays}
        assert log.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
