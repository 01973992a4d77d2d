"""One HTTP POST to another program, and the reason for a failed call in words that hold no secret."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import traceback
from typing import Any, Final

import aiohttp
import msgspec

#: Seconds that one POST may take.
CALL_SECONDS: Final = 10.0

#: What errors mean whose cause says no more.
_WORDS: Final[dict[type[BaseException], str]] = {
    asyncio.TimeoutError: "it did not answer in time",
    aiohttp.ServerFingerprintMismatch: "it has another certificate",
    aiohttp.ServerDisconnectedError: "it closed the connection without an answer",
    aiohttp.ClientPayloadError: "its answer broke off",
    aiohttp.NonHttpUrlClientError: "its url is not http or https",
    aiohttp.InvalidURL: "its url is not valid",
    UnicodeError: "its url is not valid",
}
#: OpenSSL's reasons when the other side answers in plain text.
_PLAIN_TEXT: Final = frozenset(
    ("WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
)


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
    """Why a call did not arrive, in words that go on from "it cannot be reached: ".

    Never in the error's own words: aiohttp's quote the url and what came back, asyncio's and OpenSSL's the host.
    """
    cause = error.__cause__ or error
    for each in (error, cause):
        for kind, words in _WORDS.items():
            if isinstance(each, kind):
                return words
    if isinstance(cause, ssl.SSLError):
        return _describe_tls(cause)
    if isinstance(cause, OSError) and not isinstance(cause, aiohttp.ClientError):
        number = cause.errno or 0  # a resolver's errors have none, or a negative one, and words without a host
        why = (os.strerror(number) if number > 0 else cause.strerror or "the connection failed").lower()
        return f"its name is not known: {why}" if isinstance(cause, socket.gaierror) else why
    if isinstance(error, aiohttp.ClientResponseError):
        return f"it answered {error.status}" if cause is error else "it does not speak HTTP"
    return f"the call failed ({type(error).__name__})"


def _describe_tls(error: ssl.SSLError) -> str:
    reason: str | None = getattr(error, "reason", None)
    if message := getattr(error, "verify_message", "").partition(",")[0]:
        return f"its certificate is not trusted: {message.lower()}"
    if reason in _PLAIN_TEXT:
        return "it does not speak TLS"
    return f"TLS failed: {reason.replace('_', ' ').lower()}" if reason else "TLS failed"
