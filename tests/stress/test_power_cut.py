"""A short form of `python -m stress.power_cut`, and that it finds what it looks for."""

from __future__ import annotations

import sqlite3

import pytest

from nullworker.eventlog import opening
from nullworker.eventlog.log import EventLog
from stress import power_cut

CUTS = 60


def test_no_cut_loses_what_was_acknowledged_or_makes_true_what_was_refused() -> None:
    figures = power_cut.run(1, CUTS)
    assert figures["kills"] > 10
    assert figures["power cuts"] > 10
    assert figures["commands without a log"] > 50


def test_a_failed_commit_that_is_not_taken_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventLog, "take_back", lambda _: None)
    with pytest.raises(AssertionError, match="that were refused are true"):
        power_cut.run(1, 3 * CUTS)


def test_a_loss_that_nobody_says_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_verify_newest", lambda *_: None)
    with pytest.raises(AssertionError, match="are lost and nobody says so"):
        power_cut.run(1, 2 * CUTS)


def test_a_commit_that_is_not_synced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazily(conn: sqlite3.Connection, _: str) -> None:
        conn.execute("PRAGMA synchronous = NORMAL")

    monkeypatch.setattr(opening, "_set_pragmas", lazily)
    with pytest.raises(AssertionError):
        power_cut.run(1, CUTS)
