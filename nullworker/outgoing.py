"""One HTTP POST to another program, and the reason for a failed call in words that hold no secret."""

from __future__ import annotations

import asyncio
import os
import ssl
import traceback
from typing import Any, Final

import aiohttp
import msgspec

#: Seconds that one POST may take.
CALL_SECONDS: Final = 10.0


class HttpPost:
    """POSTs a callback, in CALL_SECONDS at most. Redirects are not followed."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    async def __call__(self, route: str, body: dict[str, Any]) -> str | None:
        """POST `body` to `route`. Returns None when it was accepted (2xx), else the reason."""
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_SECONDS))
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.post(
                route, data=msgspec.json.encode(body), headers=headers, allow_redirects=False
            ) as answer:
                return None if 200 <= answer.status < 300 else f"it answered {answer.status}"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            traceback.clear_frames(error.__traceback__)  # in a cycle with the error, they would keep the body
            return describe_failure(error)

    async def close(self) -> None:
        """Close its connections."""
        if self._http is not None:
            await self._http.close()


def describe_failure(error: BaseException) -> str:
    """Why a call failed: the type of the error and the operating system's words for its cause.

    The error's own message is not used: aiohttp's quote the url and the answer, asyncio's and OpenSSL's the host.
    """
    cause = error.__cause__ or error
    why: object = None
    if isinstance(cause, ssl.SSLError):
        why = getattr(cause, "verify_message", "").partition(",")[0] or getattr(cause, "reason", None)
    elif isinstance(cause, OSError) and not isinstance(cause, aiohttp.ClientError):
        number = cause.errno or 0  # a resolver's errors have none or a negative one, and a message without a host
        why = os.strerror(number) if number > 0 else cause.strerror
    elif isinstance(error, aiohttp.ClientResponseError):
        why = error.status if cause is error else "no valid HTTP"
    return f"{type(error).__name__}: {why}" if why else type(error).__name__
