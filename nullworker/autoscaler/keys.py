"""The autoscaler's public key: fetched with retries until it is there, and again when a signature fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nullworker.aio import Backoff
from nullworker.autoscaler.connection import AutoscalerClient
from nullworker.clock import stopwatch
from nullworker.errors import Unavailable
from nullworker.logs import get_log
from nullworker.readiness import Readiness

if TYPE_CHECKING:
    from nullworker.autoscaler.signature import PublicKey

log = get_log(__name__)

#: Seconds between two fetches of the key that a failed signature asks for.
REFETCH_SECONDS: Final = 60.0


class KeyRing:
    """Holds the autoscaler's key and verifies signatures with it."""

    def __init__(
        self, autoscaler: AutoscalerClient, readiness: Readiness, count_fetch: Callable[[str, str], None]
    ) -> None:
        self._autoscaler = autoscaler
        self._readiness = readiness
        self._count = count_fetch
        self._key: PublicKey | None = None
        self._fetched_at = -REFETCH_SECONDS  # for a failed signature; the fetches at the start are not counted
        self._refetch: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Fetch the key, with retries until it is there."""
        backoff = Backoff()
        while not await self._fetch():
            self._readiness.key_is_missing(f"the autoscaler's key is not loaded: {self._autoscaler.trouble}")
            log.warning("key_not_loaded", why=self._autoscaler.trouble, message="it is tried again until it can be had")
            await asyncio.sleep(backoff.failed())
        self._readiness.key_is_loaded()
        log.info("key_loaded")

    async def has_signed(self, url: str, signature: str) -> bool:
        """Whether the autoscaler has signed a grant for the worker at `url`.

        Raises:
            Unavailable: the key is not loaded.
        """
        if self._key is None:
            raise Unavailable(self._readiness.key or "the autoscaler's key is not loaded", reason="not_ready")
        if self._key.verify(url, signature):
            return True
        return await self._fetch_again() and self._key.verify(url, signature)

    async def _fetch_again(self) -> bool:
        """The key may have been changed. Returns whether it was fetched, which is done once in REFETCH_SECONDS."""
        if self._refetch is None:
            if stopwatch() - self._fetched_at < REFETCH_SECONDS:
                return False
            self._refetch = asyncio.ensure_future(self._fetch_once())
        await asyncio.shield(self._refetch)
        return True

    async def _fetch_once(self) -> None:
        self._fetched_at = stopwatch()
        try:
            await self._fetch()
        finally:
            self._refetch = None

    async def _fetch(self) -> bool:
        key = await self._autoscaler.fetch_key()
        self._count("pubkey", "failed" if key is None else "ok")
        self._key = key or self._key
        return key is not None
