"""The transition table: every state with every event, and the table against its diagram."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from nullworker.errors import IllegalMove
from nullworker.fsm import table
from nullworker.fsm.table import EDGES, EVENT_KINDS, LIVE, RULES, STATES, ending, step

REASONS = sorted({edge.reason for edge in EDGES}, key=str)


@pytest.mark.parametrize(("state", "event", "reason"), list(itertools.product(STATES, EVENT_KINDS, REASONS)))
def test_each_state_and_event_moves_as_the_table_says_or_is_refused(state: str, event: str, reason: str | None) -> None:
    edges = [e for e in EDGES if (e.source, e.event, e.reason) == (state, event, reason)]
    assert len(edges) <= 1, "one way at most for the same reason"
    if edges:
        assert step(edges[0].source, edges[0].event, reason) == edges[0].target
    else:
        with pytest.raises(IllegalMove, match=f"is not allowed in state {state}"):
            step(state, event, reason)  # type: ignore[arg-type]


def test_the_contract_has_these_ends_and_no_others() -> None:
    """Contract: end state, reason, whether it was held, the caller's status, the autoscaler's word."""
    ends = {(e.target, e.reason, e.source == "held", e.status, e.outcome) for e in EDGES if e.target not in LIVE}
    assert ends == {
        ("released", "explicit", True, 200, "Success"),
        ("released", "session_end", True, 200, "Success"),
        ("released", "consumer_exit", True, 200, "Success"),
        ("expired", "duration_elapsed", True, 200, "Success"),
        ("expired", "queue_timeout", False, 429, "Rejected"),
        ("expired", "queue_full", False, 429, "Rejected"),
        ("expired", "busy", False, 429, "Rejected"),
        ("expired", "duplicate", False, 429, None),
        ("cancelled", "client_disconnect", False, 499, "Cancelled"),
        ("cancelled", "client_disconnect", True, 499, "Cancelled"),
        ("cancelled", "not_ready", False, 503, "Rejected"),
        ("cancelled", "errored", False, 503, "Rejected"),
        ("cancelled", "draining", False, 503, "Rejected"),
        ("cancelled", "log_unavailable", False, 503, "Rejected"),
        ("cancelled", "draining", True, 503, "Cancelled"),
        ("cancelled", "consumer_unhealthy", True, 503, "Cancelled"),
        ("cancelled", "consumer_lost", True, 503, "Cancelled"),
        ("cancelled", "consumer_absent", True, 503, "Cancelled"),
        ("cancelled", "worker_restart", False, 503, "Cancelled"),
        ("cancelled", "worker_restart", True, 503, "Cancelled"),
        ("cancelled", "worker_error", False, 500, "Error"),
        ("cancelled", "worker_error", True, 500, "Error"),
    }
    for target, reason, was_held, status, outcome in ends:
        edge = ending(target, reason, was_held=was_held)
        assert (edge.status, edge.outcome) == (status, outcome)


def test_no_edge_leads_out_of_an_end_state() -> None:
    for edge in EDGES:
        assert edge.source in LIVE


def test_the_machine_has_exactly_the_edges_of_the_table() -> None:
    machine = {
        (t.source, name, t.dest)
        for name, event in RULES.events.items()
        for t in itertools.chain(*event.transitions.values())
    }
    assert machine == {(e.source, e.event, e.target) for e in EDGES}
    assert set(RULES.states) == set(STATES), "no phantom initial state"


@pytest.mark.parametrize("where", ["nullworker/fsm/table.py", "README.md", "docs/design.md"])
def test_each_state_diagram_matches_the_table(where: str) -> None:
    text = (Path(table.__file__).parents[2] / where).read_text()
    picture = re.search(r"stateDiagram-v2\n(.*?)```", text, re.DOTALL)
    assert picture is not None, "there is a picture"
    drawn = set(re.findall(r"^\s*(\w+) --> (\w+): (\w+)$", picture[1], re.MULTILINE))
    assert drawn == {(e.source, e.target, e.event) for e in EDGES}


def test_a_refusal_says_what_is_allowed_instead() -> None:
    with pytest.raises(IllegalMove, match="allowed: nothing"):
        step("released", "held", None)
    with pytest.raises(IllegalMove, match="held/None"):
        step("queued", "released", "explicit")


def test_an_end_that_no_reservation_has_is_refused() -> None:
    with pytest.raises(IllegalMove, match="no reservation ends as released/explicit from queued"):
        ending("released", "explicit", was_held=False)
    with pytest.raises(IllegalMove):
        ending("held", None, was_held=False)
