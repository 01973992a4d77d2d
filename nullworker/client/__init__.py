"""Holding a worker from your own code: at an endpoint of Vast Serverless, or straight at one worker.

answer = await hold("my-endpoint", api_key=key, duration=3600, metadata={"job": 17})
"""

from nullworker.client.hold import hold, hold_at, hold_session
from nullworker.client.vastai_sdk import HoldError

__all__ = ["HoldError", "hold", "hold_at", "hold_session"]
