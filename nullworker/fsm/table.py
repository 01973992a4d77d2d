"""The transition table of a reservation, as data: states, events, reasons, HTTP statuses and reported outcomes.

Nothing of this is written anywhere else.

```mermaid
stateDiagram-v2
    [*] --> queued
    queued --> held: held
    queued --> expired: expired
    queued --> cancelled: cancelled
    held --> held: extended
    held --> released: released
    held --> expired: expired
    held --> cancelled: cancelled
    released --> [*]
    expired --> [*]
    cancelled --> [*]
```

A reservation begins with the event `queued`, which is no edge because no state comes before it. One `transitions`
Machine, without models or callbacks, answers for all reservations (`step`): a Machine or a model for each reservation
costs ten times as much.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from transitions import Machine

from nullworker.errors import IllegalMove

State = Literal["queued", "held", "released", "expired", "cancelled"]
EventKind = Literal["queued", "held", "extended", "released", "expired", "cancelled"]
Outcome = Literal["Success", "Rejected", "Cancelled", "Error"]  # `status` in delete_requests

STATES: Final[tuple[State, ...]] = ("queued", "held", "released", "expired", "cancelled")
LIVE: Final[frozenset[State]] = frozenset(("queued", "held"))
ENDED: Final[frozenset[State]] = frozenset(STATES) - LIVE
EVENT_KINDS: Final[tuple[EventKind, ...]] = ("queued", "held", "extended", "released", "expired", "cancelled")


class Edge(NamedTuple):
    """A transition: its event and reason, the answer to the caller, and the outcome for the autoscaler."""

    source: State
    event: EventKind
    reason: str | None
    target: State
    status: int | None = None  # HTTP status of the answer to /reserve
    outcome: Outcome | None = None  # reported to the autoscaler; None: nothing is
    says: str = ""  # the `error` of the answer


EDGES: Final[tuple[Edge, ...]] = (
    Edge("queued", "held", None, "held"),
    Edge("held", "extended", "extend", "held"),  # POST /extend
    Edge("held", "extended", "ping", "held"),  # POST /ping: a session is renewed by its owner
    Edge("held", "extended", "attached", "held"),  # POST /attach: by the worker, for the attached consumer
    Edge("held", "released", "explicit", "released", 200, "Success"),
    Edge("held", "released", "session_end", "released", 200, "Success"),
    Edge("held", "released", "consumer_exit", "released", 200, "Success"),
    Edge("held", "expired", "duration_elapsed", "expired", 200, "Success"),
    Edge("queued", "expired", "queue_timeout", "expired", 429, "Rejected", "the worker stayed busy; try another"),
    Edge("queued", "expired", "queue_full", "expired", 429, "Rejected", "the worker's queue is full; try another"),
    Edge("queued", "expired", "busy", "expired", 429, "Rejected", "the worker is taken; try another"),
    Edge("queued", "expired", "duplicate", "expired", 429, None, "its request_idx is live here; get a new grant"),
    Edge("queued", "cancelled", "client_disconnect", "cancelled", 499, "Cancelled", "the client hung up"),
    Edge("held", "cancelled", "client_disconnect", "cancelled", 499, "Cancelled", "the client hung up"),
    Edge(
        "queued", "cancelled", "not_ready", "cancelled", 503, "Rejected", "the consumer is not ready yet; try another"
    ),
    Edge("queued", "cancelled", "errored", "cancelled", 503, "Rejected", "the consumer is unhealthy; try another"),
    Edge("queued", "cancelled", "draining", "cancelled", 503, "Rejected", "the worker is stopping; try another"),
    Edge(
        "queued",
        "cancelled",
        "log_unavailable",
        "cancelled",
        503,
        "Rejected",
        "the event log cannot be written; try another",
    ),
    Edge("held", "cancelled", "draining", "cancelled", 503, "Cancelled", "the worker stopped before the release"),
    Edge("held", "cancelled", "consumer_unhealthy", "cancelled", 503, "Cancelled", "the consumer became unhealthy"),
    Edge("held", "cancelled", "consumer_lost", "cancelled", 503, "Cancelled", "the consumer died; try another worker"),
    Edge("held", "cancelled", "consumer_absent", "cancelled", 503, "Cancelled", "no consumer came; try another worker"),
    Edge("queued", "cancelled", "worker_restart", "cancelled", 503, "Cancelled", "the worker was restarted"),
    Edge("held", "cancelled", "worker_restart", "cancelled", 503, "Cancelled", "the worker was restarted"),
    Edge("queued", "cancelled", "worker_error", "cancelled", 500, "Error", "a fault of the worker; see its log"),
    Edge("held", "cancelled", "worker_error", "cancelled", 500, "Error", "a fault of the worker; see its log"),
)

_BY_MOVE: Final = {(edge.source, edge.event, edge.reason): edge for edge in EDGES}


class Cursor:
    """The model for `transitions`: an object with a state."""

    __slots__ = ("state",)

    def __init__(self, state: State) -> None:
        self.state: State = state


RULES: Final = Machine(
    model=None,
    states=list(STATES),
    transitions=[
        {"trigger": event, "source": source, "dest": target}
        for source, event, target in dict.fromkeys((edge.source, edge.event, edge.target) for edge in EDGES)
    ],
    initial=None,  # the default would add a state `initial`
    auto_transitions=False,
)


def _take(edge: Edge) -> State:
    cursor = Cursor(edge.source)
    RULES.events[edge.event].trigger(cursor)
    return cursor.state


#: The state after each edge, evaluated by `transitions` once at import: a trigger takes 8 us, a lookup 0.1 us.
_AFTER: Final = {move: _take(edge) for move, edge in _BY_MOVE.items()}


def step(state: State, event: EventKind, reason: str | None) -> State:
    """The state after an event.

    Raises:
        IllegalMove: the table has no such edge.
    """
    after = _AFTER.get((state, event, reason))
    if after is None:
        allowed = ", ".join(sorted({f"{e.event}/{e.reason}" for e in EDGES if e.source == state})) or "nothing"
        raise IllegalMove(f"{event}/{reason} is not allowed in state {state}; allowed: {allowed}")
    return after


def ending(state: State, reason: str | None, *, was_held: bool) -> Edge:
    """The edge by which a reservation has ended, with its status and outcome.

    Raises:
        IllegalMove: the table has no such end.
    """
    source: State = "held" if was_held else "queued"
    edge = _BY_MOVE.get((source, state, reason))
    if edge is None or edge.target not in ENDED:
        raise IllegalMove(f"no reservation ends as {state}/{reason} from {source}")
    return edge
