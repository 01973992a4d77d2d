"""The log's views: every question of docs/audit.md and the runbooks, and Datasette in front of a live log."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from harness import PATIENCE, ROOT, WorkerProcess

from nullworker.clock import Anchor
from nullworker.collector import batch
from nullworker.collector.store import open_store
from nullworker.eventlog import cloudevents
from nullworker.eventlog.log import EventLog
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import Service

METADATA = ROOT / "monitoring" / "datasette.yaml"
DATABASE: dict[str, Any] = yaml.safe_load(METADATA.read_text())["databases"]["nullworker"]
#: Yesterday's midnight, so that the history lies within the last week whenever the tests run.
DAY = (datetime.now(timezone.utc) - timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)


def questions(document: Path) -> dict[str, str]:
    """The SQL under each heading of a page."""
    found = re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    return {title: sql for title, text in found for sql in re.findall(r"```sql\n(.*?);\n```", text, re.DOTALL)}


class History:
    """What happened on a worker yesterday: a service with a clock of its own, on a real log."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.at = DAY.timestamp()
        self.ids: dict[str, str] = {}
        self.service = Service(log, self, Limits(), Readiness())

    def now(self) -> float:
        return self.at

    def moved(self) -> None:
        return None

    def follow(self, _: Anchor) -> None:
        raise AssertionError("nobody sets this clock")

    def clock(self, text: str) -> None:
        """It becomes that time of yesterday; what was due until then has happened when it was."""
        hour, minute, second = (*map(int, text.split(":")), 0)[:3]
        until = (DAY + timedelta(hours=hour, minutes=minute, seconds=second)).timestamp()
        while (due := self.service.next_deadline()) is not None and due <= until:
            self.at = due
            self.service.tick()
        self.at = until

    def claim(self, name: str, request_idx: int, *, route: str | None = None, **claim: Any) -> str:
        session = None if route is None else SessionTerms(60.0, on_close_route=route)
        kind: Any = "request" if session is None else "session"
        made = self.service.claim(Claim(kind=kind, request_idx=request_idx, session=session, **claim))
        self.ids[name] = made.id
        return made.id


def tell(history: History) -> None:
    """anna releases; ben never does; a request waits too long; a session finds the slot taken; one is open."""
    history.clock("14:00")
    anna = history.claim("anna", 401, metadata={"user": "anna"})
    history.clock("14:10")
    history.claim("late", 402, metadata={"user": "cleo"})
    history.clock("14:20")
    history.service.release(anna, reason="explicit", result={"exit": 0})
    history.clock("15:00")
    history.claim("ben", 403, duration=600.0, metadata={"user": "ben"})
    history.clock("15:30")
    session = history.claim("session", 404, duration=3600.0, route="http://127.0.0.1:9/closed")
    history.clock("15:31")
    history.claim("busy", 405, route="http://127.0.0.1:9/closed")
    history.log.move_cursor("delete_requests", history.log.last_seq)
    history.clock("15:40")
    history.service.release(session, reason="session_end")
    history.clock("23:30")
    history.claim("open", 406, metadata={"user": "anna"})


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with contextlib.closing(open_log(tmp_path / "nullworker.db")) as log:
        told = History(log)
        tell(told)
        yield told


def ask(history: History, name: str, **parameters: object) -> list[dict[str, Any]]:
    """One of the named questions, asked as somebody who may only read."""
    conn = sqlite3.connect(f"{history.log.path.as_uri()}?mode=ro", uri=True)
    with contextlib.closing(conn):
        conn.row_factory = sqlite3.Row
        return [dict(row) for row in conn.execute(DATABASE["queries"][name]["sql"], parameters)]


def test_document_and_datasette_ask_the_same_questions() -> None:
    in_datasette = {query["title"]: query["sql"].strip() for query in DATABASE["queries"].values()}
    assert questions(ROOT / "docs" / "audit.md") == in_datasette


@pytest.mark.parametrize(
    ("time", "who"),
    [("13:59:59", None), ("14:05", "anna"), ("14:20", None), ("15:05", "ben"), ("15:35", "session"), ("23:45", "open")],
)
def test_who_held_this_worker_at_a_time(history: History, time: str, who: str | None) -> None:
    rows = ask(history, "who_held_it_at", at=f"{DAY:%Y-%m-%d} {time}")
    assert [row["id"] for row in rows] == ([] if who is None else [history.ids[who]])


def test_why_a_request_was_refused(history: History) -> None:
    late = ask(history, "why_was_it_refused", request=402)
    assert [(row["answer"], row["held_by"], row["waiting"]) for row in late] == [
        ("429: it waited 30.0 s and the worker stayed busy", history.ids["anna"], 0)
    ]
    busy = ask(history, "why_was_it_refused", request=history.ids["busy"])
    assert [(row["answer"], row["held_by"]) for row in busy] == [
        ("429: it was a session, and the slot was taken", history.ids["session"])
    ]
    assert [row["answer"] for row in ask(history, "why_was_it_refused", request="406")] == ["none yet"]
    assert [row["answer"] for row in ask(history, "why_was_it_refused", request="401")] == ["200"]
    assert [row["answer"] for row in ask(history, "why_was_it_refused", request="404")] == [
        "201: it was a session, and got the slot"
    ]
    assert ask(history, "why_was_it_refused", request="999") == []


def test_which_consumer_never_released(history: History) -> None:
    rows = ask(history, "never_released", field="user")
    assert [(row["consumer"], row["never_released"], row["wasted_seconds"]) for row in rows] == [("ben", 1, 600.0)]
    assert [row["id"] for row in ask(history, "expired_holds")] == [history.ids["ben"]]


def test_how_busy_it_was_last_week(history: History) -> None:
    rows = {row["day"]: row for row in ask(history, "busy_last_week")}
    assert len(rows) == 7
    yesterday = rows[f"{DAY:%Y-%m-%d}"]
    seconds = 20 * 60 + 10 * 60 + 10 * 60 + 30 * 60  # the last hold goes on over midnight: only its part counts
    assert (yesterday["holds"], yesterday["busy_seconds"]) == (4, seconds)
    assert yesterday["busy_percent"] == round(100 * seconds / 86400, 1)
    today = rows[f"{DAY + timedelta(days=1):%Y-%m-%d}"]
    begun = today["busy_seconds"] > 0  # not in the first second of a day
    assert (today["holds"], today["busy_percent"]) == (1, 100.0 if begun else 0.0)
    assert sum(row["holds"] for row in rows.values()) == 5


def test_what_the_autoscaler_did_not_acknowledge(history: History) -> None:
    (refused,) = history.log.conn.execute(
        "SELECT seq FROM events WHERE reservation_id = ? AND kind = 'released'", (history.ids["anna"],)
    ).fetchone()
    history.log.settle("delete_requests", [refused], history.at, "refused", "it answered 400")
    rows = ask(history, "not_acknowledged")
    assert [(row["id"], row["request_idx"], row["standing"]) for row in rows] == [
        (history.ids["anna"], 401, "refused: it answered 400"),
        (history.ids["session"], 404, "owed"),
    ]


def test_which_callbacks_were_not_delivered(history: History) -> None:
    (row,) = ask(history, "callbacks_owed")  # and none for the session that was refused
    assert (row["session_id"], row["standing"]) == (history.ids["session"], "owed")
    history.log.settle("callbacks", [row["seq"]], history.at, "given_up", "it cannot be reached")
    (row,) = ask(history, "callbacks_owed")
    assert (row["session_id"], row["standing"], row["detail"]) == (
        history.ids["session"],
        "given_up",
        "it cannot be reached",
    )


def test_a_delivered_callback_is_not_owed(history: History) -> None:
    (row,) = ask(history, "callbacks_owed")
    history.log.settle("callbacks", [row["seq"]], history.at, "delivered")
    assert ask(history, "callbacks_owed") == []


def test_story_of_one_reservation_and_what_is_open(history: History) -> None:
    story = ask(history, "story_of", id=history.ids["ben"])
    assert [(row["kind"], row["at"][11:19]) for row in story] == [
        ("queued", "15:00:00"),
        ("held", "15:00:00"),
        ("expired", "15:10:00"),
    ]
    assert [(row["id"], row["state"]) for row in ask(history, "open_now")] == [(history.ids["open"], "held")]


#: What only the worker knows: docs/fleet.md says so.
ONLY_THE_WORKER = {"not_acknowledged", "callbacks_owed"}


def test_a_fleet_of_twenty_answers_the_same_questions(history: History, tmp_path: Path) -> None:
    rows = history.log.conn.execute("SELECT seq, at, reservation_id, kind, reason, data FROM events").fetchall()
    asked = {"at": f"{DAY:%Y-%m-%d} 14:05", "request": history.ids["late"], "field": "user", "id": history.ids["ben"]}
    with contextlib.closing(open_store(tmp_path / "fleet.db")) as store:
        for number in range(20):
            source = cloudevents.source(str(number), "ab12")
            own = [(seq, at, rid if number == 0 else f"{rid}-{number}", *rest) for seq, at, rid, *rest in rows]
            sent = [cloudevents.encode(cloudevents.reservation_event(source, row, with_results=True)) for row in own]
            store.add(batch.parse(b"[" + b",".join(sent) + b"]"), str(number), 1e9)
        store.conn.row_factory = sqlite3.Row

        def answers(name: str) -> list[dict[str, Any]]:
            return [dict(row) for row in store.conn.execute(DATABASE["queries"][name]["sql"], asked)]

        for name in ("who_held_it_at", "expired_holds", "open_now"):  # one of each worker
            ids = {row["id"] for row in ask(history, name, **asked)}
            assert {row["id"].partition("-")[0] for row in answers(name)} == ids, name
            assert len(answers(name)) == 20 * len(ids), name
        assert [(row["kind"], row["at"]) for row in answers("story_of")] == [
            (row["kind"], row["at"]) for row in ask(history, "story_of", **asked)
        ]
        assert {row["answer"] for row in answers("why_was_it_refused")} == {
            "429: it waited 30.0 s and the worker stayed busy"
        }
        assert [(row["consumer"], row["never_released"]) for row in answers("never_released")] == [("ben", 20)]
        assert [20 * row["holds"] for row in ask(history, "busy_last_week")] == [
            row["holds"] for row in answers("busy_last_week")
        ]
        told = {"who_held_it_at", "expired_holds", "open_now", "story_of", "why_was_it_refused", "never_released"}
        assert told | {"busy_last_week"} | ONLY_THE_WORKER == set(DATABASE["queries"])


RUNBOOKS = [
    page
    for page in sorted((ROOT / "monitoring" / "runbooks").glob("*.md"))
    if "On the collector's machine" not in page.read_text()  # tests/docs/test_fleet_docs.py
]


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_queries_of_a_runbook_run(history: History, page: Path) -> None:
    for sql in re.findall(r"```sql\n(.*?);\n```", page.read_text(), re.DOTALL):
        history.log.conn.execute(sql).fetchall()


def test_metadata_describe_every_table_and_column(history: History) -> None:
    conn = history.log.conn
    names = [name for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")]
    assert sorted(DATABASE["tables"]) == sorted(names)
    for name, told in DATABASE["tables"].items():
        assert told["description"]
        columns = [column[1] for column in conn.execute(f"PRAGMA table_info({name})")]
        described = told.get("columns", {})
        assert told.get("hidden") or list(described) == columns, name
        for column, text in described.items():
            if column.endswith(("_seconds", "_cap")):
                assert "seconds" in text, (name, column)


@contextlib.asynccontextmanager
async def datasette(db: Path) -> AsyncIterator[str]:
    """Datasette in front of a log, with the metadata; its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "datasette", "serve", str(db), "--metadata", str(METADATA), "--port", "0"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None

    async def address(lines: asyncio.StreamReader) -> str:
        async for line in lines:
            if found := re.search(r"running on (http://\S+)", line.decode()):
                return found[1]
        raise AssertionError("Datasette has ended before it listened")

    try:
        yield await asyncio.wait_for(address(process.stderr), PATIENCE)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.process
async def test_datasette_serves_a_live_log(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker, aiohttp.ClientSession() as http, datasette(worker.db) as address:

        async def rows(path: str, **parameters: str) -> Any:
            async with http.get(address + path, params={"_shape": "array", **parameters}) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        assert await rows("/nullworker/reservations.json") == []
        async with http.post(worker.url + "/reserve", json={"duration": 0, "metadata": {"user": "anna"}}) as answer:
            reservation_id = answer.headers["Nullworker-Reservation"]
        assert [row["id"] for row in await rows("/nullworker/reservations.json")] == [reservation_id]
        story = await rows("/nullworker/story_of.json", id=reservation_id)
        assert [row["kind"] for row in story] == ["queued", "held", "expired"]
        given = {"at": "now", "request": reservation_id, "field": "user", "id": reservation_id}
        for name in DATABASE["queries"]:
            assert isinstance(await rows(f"/nullworker/{name}.json", **given), list), name
        async with http.get(address + "/nullworker/reservations") as answer:
            page = await answer.text()
        assert "seconds from the slot to the end" in page
        async with http.get(address + "/nullworker") as answer:
            page = await answer.text()
        assert all(query["title"] in page for query in DATABASE["queries"].values())
