"""Readiness: the state that follows from the causes, and one owner for each cause."""

from __future__ import annotations

import pytest

from nullworker.readiness import Readiness


def test_a_part_that_has_died_is_told_also_after_the_consumers_next_good_answer() -> None:
    readiness = Readiness()
    readiness.part_has_died("a part of the worker has died: health")
    readiness.consumer_is_unhealthy("it does not answer")
    readiness.consumer_is_healthy()
    assert (readiness.state, readiness.refusal) == ("errored", "errored")
    assert readiness.error_msg == "a part of the worker has died: health"
    assert readiness.checks()["draining"] == (False, "a part of the worker has died: health")
    assert readiness.checks()["consumer"].ok


@pytest.mark.parametrize(
    ("state", "refusal", "loaded"),
    [("draining", "draining", True), ("errored", "log_unavailable", True), ("starting", "not_ready", False)],
)
def test_the_most_severe_cause_decides_the_state(state: str, refusal: str, loaded: bool) -> None:
    readiness = Readiness(key="it is fetched", consumer_starting="it has not answered yet")
    if loaded:
        readiness.key_is_loaded()
        readiness.consumer_is_healthy()
        readiness.log_has_failed("the disk is full")
    if state == "draining":
        readiness.drain("told to")
    assert (readiness.state, readiness.refusal, readiness.loaded) == (state, refusal, loaded)


def test_listeners_hear_each_change_once_and_see_it() -> None:
    readiness, seen = Readiness(), list[str | None]()
    readiness.listeners.append(lambda: seen.append(readiness.consumer))
    readiness.consumer_is_unhealthy("it does not answer")
    readiness.consumer_is_unhealthy("it does not answer")
    readiness.consumer_is_healthy()
    readiness.consumer_is_healthy()
    assert seen == ["it does not answer", None]
