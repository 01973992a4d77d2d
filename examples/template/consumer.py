"""Processes one job from a Redis list, for `nullworker work`, which runs it for each reservation. Exit code 0: done.

A job is moved to a list of its own while it is processed, so that the job of a machine that has died is not lost.
"""

from __future__ import annotations

import os
import sys
import time

from redis import Redis

JOBS, BUSY, DONE = "jobs", f"jobs:busy:{os.environ.get('CONTAINER_ID', 'here')}", "jobs:done"


def work(job: str) -> str:
    """Your work stands here. This one sleeps for as many seconds as the job says."""
    time.sleep(float(job))
    return f"slept for {job} s"


def main() -> int:
    redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1"), decode_responses=True, socket_timeout=30)
    job = redis.lindex(BUSY, -1) or redis.lmove(JOBS, BUSY, "RIGHT", "LEFT")
    if job is None:
        print("the queue is empty")
        return 0
    result = work(str(job))
    with redis.pipeline(transaction=True) as both:
        both.lpush(DONE, result).lrem(BUSY, 1, str(job)).execute()
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
