"""Whatever is sent, stored or set: each reader of it answers with what it promises, and with nothing else."""

from __future__ import annotations

import asyncio
import base64
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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prune import add

from nullworker.autoscaler import Identity, PublicKey
from nullworker.clock import SystemClock
from nullworker.condition import Condition
from nullworker.errors import BadSettings, CannotStart, Invalid, LogDamaged, RequestError
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import DATA_OF, Ended, Event, Extended, Held, Queued, SessionTerms, from_row, to_row
from nullworker.history import callbacks
from nullworker.http.control import ExtendBody, ReleaseBody
from nullworker.http.external import ReservePayload
from nullworker.http.grants import Envelope, Gate, Grant
from nullworker.http.sessions import CreatePayload, Named
from nullworker.http.wire import decode, explain, json_response, reservation_json
from nullworker.link import Link
from nullworker.log import open_log
from nullworker.metrics.reporter import Reporter
from nullworker.service import Service
from nullworker.settings import Settings, read_settings, variable
from nullworker.testing.keys import load_or_make, public_pem, sign

URL = "http://10.0.0.1:3000"
KEY = load_or_make()
PEM = public_pem(KEY).encode()
SIGNATURE = sign(KEY, URL)
AUTH: dict[str, Any] = {
    "cost": 100.0, "endpoint": "e", "reqnum": 1, "request_idx": 5, "signature": SIGNATURE, "url": URL
}  # fmt: skip

#: Text with everything that JSON can say, half surrogate pairs included.
TEXT = st.text(st.characters(codec=None), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes that were right, with pieces put over others, taken out and put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8))
    return bytes(data)


# -- what is sent ------------------------------------------------------------------------------------------------------


class Request:
    """As much of a request as a gate reads."""

    class _Content:
        def is_eof(self) -> bool:
            return True

    def __init__(self, body: bytes) -> None:
        self.content_length, self.content, self._body = len(body), self._Content(), body

    async def read(self) -> bytes:
        return self._body


class OneKey:
    """An autoscaler that has this key."""

    trouble = None

    async def fetch_key(self) -> PublicKey:
        return PublicKey(PEM)


def gate(*, unsecured: bool = False) -> Gate:
    made = Gate(
        Condition(key=None, starting=None),
        OneKey(),  # type: ignore[arg-type]
        unsecured=unsecured,
        own_url=URL,
        url_policy="enforce",
        count_fetch=lambda call, result: None,
    )
    if not unsecured:
        asyncio.run(made.load_key())
    return made


GATE, OPEN_GATE = gate(), gate(unsecured=True)


def opened(at: Gate, body: bytes) -> Grant | None:
    """The grant; None if it was refused as it should be: a status of its own, and an answer that is JSON."""
    try:
        grant = asyncio.run(at.open(Request(body)))  # type: ignore[arg-type]
    except RequestError as error:
        answer = json_response(error.body, error.status)
    else:
        for shape in (ReservePayload, CreatePayload):
            with contextlib.suppress(Invalid):
                assert isinstance(grant.read(shape), shape)
        return grant
    assert answer.status in (401, 422)
    assert "error" in json.loads(bytes(answer.body))  # type: ignore[arg-type]
    return None


@st.composite
def envelopes(draw: st.DrawFn) -> bytes:
    """An envelope, with some fields that are not what they should be."""
    auth: Any = {**AUTH, **draw(st.dictionaries(st.sampled_from([*AUTH, "more"]), VALUES, max_size=2))}
    envelope = {"auth_data": auth, "payload": {"duration": 5}, "session_id": None}
    envelope.update(draw(st.dictionaries(st.sampled_from([*envelope, "more"]), VALUES, max_size=1)))
    return json.dumps(envelope).encode()


GOOD = json.dumps({"auth_data": AUTH, "payload": {"duration": 5}, "session_id": None}).encode()
BODIES = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()) | envelopes() | mutated(GOOD)


@settings(deadline=None)
@given(BODIES)
@example(nested(600))
@example(nested(100_000))
@example(GOOD.replace(b"null", nested(600)))
@example(GOOD.replace(b'{"duration": 5}', nested(100_000)))
@example(b'{"auth_data": "\\ud800"}')
@example(b'{"\\ud800": NaN}')
@example(b"\xef\xbb\xbf{}")
@example(b'{"auth_data": ' + b"9" * 5000 + b"}")
def test_only_what_the_autoscaler_has_signed_for_this_worker_passes_the_gate(body: bytes) -> None:
    grant = opened(GATE, body)
    if grant is not None:
        assert grant.auth is not None
        assert grant.auth.url.rstrip("/") == URL
        assert base64.b64decode(grant.auth.signature) == base64.b64decode(SIGNATURE)


def test_what_it_has_signed_does_pass() -> None:
    assert opened(GATE, GOOD) is not None


@settings(deadline=None)
@given(BODIES)
@example(b'{"session_id": 5}')
@example(b'{"session_id": "\\ud800"}')
@example(b'{"payload": ' + nested(600) + b"}")
def test_an_open_gate_takes_objects_and_refuses_the_rest(body: bytes) -> None:
    opened(OPEN_GATE, body)


@settings(deadline=None)
@given(BODIES, st.sampled_from([ReservePayload, CreatePayload, Named, ReleaseBody, ExtendBody, Envelope]))
@example(b'{"seconds": 1e999}', ExtendBody)
@example(b'{"seconds": ' + b"9" * 400 + b"}", ExtendBody)
def test_a_body_is_of_its_shape_or_each_wrong_field_is_named(body: bytes, shape: type[Any]) -> None:
    try:
        assert isinstance(decode(body, shape), shape)
    except Invalid as error:
        json_response(error.body)
    json_response(explain(body, shape).body)


@settings(deadline=None)
@given(
    st.just(URL) | TEXT,
    TEXT | st.binary(max_size=300).map(lambda data: base64.b64encode(data).decode()) | st.just(SIGNATURE),
)
@example(URL, SIGNATURE)
@example(URL + "/", SIGNATURE)
@example("\ud800", SIGNATURE)
@example(URL, "\ud800")
@example(URL, "é")
@example(URL, "A")
def test_a_signature_is_of_that_url_or_it_is_none(url: str, signature: str) -> None:
    assert PublicKey(PEM).verify(url, signature) is ((url, signature) == (URL, SIGNATURE))


@settings(deadline=None)
@given(mutated(PEM) | st.binary(max_size=100))
def test_a_key_is_an_rsa_key_or_a_value_error(pem: bytes) -> None:
    with contextlib.suppress(ValueError):
        PublicKey(pem).verify(URL, SIGNATURE)


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
SESSIONS = st.builds(SessionTerms, FINITE, st.text(), st.none() | st.text(), JSON_VALUES)
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


# -- what is set -------------------------------------------------------------------------------------------------------

NAMES = [variable(name).replace("<WORKER_PORT>", "3000") for name in Settings.__dataclass_fields__]
SETTINGS = (
    st.text(max_size=20)
    | st.floats().map(str)
    | st.integers().map(str)
    | st.sampled_from(["true", "full", "30d", "http://[::1", "http://a:0", "http://a:99999", "9" * 5000, "1e999", "²"])
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "VAST_TCP_PORT_0"]), SETTINGS, max_size=6), st.sampled_from("yn"))
@example({"REPORT_ADDR": "http://[::1,http://a"}, "y")
@example({"NULL_MAX_QUEUED": "9" * 5000}, "y")
@example({"NULL_LOG_KEEP": "9" * 400 + "d"}, "y")
@example({"BACKEND_HEALTH_URL": "http://a\ud800"}, "y")
def test_settings_are_read_or_the_wrong_one_is_named(values: dict[str, str], unsecured: str) -> None:
    try:
        found = read_settings({"UNSECURED": unsecured, **values})
    except BadSettings as error:
        told = str(error)
    else:
        told = f"{found!r} {found.own_url} {found.event_log}".upper()
    assert any(name in told for name in NAMES)


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
        terms = SessionTerms(lifetime=60, auth_sha256="0" * 64, on_close_route="http://10.0.0.1/")
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
        service = Service(log, SystemClock(log.anchor()), Limits(), Condition(key=None, starting=None))
        Reporter(Identity(7, "", URL, 100), service, log, Link([URL]), lambda call, result: None).catch_up()
        service.restore()
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
def test_a_log_that_was_touched_is_gone_on_with_or_set_aside(
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
def test_what_touching_a_log_has_found(history: Path, tmp_path: Path, touch: Callable[[bytearray, int], None]) -> None:
    db = tmp_path / "nullworker.db"
    with contextlib.closing(sqlite3.connect(shutil.copy(history, db))) as conn:
        ((root,),) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'")
    data = bytearray(db.read_bytes())
    touch(data, root)
    db.write_bytes(data)
    begin(db)
    assert list(tmp_path.glob("*.damaged-*"))


def test_a_clock_that_makes_no_sense_is_damage(history: Path, tmp_path: Path) -> None:
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
