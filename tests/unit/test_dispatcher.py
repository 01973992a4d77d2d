"""A whole dispatcher in virtual time: prices, other clients, stalls, its ends, and what it logs and shows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dispatch_world import World, dispatching, play, rows, until
from prometheus_client import generate_latest

from nullworker import __version__
from nullworker.client.worker_http import HoldError
from nullworker.dispatch import vast
from nullworker.dispatch.decision import Policy
from nullworker.dispatch.dispatcher import ASSUMED_PRICE, END_SECONDS
from nullworker.dispatch.driver import Terms
from nullworker.dispatch.limits import Limits
from nullworker.dispatch.metrics import Exporter
from nullworker.errors import CannotStart

FREE = Limits(price=1.0)


@pytest.mark.parametrize("says_instance", [True, False])
def test_each_hold_has_the_price_of_its_instance_a_moment_after_it_was_granted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says_instance: bool
) -> None:
    """Also if the worker does not say which instance it is: by its address."""

    async def scene(world: World) -> None:
        world.says_instance = says_instance
        async with dispatching(world, tmp_path) as dispatcher:
            await asyncio.sleep(40)  # between two polls of the prices
            assert dispatcher.price() == ASSUMED_PRICE
            world.prices = {1: 0.3, 2: 0.7, 9: 0.5}
            world.jobs = [300.0] * 2
            await until(lambda: len(world.held) == 2, 10)
            await asyncio.sleep(4)
            assert rows(tmp_path, "SELECT price, instance FROM claims ORDER BY price") == [(0.3, 1), (0.7, 2)]
            said = [fields for word, fields in world.lines if word == "claim_priced"]
            assert sorted((fields["price"], fields["instance"]) for fields in said) == [(0.3, 1), (0.7, 2)]
            assert dispatcher.price() == 0.7
            reads = world.prices_read
            await asyncio.sleep(200)
            assert world.prices_read == reads
            assert rows(tmp_path, "SELECT count(*) FROM events WHERE kind = 'priced'") == [(2,)]

    play(monkeypatch, scene)


def test_the_dearest_machine_that_is_rented_is_the_price_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.prices = {1: 0.3, 9: 0.5}
        async with dispatching(world, tmp_path) as dispatcher:
            await asyncio.sleep(5)
            assert dispatcher.price() == 0.5
            world.jobs, world.ready_at = [1.0], 1e9
            await asyncio.sleep(300)
            assert world.prices_read == 1  # a claim that has no worker yet has no price either

    play(monkeypatch, scene)


def test_an_instance_that_vast_lists_late_is_asked_for_again_and_not_all_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.prices = {9: 0.5}
        world.jobs = [600.0]
        async with dispatching(world, tmp_path):
            await until(lambda: world.held, 10)
            await asyncio.sleep(300)
            assert 300 / 60 <= world.prices_read <= 300 / 20
            world.prices[1] = 0.25
            await asyncio.sleep(40)
            assert rows(tmp_path, "SELECT price FROM claims") == [(0.25,)]

    play(monkeypatch, scene)


def test_prices_that_cannot_be_read_are_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.prices_down = True
        world.prices = {1: 0.5}
        world.jobs = [900.0]
        async with dispatching(world, tmp_path, limits=Limits(dollars=100.0)) as dispatcher:
            await asyncio.sleep(600)
            assert world.count("prices_unreadable") == 1
            said = next(fields for word, fields in world.lines if word == "prices_unreadable")
            assert said == {"why": "connection refused", "message": "4.00 an hour is assumed meanwhile"}
            assert dispatcher.room.spent.dollars == pytest.approx(595 / 3600 * 4.0, rel=0.03)
            assert dispatcher.readiness() == {"queue": None, "ledger": None, "autoscaler": None}
            world.prices_down = False
            await asyncio.sleep(60)
            assert world.count("prices_unreadable_over") == 1
            assert dispatcher.room.spent.dollars == pytest.approx(655 / 3600 * 0.5, rel=0.03)

    play(monkeypatch, scene)


def test_with_a_price_of_the_user_vast_is_not_asked_for_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.prices = {1: 0.5}
        world.jobs = [100.0]
        async with dispatching(world, tmp_path, limits=Limits(price=2.5)) as dispatcher:
            assert dispatcher.price() == 2.5
            await until(lambda: world.held, 10)
            await asyncio.sleep(1)
            assert rows(tmp_path, "SELECT price, instance FROM claims") == [(2.5, 1)]
            assert dispatcher.price() == 2.5
            await asyncio.sleep(90)
        assert world.prices_read == 0

    play(monkeypatch, scene)


def test_workers_that_work_for_somebody_else_are_a_warning_at_each_rise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [7200.0] * 2
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 2, 10)
            await asyncio.sleep(120)
            assert (dispatcher.foreign, world.count("foreign_holds")) == (0, 0)
            for others, said in (({7: 2}, 1), ({7: 1, 8: 1}, 2), ({7: 1, 8: 1}, 2), ({8: 1}, 2), ({}, 2)):
                world.foreign = dict(others)
                world.listed |= {7, 8, 9}
                world.stopped = {world.url(9)}  # what it worked on last is over
                world.foreign[9] = 1
                await asyncio.sleep(65)
                assert (dispatcher.foreign, world.count("foreign_holds")) == (len(others), said)
            said_first = next(fields for word, fields in world.lines if word == "foreign_holds")
            assert (said_first["working"], said_first["ours"]) == (3, 2)
            world.engine_down = True
            await asyncio.sleep(130)
            world.engine_down = False
            world.foreign[8] = 1
            await asyncio.sleep(65)
            assert dispatcher.foreign == 1

    play(monkeypatch, scene)


def test_a_claim_that_waits_for_longer_than_stall_is_said_once_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [1000.0]
        async with dispatching(world, tmp_path, limits=FREE, stall=300.0) as dispatcher:
            await until(lambda: world.held, 10)
            world.jobs = [10.0]
            world.ready_at = world.loop.time() + 600
            await asyncio.sleep(100)
            world.jobs = [10.0] * 2
            await asyncio.sleep(200)
            assert (dispatcher.stalled, dispatcher.status()["stalled"], world.count("stalled")) == (False, False, 0)
            await asyncio.sleep(15)
            assert (dispatcher.stalled, dispatcher.status()["stalled"], world.count("stalled")) == (True, True, 1)
            said = next(fields for word, fields in world.lines if word == "stalled")
            assert (said["pending"], said["held"]) == (2, 1)
            assert 300 < said["oldest_seconds"] <= 306
            assert "max_workers" in said["message"]
            await asyncio.sleep(200)
            assert world.count("stalled") == 1
            await until(lambda: world.done == 2, 200)
            await asyncio.sleep(5)
            assert (dispatcher.stalled, world.count("stalled_over")) == (False, 1)

    play(monkeypatch, scene)


def test_a_session_that_takes_long_to_be_answered_is_a_stall_only_while_fewer_than_max_are_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        options: dict[str, Any] = {"limits": FREE, "stall": 60.0, "terms": Terms(lifetime=600.0)}
        world.jobs = [900.0] * 2
        async with dispatching(world, tmp_path, policy=Policy(2), **options):
            await until(lambda: len(world.held) == 2, 10)
        world.loses_answers = True
        world.jobs = [900.0]
        async with dispatching(world, tmp_path, policy=Policy(3), **options) as dispatcher:
            await until(lambda: dispatcher.book.in_state("granted"), 10)
            await asyncio.sleep(70)
            assert dispatcher.stalled
        async with dispatching(world, tmp_path, policy=Policy(2), **options) as dispatcher:
            await asyncio.sleep(70)
            assert len(dispatcher.book.in_state("granted")) == 1
            assert not dispatcher.stalled

    play(monkeypatch, scene)


@pytest.mark.parametrize("answers", [True, False])
def test_end_all_ends_what_the_ledger_has_and_tells_how_many_it_could_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: bool
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [900.0] * 2
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: len(world.held) == 2, 10)
            world.jobs = [900.0]
            world.loses_answers = True
            await until(lambda: dispatcher.book.in_state("granted"), 10)
            world.ready_at = world.loop.time() + 10_000
            world.jobs = [900.0]
            await until(lambda: dispatcher.book.in_state("pending"), 20)
        world.loses_answers = False
        world.unreachable = set() if answers else {world.url(1), world.url(2)}
        began = world.loop.time()
        async with dispatching(world, tmp_path, limits=FREE, runs=False) as dispatcher:
            assert len(dispatcher.book.claims) == 4
            await dispatcher.connect()
            assert await dispatcher.end_all() == (0 if answers else 2)
        assert len(world.held) == (0 if answers else 2)
        assert (world.loop.time() - began >= END_SECONDS) is not answers
        ends = rows(tmp_path, "SELECT reason, held_at IS NULL FROM claims WHERE state = 'ended' ORDER BY held_at")
        assert ends == [("end_all", 1)] + [("end_all", 0)] * (3 if answers else 1)

    play(monkeypatch, scene)


def test_a_claim_that_waited_for_a_worker_when_the_dispatcher_stopped_has_reached_none_and_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs, world.ready_at = [10.0], 1e9
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await until(lambda: dispatcher.book.in_state("pending"), 10)
            assert dispatcher.driver._tasks
            await dispatcher.driver.stop()
            assert not dispatcher.driver._tasks
        world.jobs = []
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await asyncio.sleep(0.1)
            assert dispatcher.book.claims == {}
        assert rows(tmp_path, "SELECT reason FROM claims") == [("dispatcher_restart",)]

    play(monkeypatch, scene)


def test_an_endpoint_that_is_not_there_ends_the_dispatcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        def connect(*_: Any) -> None:
            raise HoldError("no endpoint named 'null'")

        monkeypatch.setattr(vast, "connect", connect)
        async with dispatching(world, tmp_path, limits=FREE, runs=False) as dispatcher:
            with pytest.raises(CannotStart, match="no endpoint named 'null'"):
                await dispatcher.run()
            reads = world.reads
            await asyncio.sleep(60)
            assert world.reads == reads <= 1  # nothing of it goes on

    play(monkeypatch, scene)


def test_a_queue_is_not_ready_before_it_was_read_or_once_that_is_too_long_ago(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        async with dispatching(world, tmp_path, limits=FREE, runs=False) as dispatcher:
            assert dispatcher.readiness() == {
                "queue": "it has not been read yet",
                "ledger": None,
                "autoscaler": "no call has been answered yet",
            }
            shown = dispatcher.status()
            assert (shown["last_poll_at"], shown["decision"], shown["foreign"], shown["stalled"]) == (
                None,
                None,
                0,
                False,
            )
        async with dispatching(world, tmp_path, limits=FREE) as dispatcher:
            await asyncio.sleep(12)
            assert dispatcher.readiness() == {"queue": None, "ledger": None, "autoscaler": None}
            monkeypatch.setattr("nullworker.dispatch.dispatcher.look", lambda queue: hangs())
            await asyncio.sleep(22)
            assert dispatcher.readiness()["queue"] is None
            await asyncio.sleep(9)
            assert dispatcher.readiness()["queue"] == "the last look is too long ago"

    play(monkeypatch, scene)


async def hangs() -> Any:
    await asyncio.sleep(10_000)


def test_the_status_and_the_log_tell_a_claims_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.jobs = [60.0]
        options: dict[str, Any] = {"limits": Limits(hours=10.0, price=1.0), "metadata": {"team": "blue"}}
        async with dispatching(world, tmp_path, **options) as dispatcher:
            await until(lambda: dispatcher.book.in_state("held"), 10)
            (claim,) = dispatcher.book.claims.values()
            await asyncio.sleep(30)
            shown = dispatcher.status()
            decision = shown.pop("decision")
            assert (decision["opens"], decision["held"], decision["in_flight"]) == (0, 1, 1)
            (told,) = shown.pop("claims")
            assert told == {
                "id": claim.id,
                "state": "held",
                "opened_at": told["opened_at"],
                "held_at": told["held_at"],
                "attached": True,
                "seconds": pytest.approx(30, abs=2),
                "url": "http://worker-1",
                "instance": 1,
                "price": 1.0,
            }
            assert told["opened_at"] < told["held_at"] < "2027-01-15T08:17"
            assert shown == {
                "version": __version__,
                "endpoint": "null",
                "queue": "memory",
                "policy": Policy(4)._asdict(),
                "ready": {"queue": None, "ledger": None, "autoscaler": None},
                "last_poll_at": shown["last_poll_at"],
                "limit": {
                    "reached": None,
                    "hours_24h": pytest.approx(27 / 3600, rel=0.2),
                    "dollars_24h": pytest.approx(27 / 3600, rel=0.2),
                    "opens_again_at": None,
                },
                "stalled": False,
                "foreign": 0,
            }
            assert told["held_at"] < shown["last_poll_at"] < "2027-01-15T08:18"
            world.unreachable = {world.url(1)}
            await asyncio.sleep(60)
            assert dispatcher.status()["claims"][0]["state"] == "silent"
            world.unreachable = set()
            await until(lambda: not dispatcher.book.claims, 100)
        (opened, granted, held, attached, ended) = (
            next(fields for word, fields in world.lines if word == f"claim_{kind}")
            for kind in ("pending", "granted", "held", "attached", "ended")
        )
        assert opened == {"claim": claim.id}
        assert claim.opened.metadata == {"team": "blue", "claim": claim.id}
        assert granted == attached == {"claim": claim.id, "url": "http://worker-1"}
        assert held == {**granted, "waited": pytest.approx(0.15, abs=0.05)}
        assert ended.pop("held_seconds") == pytest.approx(120, abs=40)
        assert ended == {**granted, "reason": "consumer_exit", "result": {"exit_code": 0}}
        decided = next(fields for word, fields in world.lines if word == "decided")
        assert (decided["waiting"], decided["opens"], decided["opened"], decided["given_up"]) == (1, 1, 1, 0)

    play(monkeypatch, scene)


def test_a_hold_without_a_known_price_costs_hours_and_no_dollars(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scene(world: World) -> None:
        world.jobs = [300.0]
        async with dispatching(world, tmp_path) as dispatcher:
            exporter = Exporter(dispatcher)
            await asyncio.sleep(200)
            seen = scraped(exporter)
            assert float(seen["hold_seconds_total"]) == pytest.approx(200, abs=6)
            assert seen["dollars_total"] == "0.0"
            await until(lambda: world.done == 1, 200)
            await asyncio.sleep(30)
            seen = scraped(exporter)
            assert float(seen["hold_seconds_total"]) == pytest.approx(300, abs=15)
            assert seen["dollars_total"] == "0.0"

    play(monkeypatch, scene)


def scraped(exporter: Exporter) -> dict[str, str]:
    text = generate_latest(exporter.registry).decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("nullworker_dispatch_"))
    return {name.removeprefix("nullworker_dispatch_"): value for name, value in samples}


def test_the_metrics_of_a_hold_before_in_and_after_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        world.jobs = [3600.0]
        async with dispatching(world, tmp_path, limits=Limits(price=2.0), runs=False) as dispatcher:
            before = scraped(Exporter(dispatcher))
            for name in ("queue_waiting", "queue_in_flight", "desired"):
                assert before[name] == "NaN"
            assert before["paused"] == before["foreign"] == before["stalled"] == "0.0"
            assert (before["last_poll_timestamp_seconds"], before["hold_seconds_total"]) == ("0.0", "0.0")
        async with dispatching(world, tmp_path, limits=Limits(price=2.0)) as dispatcher:
            exporter = Exporter(dispatcher)
            await until(lambda: dispatcher.book.in_state("held"), 10)
            await asyncio.sleep(1800)
            during = scraped(exporter)
            assert {name: during[name] for name in ("queue_waiting", "queue_in_flight", "desired", "paused")} == {
                "queue_waiting": "0.0",
                "queue_in_flight": "1.0",
                "desired": "1.0",
                "paused": "0.0",
            }
            assert {state: during[f'claims{{state="{state}"}}'] for state in ("pending", "granted", "held")} == {
                "pending": "0.0",
                "granted": "0.0",
                "held": "1.0",
            }
            assert float(during["hold_seconds_total"]) == pytest.approx(1800, abs=3)
            assert float(during["dollars_total"]) == pytest.approx(1.0, rel=0.01)
            assert (during["claim_wait_seconds_count"], during['claim_wait_seconds_bucket{le="0.5"}']) == ("1.0", "1.0")
            assert float(during["last_poll_timestamp_seconds"]) == pytest.approx(dispatcher.clock.now(), abs=6)
            assert during[f'build_info{{version="{__version__}"}}'] == "1.0"
            assert {during[name] for name in ("silent", "foreign", "stalled", "limit_reached", "ledger_unwritten")} == {
                "0.0"
            }
            world.unreachable = {world.url(1)}
            world.queue_fault = hangs
            await asyncio.sleep(200)
            assert (scraped(exporter)["silent"], float(scraped(exporter)["queue_errors_total"]) > 1) == ("1.0", True)
            world.unreachable, world.queue_fault = set(), None
            await until(lambda: not dispatcher.book.claims, 3000)
            dispatcher.book.claim(dispatcher.core.counts)
            dispatcher.book.ended(next(iter(dispatcher.book.claims)), "a reason of next year")
            after = scraped(exporter)
            assert (after['ended_total{reason="consumer_exit"}'], after['ended_total{reason="other"}']) == (
                "1.0",
                "1.0",
            )
            assert after['ended_total{reason="end_all"}'] == "0.0"
            assert float(after["hold_seconds_total"]) == pytest.approx(3600, abs=100)
            assert float(after["dollars_total"]) == pytest.approx(2.0, rel=0.03)
        async with dispatching(world, tmp_path, limits=Limits(price=2.0), runs=False) as dispatcher:
            again = scraped(Exporter(dispatcher))
            for name in ("hold_seconds_total", "dollars_total"):
                assert float(again[name]) == pytest.approx(float(after[name]))

    play(monkeypatch, scene)
