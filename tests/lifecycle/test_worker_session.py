"""WorkerSession, the client of one session, at a real worker: made, kept, saved, taken over, followed to its end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import PATIENCE, WorkerProcess, secured

from nullworker.client import NoAnswer, Refused, SessionEnded, SessionLost, WorkerSession
from nullworker.testing import FakeAutoscaler


def granted(vast: FakeAutoscaler, worker: WorkerProcess, **body: Any) -> WorkerSession:
    return WorkerSession(worker.url, vast.grant(worker.url), {"lifetime": 60, **body})


def copied(session: WorkerSession) -> WorkerSession:
    """As another process has it that was given what was saved."""
    return WorkerSession.load(json.loads(json.dumps(session.saved())))


async def test_what_was_saved_before_the_question_finds_the_same_session(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession
) -> None:
    session = granted(vast, worker, metadata={"job": 7})
    other = copied(session)
    await session.create(http)
    await other.create(http)
    assert session.session_id == other.session_id == (await worker.get("/reservation"))["id"]
    assert (session.lifetime, session.instance) == (60, "7")
    assert await copied(session).ask(http) is None
    ended = await copied(session).end(http)
    assert (ended["state"], ended["reason"], ended["result"]) == ("released", "session_end", None)
    with pytest.raises(SessionEnded) as caught:
        await session.create(http)
    assert caught.value.final == ended == await session.ask(http) == await session.end(http)


async def test_it_is_renewed_and_followed_until_its_consumer_ends_it(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession
) -> None:
    session = granted(vast, worker, lifetime=1)
    await session.create(http)
    events: list[dict[str, Any]] = []
    keeping = asyncio.ensure_future(session.keep(http, on_event=events.append))
    await worker.line("reservation_extended", nth=3)
    await worker.release(reason="consumer_exit", result={"exit_code": 7})
    final = await asyncio.wait_for(keeping, PATIENCE)
    assert (final["state"], final["reason"], final["result"]) == ("released", "consumer_exit", {"exit_code": 7})
    kinds = [event["kind"] for event in events]
    assert kinds[:2] == ["queued", "held"]
    assert kinds.count("released") == 1
    assert len({event["seq"] for event in events}) == len(events)


async def test_another_process_goes_on_with_it_and_hears_how_it_ended_long_after(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession
) -> None:
    session = granted(vast, worker, lifetime=2)
    await session.create(http)
    keeping = asyncio.ensure_future(session.keep(http))
    await worker.line("reservation_extended")
    keeping.cancel()
    await asyncio.wait({keeping})
    assert (await worker.get("/reservation"))["id"] == session.session_id
    other = asyncio.ensure_future(copied(session).keep(http))
    await worker.line("reservation_extended", nth=4)
    await worker.release(result={"rows": 1})
    assert (await asyncio.wait_for(other, PATIENCE))["result"] == {"rows": 1}
    assert (await copied(session).keep(http))["reason"] == "explicit"


async def test_it_survives_a_restart_of_its_worker(vast: FakeAutoscaler, tmp_path: Path) -> None:
    from programs import free_port

    async with secured(tmp_path, vast, WORKER_PORT=str(free_port())) as worker, aiohttp.ClientSession() as http:
        await worker.line("key_loaded")
        session = granted(vast, worker, lifetime=6)
        await session.create(http)
        said: list[str] = []
        keeping = asyncio.ensure_future(session.keep(http, say=said.append))
        await worker.line("reservation_extended")
        await worker.kill()
        await worker.start()
        await worker.line("reservation_extended")
        await worker.release(result=1)
        assert (await asyncio.wait_for(keeping, PATIENCE))["result"] == 1


async def test_a_worker_that_is_gone_loses_it_a_lifetime_after_the_last_renewal(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession
) -> None:
    session = granted(vast, worker, lifetime=1)
    await session.create(http)
    loop = asyncio.get_running_loop()
    keeping = asyncio.ensure_future(session.keep(http))
    await worker.line("reservation_extended")
    since = loop.time()
    await worker.kill()
    with pytest.raises(SessionLost, match=r"longer than the session's lifetime of 1 s.*no consumer had attached"):
        await asyncio.wait_for(keeping, PATIENCE)
    assert loop.time() - since < 8


async def test_once_a_consumer_has_attached_it_is_silent_and_not_lost(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nullworker.client.session.SILENT_SECONDS", 0.2)
    session = granted(vast, worker, lifetime=1)
    await session.create(http)
    asked: list[float] = []

    async def gone() -> bool:
        asked.append(asyncio.get_running_loop().time())
        return len(asked) == 3

    said: list[str] = []
    changed = asyncio.Event()
    keeping = asyncio.ensure_future(session.keep(http, gone=gone, say=said.append, on_change=changed.set))
    async with http.post(f"{worker.control}/attach", params={"reservation_id": session.session_id or ""}):
        await asyncio.wait_for(changed.wait(), PATIENCE)
        assert session.saved()["attached"]
        await worker.kill()
        with pytest.raises(SessionLost, match="is gone"):
            await asyncio.wait_for(keeping, PATIENCE)
    assert session.silent
    assert len(asked) == 3
    assert any("is silent: its consumer may still work" in line for line in said)


async def test_a_refusal_and_nobody_there_are_told_apart(
    vast: FakeAutoscaler, worker: WorkerProcess, http: aiohttp.ClientSession
) -> None:
    first, second = granted(vast, worker), granted(vast, worker)
    await first.create(http)
    with pytest.raises(Refused) as refused:
        await second.create(http)
    assert (refused.value.http_status, refused.value.again) == (429, True)
    await worker.kill()
    with pytest.raises(NoAnswer) as silence:
        await second.create(http)
    assert not silence.value.sent
