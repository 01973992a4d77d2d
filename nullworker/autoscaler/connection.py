"""HTTP client for the autoscaler: fetches the public key and POSTs messages to the first REPORT_ADDR that answers.

Bodies, queries and headers may hold secrets and are never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
import msgspec

from nullworker.autoscaler.messages import KEY_PATH
from nullworker.logs import get_log
from nullworker.outgoing import describe_failure

if TYPE_CHECKING:
    from nullworker.autoscaler.signature import PublicKey

log = get_log(__name__)

#: Seconds that one call may take; the same as the SDK's (vastai 1.9.1, server/lib/metrics.py).
CALL_SECONDS = 10.0
#: The most bytes that are read of a key file.
MAX_KEY_BYTES = 64 * 1024
#: 4xx answers that are no verdict on the body, so that the call is tried again.
_NOT_FOR_GOOD = frozenset((401, 403, 404, 405, 407, 408, 421, 423, 425, 429))

Delivery = Literal["ok", "refused", "failed"]


class AutoscalerClient:
    """The autoscaler, behind a list of addresses.

    Attributes:
        trouble: why the last call failed; None after a successful one.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self.trouble: str | None = "no call has been answered yet"
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = CALL_SECONDS) -> Delivery:
        """POST to each address in turn until one accepts.

        "refused": an address says that this body is wrong (a 4xx for good), and none took it.
        """
        refused = False
        data = msgspec.json.encode(body)
        for address in self.addresses:
            try:
                async with self._http().post(
                    address + path,
                    data=data,
                    headers={"Content-Type": "application/json"},
                    timeout=aiohttp.ClientTimeout(total=seconds),
                    allow_redirects=False,
                ) as answer:
                    if 200 <= answer.status < 300:
                        self.trouble = None
                        return "ok"
                    self.trouble = f"{address}{path} answered {answer.status}"
                    refused |= 400 <= answer.status < 500 and answer.status not in _NOT_FOR_GOOD
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                self.trouble = f"{address}{path} cannot be reached: {describe_failure(error)}"
        return "refused" if refused else "failed"

    async def fetch_key(self) -> PublicKey | None:
        """The key, from the first address that has one; None: no address has, and `trouble` says why."""
        from nullworker.autoscaler.signature import PublicKey  # imports cryptography

        for address in self.addresses:
            try:
                async with self._http().get(
                    address + KEY_PATH, timeout=aiohttp.ClientTimeout(total=CALL_SECONDS)
                ) as answer:
                    if answer.status != 200:
                        self.trouble = f"{address}{KEY_PATH} answered {answer.status}"
                        continue
                    pem = b""
                    while more := await answer.content.read(MAX_KEY_BYTES - len(pem)):  # each call gives what is there
                        pem += more
                    return PublicKey(pem)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                self.trouble = f"{address}{KEY_PATH} cannot be reached: {describe_failure(error)}"
            except ValueError:
                self.trouble = f"{address}{KEY_PATH} answered something that is no RSA key in PEM"
        return None

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=True)
        return self._session
