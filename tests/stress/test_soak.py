"""A short soak, and tests that its checks find planted errors."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stress import soak, soak_figures
from stress.crash_load import Ledger
from stress.soak_figures import Life, Sample
from stress.soak_guests import NO_KEY, Guests
from stress.soak_weather import KEY_SECONDS, Weather
from stress.soak_worker import Ear, Watched

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START = 1_700_000_000.0
HOUR = 3600.0


async def test_a_worker_under_everything_at_once_neither_grows_nor_loses_anything() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "stress.soak", "--minutes", "0.25", "--seed", "1", "--json"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, complained = await process.communicate()
    assert process.returncode == 0, complained.decode()
    found = json.loads(out)
    assert found["wrong"] == []
    assert sorted(life["ended_by"] for life in found["lives"]) == ["SIGTERM", "SIGTERM at the end", "kill -9"]
    for done in ("request answered 200", "forged: 401", "reader that stays: 200", "reader that comes and goes: 200"):
        assert found["counts"][done] > 0, done
    for done in ("outage of the autoscaler", "consumer ", "nullworker ", "in the log: request released"):
        assert any(what.startswith(done) for what in found["counts"]), done


def test_an_answer_that_is_lost_needs_a_start_or_an_end_to_explain_it() -> None:
    lives = [Life(1, 0.0, ready=1.0, over=10.0), Life(2, 12.0, ready=14.0, over=30.0)]
    lost = [(0.5, "starting"), (5.0, "up"), (10.0, "told to end"), (13.0, "down"), (29.0, "up again"), (31.0, "over")]
    assert list(soak_figures.unexplained(lost, lives)) == [
        "4.0 s into life 1, 5.0 s before its end: up",
        "15.0 s into life 2, 1.0 s before its end: up again",
    ]


# -- figures ---------------------------------------------------------------------------------------------------------


def life(seconds: float = HOUR, **figures: Callable[[float], float]) -> Life:
    """A life with a hundred samples of a quiet worker; `figures` give others, by the part of its time that is over."""
    quiet = {"rss": 58.0, "uss": 36.0, "fds": 30.0, "threads": 6.0, "wal": 4.1, "log": 9.0, "backlog": 1.0, "queued": 0}
    samples = [
        Sample(
            at=START + part * seconds,
            **{name: figures[name](part) if name in figures else value for name, value in quiet.items()},
        )
        for part in (number / 100 for number in range(100))
    ]
    return Life(1, START, START + seconds, "SIGTERM", samples)


def test_a_life_that_is_flat_after_its_warm_up_and_has_peaks_is_well() -> None:
    def warms_up(part: float) -> float:
        return 40.0 + 20 * min(part, 0.1) * 10

    def has_peaks(part: float) -> float:
        return 90.0 if round(part * 100) % 7 == 0 else 30.0

    assert list(soak_figures.judge([life(rss=warms_up, fds=has_peaks)], idle_fds=20, last_fds=24)) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (life(rss=lambda part: 58 + 5 * part), "rss grows by 5.0 MB an hour"),
        (life(uss=lambda part: 36 + 5 * part), "uss grows by 5.0 MB an hour"),
        (life(fds=lambda part: 30 + 12 * part), "fds grows by 12.0 descriptors an hour"),
        (life(threads=lambda part: 5 + 12 * part), "threads grows by 12.0 threads an hour"),
        (life(60, rss=lambda part: 58 + 10 * part), "rss has grown by 7.9 MB"),
        (life(60, fds=lambda part: 30 + 20 * part), "fds has grown by 15.8 descriptors"),
        (life(wal=lambda part: 4.1 if part < 0.5 or part > 0.6 else 8.5), "the write-ahead log had 8.5 MB"),
        (Life(1, START, START + 60, "SIGTERM", []), "too few to judge it"),
    ],
)
def test_the_soak_sees(found: Life, words: str) -> None:
    (sentence,) = soak_figures.judge([life(), found], idle_fds=20, last_fds=20)
    assert words in sentence


def test_the_soak_sees_descriptors_that_stay_open_after_the_load() -> None:
    (sentence,) = soak_figures.judge([life()], idle_fds=20, last_fds=25)
    assert "25 descriptors are open after the load" in sentence


def test_a_soak_ends_lives_in_both_ways_and_gives_half_of_its_time_to_the_last() -> None:
    for seconds in (20.0, 180.0, HOUR, 10 * HOUR):
        ends = soak.plan(seconds, random.Random(1))
        times = [over for _, over in ends]
        assert {"SIGTERM", "kill -9"} <= {how for how, _ in ends}
        assert times == sorted(times)
        assert ends[-1] == ("the end", seconds)
        assert times[-1] - times[-2] >= 0.4 * seconds


# -- log lines, reports, readers ---------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path, random.Random(1), "http://127.0.0.1:1", "http://127.0.0.1:1/health")


def test_log_lines_that_the_soak_explains_are_counted_and_others_are_alarms(watched: Watched) -> None:
    watched.heard({"level": "info", "event": "bug"})
    watched.heard({"level": "warning", "event": "callback_failed"})
    assert (watched.explained, watched.alarms) == (Counter(callback_failed=1), [])
    watched.heard({"level": "warning", "event": "cursor_not_moved"})
    watched.heard({"level": "error", "event": "bug", "exception": "Traceback"})
    watched.heard({"level": "text", "text": "Traceback (most recent call last):"})
    assert [json.loads(line).get("event") for line in watched.alarms] == ["cursor_not_moved", "bug", None]


async def test_a_report_in_an_outage_and_the_last_of_a_life_are_not_sure(watched: Watched) -> None:
    vast = Ear()
    report = {"cur_perf": 100, "rej_load": 0}
    vast.take_status(report, START)
    vast.fail("worker_status", "late")
    vast.take_status(report, START)
    vast.clear()
    vast.take_status(report, START)
    vast.take_status(report, START)
    vast.life_over()
    assert [status["sure"] for status in vast.statuses] == [True, False, True, False]
    assert len(vast.sure()) == 2


async def test_a_reader_of_events_that_misses_one_says_so(watched: Watched) -> None:
    guests: Any = Guests(watched, Ear(), Ledger(), random.Random(1), 1.0, Counter(), lambda: False)
    for seq in (1, 2, 4):
        guests._next(seq)
    assert guests.problems == ["/events: after event 2 came 4"]


async def test_a_forgery_may_be_in_doubt_while_the_key_cannot_be_fetched_and_a_little_after(watched: Watched) -> None:
    vast = Ear()
    weather: Any = Weather(vast, random.Random(1), 1.0, Counter())
    guests: Any = Guests(watched, vast, Ledger(), random.Random(1), 1.0, Counter(), lambda: weather.key_in_doubt)
    assert not weather.key_in_doubt
    vast.fail("pubkey", "down")
    weather._key_was_down = math.inf
    assert weather.key_in_doubt
    weather.clear()
    assert weather.key_in_doubt
    weather._key_was_down -= KEY_SECONDS
    assert not weather.key_in_doubt
    guests._judge("forged", NO_KEY, (401, NO_KEY))
    assert not guests.lost
    guests._judge("forged", NO_KEY, (401,))
    assert len(guests.lost) == 1
