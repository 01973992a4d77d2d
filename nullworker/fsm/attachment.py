"""The liveness connection of a consumer to the held reservation (`POST /attach`), as a state machine.

```mermaid
stateDiagram-v2
    [*] --> awaited
    [*] --> restarted
    awaited --> attached: attach
    restarted --> attached: attach
    attached --> broken: break
    broken --> attached: attach
```

`awaited` ends with `consumer_absent` after NULL_ATTACH_TIMEOUT, `broken` with `consumer_lost` after the grace. In
`restarted` is a session to which a consumer was attached in an earlier process of this worker: it ends with
`consumer_lost` too, but has longer, counted from the moment at which the control port answers again.

Of all this the log has what a restart needs: the first attachment of a session is the event `extended` with the reason
`attached`, and the end of a reservation tells when its consumer first attached.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from nullworker.errors import IllegalMove

AttachmentState = Literal["awaited", "restarted", "attached", "broken"]
Move = Literal["attach", "break"]
#: Which holds the worker extends while the consumer is attached: none, sessions, or requests too.
Extends = Literal["", "1", "all"]

MOVES: Final[dict[tuple[AttachmentState, Move], AttachmentState]] = {
    ("awaited", "attach"): "attached",
    ("restarted", "attach"): "attached",
    ("attached", "break"): "broken",
    ("broken", "attach"): "attached",
}


class Attachment(msgspec.Struct):
    """The consumer's connection to one held reservation. Times are epoch seconds."""

    state: AttachmentState = "awaited"
    extends: Extends = ""  # as the consumer that is attached wants it
    first_at: float | None = None  # when a consumer first attached
    lost_at: float | None = None  # when the consumer counts as lost; None: no time runs

    def check(self, move: Move) -> AttachmentState:
        """The state after a move.

        Raises:
            IllegalMove: it is not possible now.
        """
        after = MOVES.get((self.state, move))
        if after is None:
            raise IllegalMove(f"{move} is not possible while the consumer's connection is {self.state}")
        return after
