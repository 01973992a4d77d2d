"""Random contents of a log file: the worker either reads them or sets the file aside."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_values import TEXT, VALUES, nested
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pruning import add

from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.autoscaler.messages import Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.clock import SystemClock
from nullworker.errors import CannotStart, LogDamaged
from nullworker.eventlog.opening import open_log
from nullworker.eventlog.queries import callbacks
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import DATA_OF, Ended, Event, Extended, Held, Queued, SessionTerms, from_row, to_row
from nullworker.http.reservations import reservation_json
from nullworker.http.responses import json_response
from nullworker.readiness import Readiness
from nullworker.service import Service

URL = "http://10.0.0.1:3000"

# -- what is stored ----------------------------------------------------------------------------------------------------

SQLITE = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(max_size=20)
JSON = VALUES.map(json.dumps) | st.builds(
    to_row, st.builds(Event, st.floats(), TEXT, st.just("held"), st.none(), st.builds(Held, st.floats()))
).map(lambda row: row[4])
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | FINITE | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
SESSIONS = st.builds(SessionTerms, FINITE, st.none() | st.text(), JSON_VALUES)
DATA = {
    "queued": st.builds(
        Queued,
        kind=st.sampled_from(["request", "session"]),
        duration_cap=FINITE,
        give_up_at=FINITE,
        request_idx=st.none() | st.integers(-(2**63), 2**63 - 1),
        metadata=st.none() | st.dictionaries(st.text(), JSON_VALUES, max_size=3),
        session=st.none() | SESSIONS,
    ),
    "held": st.builds(Held, FINITE),
    "extended": st.builds(Extended, FINITE),
    **dict.fromkeys(("released", "expired", "cancelled"), st.builds(Ended) | st.builds(Ended, JSON_VALUES)),
}
EVENTS = st.sampled_from(sorted(DATA)).flatmap(
    lambda kind: st.builds(Event, FINITE, st.text(), st.just(kind), st.none() | st.text(), DATA[kind])
)


@settings(deadline=None)
@given(EVENTS)
def test_an_event_comes_back_as_it_was_stored(event: Event) -> None:
    assert from_row(to_row(event)) == event


@settings(deadline=None)
@given(st.tuples(SQLITE, SQLITE, st.sampled_from(sorted(DATA_OF)) | SQLITE, st.none() | TEXT, JSON | SQLITE))
@example((0.0, "a", "released", None, '{"result": ' + nested(100_000).decode() + "}"))
@example((0.0, "a", "held", None, '{"ends_at": 1e999}'))
@example((0.0, "a", "held", None, '{"ends_at": "\\ud800"}'))
@example((math.inf, "a", "released", None, "{}"))
@example((None, None, None, None, None))
def test_a_row_is_an_event_or_damage(row: Any) -> None:
    try:
        event = from_row(row)
    except LogDamaged:
        return
    assert from_row(to_row(event)) == event


# -- a file that was touched -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A log as a killed worker leaves it: its newest events in the write-ahead log, something of everything in it."""
    folder = tmp_path_factory.mktemp("history")
    with contextlib.closing(open_log(folder / "nullworker.db")) as log:
        for number in range(30):
            end = add(log, f"r{number}", float(number), route="http://10.0.0.1/" if number % 3 == 0 else None)
            if number % 6 == 0:
                log.settle("callbacks", [end], 0, "delivered")
        log.move_cursor("delete_requests", 50)
        log.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        now = SystemClock().now()
        terms = SessionTerms(lifetime=60, on_close_route="http://10.0.0.1/")
        queued = Queued(kind="session", duration_cap=60, give_up_at=now + 30, session=terms)
        waiting = Queued(kind="request", duration_cap=60, give_up_at=now + 30)
        log.append(
            [
                (log.last_seq + 1, Event(now, "open", "queued", None, queued)),
                (log.last_seq + 2, Event(now, "open", "held", None, Held(now + 60))),
                (log.last_seq + 3, Event(now, "waits", "queued", None, waiting)),
            ]
        )
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"nullworker.db{suffix}", folder / f"copy{suffix}")
        yield folder / "copy"


@st.composite
def touched(draw: st.DrawFn) -> list[tuple[float, bytes]]:
    """Where, as a part of the whole, and what is written there."""
    place = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(place, st.binary(min_size=1, max_size=32)), max_size=5))


def begin(db: Path) -> None:
    """A worker begins with a file, finds out what is owed, ends what is over, takes a claim, shows all, and stops."""
    with contextlib.closing(open_log(db, sync="normal")) as log:
        service = Service(log, SystemClock(log.anchor()), Limits(), Readiness())
        Reporter(Identity(7, "", URL, 100), service, log, AutoscalerClient([URL]), lambda call, result: None)
        service.resume()
        callbacks(log.conn, after=0)
        made = service.claim(Claim())
        for reservation in (made, *service.book.live()):
            json_response(reservation_json(reservation, service.now()))


@settings(deadline=None, max_examples=100)
@given(
    touches=touched(),
    wal_touches=touched(),
    keeps=st.just(1.0) | st.floats(0, 1),
    wal_keeps=st.just(1.0) | st.floats(0, 1),
    pages=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=2),
)
def test_a_modified_log_is_read_or_set_aside(
    history: Path,
    touches: list[tuple[float, bytes]],
    wal_touches: list[tuple[float, bytes]],
    keeps: float,
    wal_keeps: float,
    pages: list[tuple[int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "nullworker.db"
        for suffix, changes, keep in (("", touches, keeps), ("-wal", wal_touches, wal_keeps)):
            data = bytearray(Path(f"{history}{suffix}").read_bytes())
            if not suffix:
                for one, other in pages:
                    data[one * 4096 : one * 4096 + 4096] = data[other * 4096 : other * 4096 + 4096]
            for where, what in changes:
                at = int(where * len(data))
                data[at : at + len(what)] = what
            Path(f"{db}{suffix}").write_bytes(data[: int(keep * len(data))])
        for _ in range(2):
            with contextlib.suppress(CannotStart):
                begin(db)
            assert db.exists()


def leaves(data: bytes | bytearray, root: int) -> list[int]:
    """Where the leaves of a table are, in order: sqlite.org/fileformat2.html, 1.6."""
    page = data[(root - 1) * 4096 : root * 4096]
    assert page[0] == 5, "an interior page of a table"
    cells = [int.from_bytes(page[12 + 2 * n : 14 + 2 * n], "big") for n in range(int.from_bytes(page[3:5], "big"))]
    return [(int.from_bytes(page[at : at + 4], "big") - 1) * 4096 for at in (*cells, 8)]


def undecodable_schema(data: bytearray, root: int) -> None:
    at = data.index(b"tableeventsevents") + len("table")
    data[at : at + 6] = b"\xff" * 6


def unreadable_debts(data: bytearray, root: int) -> None:
    at = leaves(data, root)[-1]
    data[at : at + 4096] = bytes(4096)


def debts_in_a_circle(data: bytearray, root: int) -> None:
    first, *_, last = leaves(data, root)
    data[last : last + 4096] = data[first : first + 4096]


def unreadable_word(data: bytearray, root: int) -> None:
    at = data.index(b"explicit", leaves(data, root)[-1])
    data[at : at + 8] = b"\xff" * 8


@pytest.mark.parametrize("touch", [undecodable_schema, unreadable_debts, debts_in_a_circle, unreadable_word])
def test_known_modifications_of_a_log(history: Path, tmp_path: Path, touch: Callable[[bytearray, int], None]) -> None:
    db = tmp_path / "nullworker.db"
    with contextlib.closing(sqlite3.connect(shutil.copy(history, db))) as conn:
        ((root,),) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'")
    data = bytearray(db.read_bytes())
    touch(data, root)
    db.write_bytes(data)
    begin(db)
    assert list(tmp_path.glob("*.damaged-*"))


def test_an_invalid_clock_anchor_is_damage(history: Path, tmp_path: Path) -> None:
    db = tmp_path / "nullworker.db"
    for suffix in ("", "-wal"):
        shutil.copy(f"{history}{suffix}", f"{db}{suffix}")
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as conn:
        conn.execute("INSERT OR REPLACE INTO meta VALUES ('clock', 'noon')")
    begin(db)
    assert list(tmp_path.glob("*.damaged-*"))


def test_the_history_that_is_touched_is_whole_before(history: Path, tmp_path: Path) -> None:
    for suffix in ("", "-wal"):
        shutil.copy(f"{history}{suffix}", tmp_path / f"nullworker.db{suffix}")
    begin(tmp_path / "nullworker.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "nullworker.db")) as conn:
        assert conn.execute("SELECT count(*) FROM reservations").fetchone() == (33,)
        assert conn.execute("SELECT id FROM open_reservations").fetchall() == [("open",), (conn.execute(
            "SELECT id FROM reservations ORDER BY queued_at DESC LIMIT 1").fetchone()[0],)]  # fmt: skip
