"""HTTP client for the autoscaler: fetches the public key and POSTs messages to the first REPORT_ADDR that answers.

Bodies, queries, headers and passwords in addresses may be secret and are never logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import aiohttp
import msgspec

from nullworker.autoscaler.messages import KEY_PATH
from nullworker.logs import get_log
from nullworker.outgoing import describe_failure, forget_frames, get, http_session, is_elsewhere
from nullworker.settings import without_secrets

if TYPE_CHECKING:
    from nullworker.autoscaler.signature import PublicKey

log = get_log(__name__)

#: Seconds that one call may take; the same as the SDK's (vastai 1.9.1, server/lib/metrics.py).
CALL_SECONDS: Final = 10.0
#: Seconds after which the next address is tried as well, while one is silent.
SILENT_SECONDS: Final = 1.0
#: Maximum size of a key file, in bytes.
MAX_KEY_BYTES: Final = 64 * 1024
#: 4xx answers that do not depend on the body: the call is tried again.
_NOT_FOR_GOOD: Final = frozenset((401, 403, 404, 405, 407, 408, 421, 423, 425, 429))

Delivery = Literal["ok", "refused", "failed"]
T = TypeVar("T")


class AutoscalerClient:
    """The autoscaler behind a list of addresses; the last one that answered is tried first.

    Attributes:
        addresses: as they may be shown.
        trouble: why the last call failed; None after a successful one.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(map(without_secrets, addresses))
        self.trouble: str | None = "no call has been answered yet"
        self._order = list(addresses)
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def post(self, path: str, body: dict[str, Any], *, seconds: float = CALL_SECONDS) -> Delivery:
        """POST to the addresses until one accepts.

        "refused": every address says that this body is wrong (a 4xx for good).
        """
        data = msgspec.json.encode(body)

        async def post(address: str) -> tuple[Delivery | None, str | None]:
            return await self._post(address, path, data, seconds)

        deliveries, self.trouble = await self._ask(post, path)
        return "ok" if self.trouble is None else _verdict(deliveries)

    async def fetch_key(self) -> PublicKey | None:
        """The key, from the first address that has one; None: no address has, and `trouble` says why."""
        from nullworker.autoscaler.signature import PublicKey  # imports cryptography

        async def fetch(address: str) -> tuple[PublicKey | None, str | None]:
            async with get(self._http(address), address + KEY_PATH, seconds=CALL_SECONDS) as answer:
                if answer.status != 200:
                    return None, f"answered {answer.status}"
                pem = b""
                while more := await answer.content.read(
                    MAX_KEY_BYTES - len(pem)
                ):  # each call returns the part that has arrived
                    pem += more
            try:
                return PublicKey(pem), None
            except ValueError:
                return None, "answered something that is no RSA key in PEM"

        keys, self.trouble = await self._ask(fetch, KEY_PATH)
        return keys[-1] if self.trouble is None else None

    async def close(self) -> None:
        """Close its connections."""
        for session in self._sessions.values():
            await session.close()

    async def _post(self, address: str, path: str, data: bytes, seconds: float) -> tuple[Delivery, str | None]:
        """POST to one address; returns also why it was not delivered."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        headers = {"Content-Type": "application/json"}
        async with self._http(address).post(
            address + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
        ) as answer:
            if 200 <= answer.status < 300:
                return "ok", None
            for_good = 400 <= answer.status < 500 and answer.status not in _NOT_FOR_GOOD
            return "refused" if for_good else "failed", f"answered {answer.status}"

    async def _ask(
        self, ask: Callable[[str], Awaitable[tuple[T | None, str | None]]], path: str
    ) -> tuple[list[T | None], str | None]:
        """The answers of the addresses, up to the first without trouble; and the last trouble, or None.

        While one is silent, the next one is tried too: a silent one costs SILENT_SECONDS, and a slow one still counts.
        """
        answers: list[T | None] = []
        trouble: str | None = None
        calls: dict[asyncio.Future[tuple[T | None, str | None]], str] = {}
        to_ask = list(self._order)
        try:
            while to_ask or calls:
                if to_ask:
                    address = to_ask.pop(0)
                    calls[asyncio.ensure_future(_reach(ask, address))] = address
                patience = SILENT_SECONDS if to_ask else None
                done, _ = await asyncio.wait(calls, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    address, (answer, why) = calls.pop(call), call.result()
                    answers.append(answer)
                    if why is None:
                        self._order.remove(address)
                        self._order.insert(0, address)
                        return answers, None
                    trouble = f"{without_secrets(address)}{path} {why}"
            return answers, trouble
        finally:
            for call in calls:
                call.cancel()
            if calls:
                await asyncio.wait(calls)

    def _http(self, address: str) -> aiohttp.ClientSession:
        """A session that uses the environment's proxy, or, for an address of this machine, none."""
        proxied = is_elsewhere(address)
        if proxied not in self._sessions:
            self._sessions[proxied] = http_session(trust_env=proxied)
        return self._sessions[proxied]


def _verdict(deliveries: Sequence[str | None]) -> Delivery:
    """What is undelivered is refused for good only when every address refuses it; None: one could not be reached."""
    return "refused" if all(delivery == "refused" for delivery in deliveries) else "failed"


async def _reach(
    ask: Callable[[str], Awaitable[tuple[T | None, str | None]]], address: str
) -> tuple[T | None, str | None]:
    try:
        return await ask(address)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        forget_frames(error)
        return None, f"cannot be reached: {describe_failure(error)}"
