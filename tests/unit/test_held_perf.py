"""NULL_REPORT_PERF=held: over all delivered reports, cur_perf adds up to max_perf times the seconds held."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from harness import secured, signed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nullworker.autoscaler.messages import Identity
from nullworker.autoscaler.reporter import Reporter
from nullworker.eventlog.opening import open_log
from nullworker.fsm.book import Claim, Limits
from nullworker.fsm.events import SessionTerms
from nullworker.readiness import Readiness
from nullworker.service import Service
from nullworker.testing import FakeAutoscaler
from nullworker.testing.fakes import FakeClock, MemoryJournal

PERF = 250.0
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 5_000)),  # milliseconds
        st.tuples(st.just("claim"), st.just(0)),
        st.tuples(st.just("release"), st.just(0)),
        st.tuples(st.just("hang_up"), st.just(0)),  # one that waits
        st.tuples(st.just("report"), st.sampled_from([0, 0, 1])),  # 1: it is not delivered
    ),
    max_size=60,
)


class Receiver:
    """An autoscaler that takes a report or not. `perfs`: cur_perf of those it took."""

    trouble = "down"

    def __init__(self) -> None:
        self.perfs: list[float] = []
        self.down = False

    async def post(self, path: str, body: dict[str, Any], *, seconds: float) -> str:
        if self.down:
            return "failed"
        self.perfs.append(body["cur_perf"])
        return "ok"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with contextlib.closing(open_log(tmp_path_factory.mktemp("perf") / "log.db")) as log:
        yield log


@settings(deadline=None, max_examples=60)
@given(steps=STEPS)
@example(steps=[("claim", 0), ("claim", 0), ("hang_up", 0), ("wait", 1_000)])
def test_the_sum_over_all_reports_is_perf_times_the_seconds_held(log: Any, steps: list[tuple[str, int]]) -> None:
    clock, receiver = FakeClock(), Receiver()
    service = Service(MemoryJournal(), clock, Limits(), Readiness())
    me = Identity(1, "", "", PERF)

    async def run() -> float:
        reporter = Reporter(me, service, log, receiver, lambda *_: None, report_held=True)  # type: ignore[arg-type]
        service.observers.append(reporter.observe)
        held = 0.0
        for what, value in [*steps, ("report", 0)]:
            if what == "wait":
                if service.book.held is not None:
                    held += value / 1000
                clock.advance(value / 1000)
            elif what == "claim":
                service.claim(Claim())
            elif what == "release" and service.book.held is not None:
                service.release(service.book.held.id)
            elif what == "hang_up" and service.book.queue:
                service.cancel(next(iter(service.book.queue)), "client_disconnect")
            elif what == "report":
                receiver.down = bool(value)
                await reporter._send_status(1.0)
        return held

    held = asyncio.run(run())
    assert sum(receiver.perfs) == pytest.approx(PERF * held, abs=0.01)


async def test_of_a_session_that_is_held_at_the_start_the_time_counts_from_then_on(log: Any) -> None:
    clock, receiver = FakeClock(), Receiver()
    service = Service(MemoryJournal(), clock, Limits(), Readiness())
    service.claim(Claim("session", 60.0, session=SessionTerms(60.0)))
    clock.advance(5.0)
    me = Identity(1, "", "", PERF)
    reporter = Reporter(me, service, log, receiver, lambda *_: None, report_held=True)  # type: ignore[arg-type]
    clock.advance(3.0)
    await reporter._send_status(1.0)
    assert receiver.perfs == [3.0 * PERF]


async def test_while_it_is_held_there_is_a_report_each_second(vast: FakeAutoscaler, tmp_path: Path) -> None:
    import aiohttp

    async with secured(tmp_path, vast, NULL_REPORT_PERF="held") as worker, aiohttp.ClientSession() as http:
        await worker.line("key_loaded")
        body = signed(vast, worker.url, {"duration": 3.4})
        async with http.post(worker.url + "/reserve", json=body) as answer:
            assert answer.status == 200
        await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 0 and vast.statuses[-1]["num_requests_recieved"])
        loaded = [status for status in vast.statuses if status["cur_load"]]
        assert len(loaded) >= 3
        assert vast.totals().cur_perf == pytest.approx(340, abs=15)
