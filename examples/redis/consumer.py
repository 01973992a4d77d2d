"""Jobs from a Redis stream, all of them in one reservation. A job: XADD jobs * job '{"id": 1, "url": "https://..."}'

An entry that was begun stays with its consumer until it is acknowledged, after the work. What this consumer has begun
and not done is what it takes first; what another has not renewed for LEASE_SECONDS, any consumer takes over.
"""

from __future__ import annotations

import hashlib
import os
import socket
from typing import Any

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from nullworker.consumer import Job, Lost, drain, health_endpoint, reservations, run

JOBS, FAILED, GROUP = "jobs", "jobs:failed", "workers"
NAME = f"{os.environ.get('CONTAINER_ID') or socket.gethostname()}:{os.environ.get('NULL_CONTROL_PORT', 18999)}"
LEASE = float(os.environ.get("LEASE_SECONDS", "60"))
#: Seconds for which a new job is waited for.
WAIT = float(os.environ.get("WAIT_SECONDS", "5"))
#: Renew an entry (no third argument) or settle it, unless another consumer has claimed it: then 0.
IF_MINE = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if pending[1] and pending[1][2] ~= ARGV[2] then return 0 end
if not ARGV[4] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
    return 1
end
if pending[1] and ARGV[4] ~= '' then redis.call('XADD', KEYS[2], '*', 'job', ARGV[5], 'error', ARGV[4]) end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
"""


async def work(job: dict[str, Any]) -> None:
    """Your work stands here; code that blocks belongs into reservation.run_process. This looks at job["url"]."""
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(job["url"]) as answer:
        print(job["id"], hashlib.sha256(await answer.read()).hexdigest(), flush=True)


class Entry(Job):
    """One entry of the stream."""

    lease = LEASE

    def __init__(self, redis: Any, entry_id: str, fields: dict[str, str]) -> None:
        self.redis, self.entry_id, self.body = redis, entry_id, fields.get("job", "")

    async def renew(self) -> None:
        await self._if_mine()

    async def done(self) -> None:
        await self._if_mine("", "")

    async def failed(self, why: str) -> None:
        await self._if_mine(why, str(self.body))

    async def give_back(self) -> None:
        idle = int(LEASE * 1000)  # as if it had not been renewed for so long
        await self.redis.xclaim(JOBS, GROUP, NAME, 0, [self.entry_id], idle=idle, justid=True)

    async def _if_mine(self, *more: str) -> None:
        if not await self.redis.eval(IF_MINE, 2, JOBS, FAILED, GROUP, NAME, self.entry_id, *more):
            raise Lost("another consumer has claimed it")


async def take(redis: Any) -> Entry | None:
    """My own unfinished job, else one that was given up, else a new one."""
    try:
        while mine := (await redis.xreadgroup(GROUP, NAME, {JOBS: "0"}, count=1))[0][1]:
            entry_id, fields = mine[0]
            if fields:
                return Entry(redis, entry_id, fields)
            await redis.xack(JOBS, GROUP, entry_id)  # it was trimmed since
        given_up = (await redis.xautoclaim(JOBS, GROUP, NAME, int(LEASE * 1000), count=1))[1]
        new = given_up or await redis.xreadgroup(GROUP, NAME, {JOBS: ">"}, count=1, block=int(WAIT * 1000))
    except ResponseError as error:
        if "NOGROUP" not in str(error):
            raise
        await redis.xgroup_create(JOBS, GROUP, id="0", mkstream=True)
        return await take(redis)
    if not new:
        return None
    entry_id, fields = given_up[0] if given_up else new[0][1][0]
    return Entry(redis, entry_id, fields)


async def main() -> None:
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1")
    redis = Redis.from_url(url, decode_responses=True, socket_timeout=WAIT + 5, socket_connect_timeout=5)
    async with redis, health_endpoint(int(os.environ.get("HEALTH_PORT", "18998"))):
        async for reservation in reservations():
            async with reservation:
                reservation.result = await drain(reservation, lambda: take(redis), work)


if __name__ == "__main__":
    run(main())
