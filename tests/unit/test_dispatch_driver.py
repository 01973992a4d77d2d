"""How a claim is driven, in virtual time: refusals, lost credentials, capped lifetimes, requested ends, bugs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dispatch_world import World, dispatching, play, rows, until

from nullworker.client.session import WorkerSession
from nullworker.dispatch.decision import Policy
from nullworker.dispatch.driver import AGAIN_SECONDS, POLL_SECONDS, Terms, number
from nullworker.dispatch.limits import Limits

FREE = Limits(price=1.0)


def pauses(times: list[float]) -> list[float]:
    return [times[number] - times[number - 1] for number in range(1, len(times))]


@pytest.mark.parametrize("state", ["granted", "held"])
def test_a_claim_whose_credentials_were_removed_by_hand_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.loses_answers = [900.0], state == "granted"
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state(state), 10)
        rows(tmp_path, "DELETE FROM credentials")
        renewals = world.renewals
        async with dispatching(world, tmp_path, limits=FREE):
            await asyncio.sleep(20)
        assert rows(tmp_path, "SELECT reason, why FROM claims WHERE reason IS NOT NULL") == [
            ("lost", "its credentials are missing")
        ]
        assert world.renewals == renewals

    play(monkeypatch, scene)


def test_a_worker_that_refuses_for_good_is_asked_again_for_a_lifetime_after_the_last_renewal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, terms = [5000.0], Terms(lifetime=90.0)
        async with dispatching(world, tmp_path, policy=Policy(1), limits=FREE, terms=terms) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            await asyncio.sleep(1000)
            world.refuses = 401
            await asyncio.sleep(70)
            assert dispatcher.book.in_state("held")
            refusals = world.count("worker_refuses")
            assert 2 <= refusals <= 70 / AGAIN_SECONDS
            world.refuses = None
            await asyncio.sleep(300)
            assert (world.count("worker_refuses"), len(dispatcher.book.in_state("held"))) == (refusals, 1)
            renewals, world.refuses = world.renewals, 401
            await until(lambda: not dispatcher.book.in_state("held"), 200)
            assert world.renewals - renewals <= 90 / AGAIN_SECONDS
        ((reason, seconds, why),) = rows(tmp_path, "SELECT reason, held_seconds, why FROM claims WHERE held_at")[:1]
        assert (reason, "answered 401" in why) == ("lost", True)
        assert seconds == pytest.approx(1370 + 90, abs=50)  # until then it may have been held

    play(monkeypatch, scene)


@pytest.mark.parametrize("away", [None, 3600.0])
def test_a_silent_worker_without_a_consumer_counts_as_held_until_a_lifetime_after_its_last_renewal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, away: float | None
) -> None:
    """Also if no dispatcher has run since."""

    async def scene(world: World) -> None:
        world.jobs, world.attaches = [5000.0], False
        options: dict[str, Any] = {"limits": FREE, "terms": Terms(lifetime=90.0, attach=0.0)}
        lost = "SELECT 1 FROM claims WHERE reason = 'lost'"
        async with dispatching(world, tmp_path, **options) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            await asyncio.sleep(1000)
            world.unreachable = {world.url(1)}
            if away is None:
                await until(lambda: rows(tmp_path, lost), 200)
        await asyncio.sleep(away or 0)
        async with dispatching(world, tmp_path, **options):
            await until(lambda: rows(tmp_path, lost), 200)
        ((seconds,),) = rows(tmp_path, "SELECT held_seconds FROM claims WHERE reason = 'lost'")
        assert 1000 - 30 + 90 <= seconds <= 1000 + 90 + 1

    play(monkeypatch, scene)


def test_after_a_restart_a_worker_that_refuses_has_a_lifetime_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [5000.0]
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            held = list(dispatcher.book.claims)
        await asyncio.sleep(600)
        world.refuses = 401
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await asyncio.sleep(25)
            world.refuses = None
            await asyncio.sleep(100)
            assert [claim.id for claim in dispatcher.book.in_state("held")] == held

    play(monkeypatch, scene)


@pytest.mark.parametrize(("refuses", "knows"), [(None, True), (None, False), (401, True)])
def test_an_end_that_is_requested_is_asked_for_until_the_worker_answers_and_keeps_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refuses: int | None, knows: bool
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [5000.0]
        async with dispatching(world, tmp_path, limits=FREE, terms=Terms(lifetime=600.0)) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            (claim,) = dispatcher.book.claims.values()
            world.unreachable, world.refuses = set() if refuses else {world.url(1)}, refuses
            dispatcher.driver.end(claim, "limit")
            dispatcher.driver.end(claim, "end_all")
            await asyncio.sleep(100)
            assert dispatcher.book.in_state("held")
            assert 2 <= world.count("session_not_ended") <= 100 / AGAIN_SECONDS
            if not knows:  # a worker with another log
                world.finals[world.sessions["s1"]] = {"error": "there is no session"}
                world.held.pop(world.sessions["s1"]).cancel()
            world.unreachable, world.refuses = set(), None
            await until(lambda: claim.id not in dispatcher.book.claims, 60)
        ((reason, final, why),) = rows(tmp_path, "SELECT reason, final_status, why FROM claims LIMIT 1")
        assert reason == "limit"
        assert (why is None, '"session_end"' in str(final)) == (knows, knows)

    play(monkeypatch, scene)


def test_a_session_that_its_worker_does_not_know_any_more_has_ended_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [5000.0]
        async with dispatching(world, tmp_path, policy=Policy(1), limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            await asyncio.sleep(100)
            name = world.sessions["s1"]
            world.finals[name] = {"error": "there is no session"}
            await until(lambda: not dispatcher.book.in_state("held"), 20)
        ((reason, seconds),) = rows(tmp_path, "SELECT reason, held_seconds FROM claims WHERE held_at LIMIT 1")
        assert (reason, seconds) == ("unknown", pytest.approx(105, abs=15))

    play(monkeypatch, scene)


def test_a_granted_claim_whose_worker_does_not_know_its_session_any_more_has_ended_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.loses_answers = [5000.0], True
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("granted"), 10)
            await asyncio.sleep(2)
        world.loses_answers, world.finals["session-s1"] = False, {"error": "there is no session"}
        async with dispatching(world, tmp_path, policy=Policy(1), limits=FREE):
            await asyncio.sleep(5)
        ends = rows(tmp_path, "SELECT session_id, reason FROM claims WHERE state = 'ended'")
        assert ends == [("unknown", "unknown")]

    play(monkeypatch, scene)


def test_a_lifetime_that_the_worker_caps_is_said_and_renewed_at_a_third_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.lifetime_cap, world.jobs = 60.0, [600.0]
        async with dispatching(world, tmp_path, limits=FREE, terms=Terms(lifetime=600.0)) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            await asyncio.sleep(590)
            assert 27 <= world.renewals <= 31
            (claim,) = dispatcher.book.claims.values()
        said = [fields for word, fields in world.lines if word == "lifetime_capped"]
        assert [{**fields, "message": ""} for fields in said] == [
            {"claim": claim.id, "asked": 600.0, "allowed": 60.0, "message": ""}
        ]
        assert "MAX_RESERVATION_SECONDS" in said[0]["message"]
        world.lifetime_cap = 3600.0
        async with dispatching(world, tmp_path, limits=FREE, terms=Terms(lifetime=600.0)) as dispatcher:
            world.jobs.append(20.0)
            await until(lambda: not dispatcher.book.claims, 100)
        assert world.count("lifetime_capped") == 1

    play(monkeypatch, scene)


def test_a_bug_is_logged_and_its_claim_driven_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed: list[float] = []
    keep = WorkerSession.keep

    async def scene(world: World) -> None:
        async def fails(session: WorkerSession, *arguments: Any, **options: Any) -> Any:
            if len(failed) < 3:
                failed.append(world.loop.time())
                raise KeyError("a bug")
            return await keep(session, *arguments, **options)

        monkeypatch.setattr(WorkerSession, "keep", fails)
        world.jobs, world.bugs = [100.0], True
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: world.done == 1, 200)
            await until(lambda: not dispatcher.book.claims, 20)
        assert world.count("claim_failed") == 3
        assert pauses(failed) == pytest.approx([AGAIN_SECONDS] * 2, abs=1)

    play(monkeypatch, scene)


def test_refusals_make_the_pause_before_the_next_worker_longer_and_keep_the_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.refuses = [10.0], 503
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await asyncio.sleep(300)
            assert 300 / 32 <= world.claims <= 300 / 15 + 6
            said = [fields for word, fields in world.lines if word == "claim_refused"]
            assert len(said) == world.claims
            assert {fields["status"] for fields in said} == {503}
            assert said[0]["url"] == "http://worker-1"
            assert "answered 503" in said[0]["why"]
            assert world.asked == list(range(world.claims))  # each with the number of the answer before
            again = (
                "SELECT at - (SELECT max(at) FROM events WHERE kind = 'refused' AND seq < e.seq)"
                " FROM events e WHERE kind = 'granted' ORDER BY seq"
            )
            for number, (pause,) in enumerate(rows(tmp_path, again)[1:]):
                longest = min(2.0**number, 30.0)
                assert longest / 2 <= pause - 0.1 <= longest + 0.01  # random, so that claims do not go in step
            world.refuses = None
            await until(lambda: not dispatcher.book.claims, 100)
        assert rows(tmp_path, "SELECT reason, refusals FROM claims") == [("consumer_exit", len(said))]

    play(monkeypatch, scene)


def test_a_claim_asks_for_a_worker_with_one_request_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [10.0]
        world.ready_at = world.loop.time() + 180
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: world.done == 1, 300)
            await until(lambda: not dispatcher.book.claims, 60)
        assert len(world.asked) >= 180 / 5
        assert world.asked[0] == 0
        assert set(world.asked[1:]) == {1001}
        assert world.claims == 1

    play(monkeypatch, scene)


def test_many_claims_ask_less_often_than_a_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(jobs: int) -> float:
        async def scene(world: World) -> None:
            world.jobs, world.ready_at = [1.0] * jobs, 1e9
            async with dispatching(world, tmp_path / str(jobs), policy=Policy(jobs), limits=FREE):
                await asyncio.sleep(100)

        (tmp_path / str(jobs)).mkdir()
        return len(play(monkeypatch, scene).asked) / jobs

    assert 100 / (0.1 + 1.1) <= asked(1) <= 100 / (0.1 + 0.55)
    assert 100 / (0.1 + POLL_SECONDS) <= asked(60) <= 100 / (0.1 + POLL_SECONDS / 2)


def test_an_engine_that_fails_is_asked_again_ever_more_slowly_and_soon_after_a_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        failures: list[float] = []
        route = world.endpoint._route

        async def observed(**options: Any) -> Any:
            try:
                return await route(**options)
            except OSError:
                failures.append(world.loop.time())
                raise

        world.endpoint._route = observed
        world.jobs, world.ready_at = [10.0], 1e9
        async with dispatching(world, tmp_path, limits=FREE):
            await asyncio.sleep(10)
            for _ in range(2):
                failures.clear()
                world.engine_down = True
                await asyncio.sleep(100)
                world.engine_down = False
                assert [round(pause) for pause in pauses(failures)[:5]] == [1, 2, 4, 8, 10]
                await asyncio.sleep(30)

    play(monkeypatch, scene)


def test_the_number_of_an_instance_is_that_of_the_answer_if_it_is_one() -> None:
    assert [number(text) for text in ("17", None, "", "C.17", "1e3", "-1")] == [17, None, None, None, None, None]


def test_a_worker_that_has_ended_the_session_before_its_answer_arrived_says_which_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.loses_answers = [20.0], True
        async with dispatching(world, tmp_path, limits=FREE, terms=Terms(lifetime=300.0)) as dispatcher:
            await until(lambda: world.done == 1, 60)
            world.finals["session-s1"]["reservation_id"] = "session-s1"
            world.loses_answers = False
            await until(lambda: not dispatcher.book.claims, 20)
        assert rows(tmp_path, "SELECT session_id, reason, held_seconds IS NOT NULL, wait_seconds > 20 FROM claims") == [
            ("session-s1", "consumer_exit", 1, 1)
        ]

    play(monkeypatch, scene)


@pytest.mark.parametrize("lifetime", [20.0, 900.0])
def test_a_granted_claim_keeps_the_lifetime_it_was_asked_for_when_the_next_start_has_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lifetime: float
) -> None:
    """For so long its worker may hold it, so for so long it is asked, and so much counts in the limits."""

    async def scene(world: World) -> None:
        world.jobs, world.loses_answers = [5000.0] * 2, True
        async with dispatching(world, tmp_path, limits=FREE, terms=Terms(lifetime=300.0)) as dispatcher:
            await until(lambda: len(dispatcher.book.in_state("granted")) == 2, 10)
        world.unreachable = {world.url(2)}
        async with dispatching(world, tmp_path, policy=Policy(2), limits=FREE, terms=Terms(lifetime=lifetime)) as again:
            await asyncio.sleep(200)
            assert (len(again.book.in_state("granted")), world.count("claim_lost")) == (2, 0)
            world.loses_answers = False
            await until(lambda: again.book.in_state("held"), 10)
            await until(lambda: rows(tmp_path, "SELECT 1 FROM claims WHERE reason = 'lost'"), 120)
            assert rows(tmp_path, "SELECT held_seconds FROM claims WHERE reason = 'lost'") == [(300.0,)]
        held = "SELECT data ->> 'lifetime' FROM events WHERE kind = 'held' ORDER BY seq"
        assert rows(tmp_path, held)[0] == (300.0,)
        assert (world.count("claim_lost"), world.count("lifetime_capped")) == (1, 0)

    play(monkeypatch, scene)


def test_what_has_ended_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a dispatcher that runs for months, whatever became of its claims."""

    async def scene(world: World) -> None:
        world.jobs, world.loses_answers = [50.0] * 3, True
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(dispatcher.book.in_state("granted")) == 3, 10)
        world.loses_answers = False
        world.finals["session-s1"] = world.finals["session-s2"] = {"error": "there is no session"}
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            for claim in list(dispatcher.book.claims.values()):
                dispatcher.driver.end(claim, "end_all")
            await until(lambda: not dispatcher.book.claims, 20)
            world.jobs, world.ready_at = [10.0] * 3, world.loop.time() + 60
            await until(lambda: dispatcher.book.in_state("pending"), 60)
            world.jobs.clear()
            await until(lambda: rows(tmp_path, "SELECT 1 FROM claims WHERE reason = 'not_needed'"), 60)
            world.ready_at, world.jobs = 0.0, [20.0]
            await until(lambda: not world.jobs and not dispatcher.book.claims, 200)
            await asyncio.sleep(1)
            assert [name for name, value in vars(dispatcher.driver).items() if isinstance(value, dict) and value] == []

    play(monkeypatch, scene)
