"""A consumer for a Redis stream: one job for each reservation. Add one: XADD jobs * job '{"id": 1, "url": "https://..."}'

A job stays pending for its consumer until it is acknowledged, after the work. A consumer first takes its own pending
jobs; those of a consumer that is gone are taken over by any other after a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
from typing import Any

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from nullworker.consumer.reservations import health_endpoint, reservations, run

JOBS, FAILED, GROUP = "jobs", "jobs:failed", "workers"
NAME = os.environ.get("CONTAINER_ID") or socket.gethostname()
#: Milliseconds for which a new job is waited for, and after which a begun one counts as given up.
WAIT, GIVEN_UP = 5_000, 60_000


async def work(job: dict[str, Any]) -> dict[str, Any]:
    """Your work stands here. This one looks at what is behind job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        body = await answer.read()
    return {"job": job["id"], "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


async def one_job(redis: Any) -> dict[str, Any]:
    """Take a job, do it, acknowledge it. What the caller of /reserve gets."""
    entry = await take(redis)
    if entry is None:
        return {"job": None}
    entry_id, fields = entry
    job = json.loads(fields["job"])
    renewal = asyncio.ensure_future(renew(redis, entry_id))
    try:
        result = await work(job)
    except Exception as error:
        result = {"job": job["id"], "error": str(error)}
        await redis.xadd(FAILED, {**fields, "error": str(error)})
    finally:
        renewal.cancel()
    async with redis.pipeline(transaction=True) as both:
        await both.xack(JOBS, GROUP, entry_id).xdel(JOBS, entry_id).execute()
    return result


async def take(redis: Any) -> Any:
    """My own unfinished job, else one that was given up, else a new one."""
    for _, entries in await redis.xreadgroup(GROUP, NAME, {JOBS: "0"}, count=1):
        if entries:
            return entries[0]
    _, given_up, _ = await redis.xautoclaim(JOBS, GROUP, NAME, GIVEN_UP, count=1)
    if given_up:
        return given_up[0]
    for _, entries in await redis.xreadgroup(GROUP, NAME, {JOBS: ">"}, count=1, block=WAIT):
        if entries:
            return entries[0]
    return None


async def renew(redis: Any, entry_id: str) -> None:
    """Show the others that the job is not given up."""
    while True:
        await asyncio.sleep(GIVEN_UP / 3000)
        await redis.xclaim(JOBS, GROUP, NAME, 0, [entry_id], justid=True)


async def main() -> None:
    redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1"), decode_responses=True, socket_timeout=30)
    with contextlib.suppress(ResponseError):  # the group is there
        await redis.xgroup_create(JOBS, GROUP, id="0", mkstream=True)
    async with redis, health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await one_job(redis)


run(main())
