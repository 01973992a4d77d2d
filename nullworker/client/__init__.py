"""Reserve workers from Python: at an endpoint of Vast Serverless, or at one worker's own url.

    answer = await hold("my-endpoint", api_key=key, duration=3600, metadata={"job": 17})

`WorkerSession` is one session at one worker without the SDK, for programs that keep many, such as a dispatcher.
"""

from nullworker.client.held_session import hold_session
from nullworker.client.hold import hold, hold_at
from nullworker.client.session import SessionEnded, SessionLost, WorkerSession
from nullworker.client.worker_http import HoldError, NoAnswer, Refused

__all__ = [
    "HoldError",
    "NoAnswer",
    "Refused",
    "SessionEnded",
    "SessionLost",
    "WorkerSession",
    "hold",
    "hold_at",
    "hold_session",
]
