"""The autoscaler's public key: fetched with retries at the start, and again when a signature fails."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nullworker import aio
from nullworker.aio import Backoff
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.clock import stopwatch
from nullworker.errors import Unavailable
from nullworker.logs import get_log
from nullworker.readiness import Readiness

if TYPE_CHECKING:
    from nullworker.autoscaler.signature import PublicKey

log = get_log(__name__)

#: Seconds from a fetch of the key to the next one that a failed signature may cause.
REFETCH_SECONDS: Final = 10.0
#: Seconds that the caller with the failed signature waits for that fetch.
REFETCH_WAIT_SECONDS: Final = 1.0


class KeyRing:
    """Holds the autoscaler's key and verifies signatures with it."""

    def __init__(
        self, autoscaler: AutoscalerClient, readiness: Readiness, count_fetch: Callable[[str, str], None]
    ) -> None:
        self._autoscaler = autoscaler
        self._readiness = readiness
        self._count = count_fetch
        self._key: PublicKey | None = None
        self._asked_at = self._fetched_at = -math.inf
        self._fetching: asyncio.Task[bool] | None = None  # because of a failed signature

    async def load(self) -> None:
        """Fetch the key, with retries until it is loaded."""
        backoff = Backoff()
        while not await self._fetch():
            self._readiness.key_is_missing(f"the autoscaler's key is not loaded: {self._autoscaler.trouble}")
            await asyncio.sleep(backoff.failed())
        self._readiness.key_is_loaded()
        log.info("key_loaded")

    async def has_signed(self, url: str, signature: str) -> bool:
        """Whether the autoscaler has signed a grant for the worker at `url`.

        Raises:
            Unavailable: the key is not loaded, or may have changed and cannot be fetched now.
        """
        key = self._key
        if key is None:
            raise Unavailable(self._readiness.key or "the autoscaler's key is not loaded", reason="not_ready")
        if key.verify(url, signature):
            return True
        await self._refresh()
        return self._key is not key and self._key is not None and self._key.verify(url, signature)

    async def _refresh(self) -> None:
        """Fetch the key again, unless it is younger than REFETCH_SECONDS.

        Only the caller that starts the fetch waits for it; for others it is unavailable at once.

        Raises:
            Unavailable: a fetch is under way, or has failed.
        """
        if self._fetching is not None and not self._fetching.done():
            raise Unavailable("the autoscaler's key is being fetched again", reason="not_ready")
        now = stopwatch()
        if now - self._fetched_at < REFETCH_SECONDS:
            return
        if now - self._asked_at >= REFETCH_SECONDS:
            self._fetching = asyncio.ensure_future(self._fetch())
            with contextlib.suppress(asyncio.TimeoutError):
                if await aio.wait_for(asyncio.shield(self._fetching), REFETCH_WAIT_SECONDS):
                    return
        raise Unavailable("the autoscaler's key may have changed, and cannot be fetched now", reason="not_ready")

    async def _fetch(self) -> bool:
        self._asked_at = asked_at = stopwatch()
        key = await self._autoscaler.fetch_key()
        self._count("pubkey", "failed" if key is None else "ok")
        if key is None:
            log.warning("key_not_loaded", why=self._autoscaler.trouble, message="trying again until it is loaded")
            return False
        self._key, self._fetched_at = key, asked_at
        return True
