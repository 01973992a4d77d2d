"""Calls to other programs over HTTP: the connections, who may be called, and why a call failed, without secrets.

A url is shown as `nullworker.settings.without_secrets` has it, and an error by its kind and the system's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL  # aiohttp's own, so that both parse a url in the same way

from nullworker.aio import in_daemon_thread
from nullworker.clock import stopwatch

#: Seconds that one POST may take.
CALL_SECONDS: Final = 10.0
#: Redirects that one GET follows.
MAX_REDIRECTS: Final = 5
#: The User-Agent of every callback. The control port refuses requests with it, under whatever name they reach it.
CALLBACK_AGENT: Final = "nullworker-callback"


class Resolver(AbstractResolver):
    """The system's getaddrinfo, which an exit of the process does not wait for."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a host.

        Raises:
            OSError: it has none, or its name cannot be resolved.
        """
        query = (host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=found_family, proto=proto, flags=numeric
            )
            for found_family, _, proto, _, address in await in_daemon_thread(socket.getaddrinfo, *query)
        ]

    async def close(self) -> None:
        """There is nothing to close."""


def http_session(*, own_ports: OwnPorts | None = None, **options: Any) -> aiohttp.ClientSession:
    """A session for calls of the worker, that never connects to `own_ports`; options as aiohttp's session has them."""
    factory = None if own_ports is None else own_ports.open_socket
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Resolver(), socket_factory=factory), **options)


def is_this_machine(host: str) -> bool:
    """Whether an IP address is one of this machine. A name is not looked up: only `localhost` is known."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback or address.is_unspecified:  # a connection to 0.0.0.0 or :: arrives at the loopback
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent; the kernel knows its addresses
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def is_elsewhere(url: str) -> bool:
    """Whether a url leads to another machine. Only then may the environment's proxy be used for it."""
    return not is_this_machine(URL(url).raw_host or "")


class OwnPorts:
    """The ports on which a worker listens, and the address by which the world knows it: where no callback may go."""

    def __init__(self, ports: Iterable[int], public: tuple[str, int]) -> None:
        self._ports = frozenset(ports)
        self._public = public

    def are_at(self, host: str, port: int) -> bool:
        """Whether a connection to this address would be one to the worker itself."""
        return (host, port) == self._public or (port in self._ports and is_this_machine(host))

    def are_behind(self, route: str) -> bool:
        """Whether a call of this url would be one to the worker itself, as far as its text tells.

        Raises:
            ValueError: it is not a url.
        """
        url = URL(route)
        return self.are_at(url.raw_host or "", url.port or 0)

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for one address of getaddrinfo: aiohttp's `socket_factory`.

        Raises:
            OSError: it would lead to the worker itself.
        """
        family, kind, protocol, _, address = info
        if self.are_at(address[0], address[1]):
            raise OSError(0, "it leads to a port of this worker")
        return socket.socket(family, kind, protocol)


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
    """POSTs a callback, in CALL_SECONDS at most, and never to `own_ports`. Redirects are not followed."""

    def __init__(self, own_ports: OwnPorts | None = None) -> None:
        self._own_ports = own_ports
        self._http: aiohttp.ClientSession | None = None

    async def __call__(self, route: str, body: dict[str, Any]) -> str | None:
        """POST `body` to `route`. Returns None when it was accepted (2xx), else the reason."""
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
            self._http = http_session(own_ports=self._own_ports, timeout=timeout)
        headers = {"Content-Type": "application/json", "User-Agent": CALLBACK_AGENT}
        try:
            async with self._http.post(
                route, data=msgspec.json.encode(body), headers=headers, allow_redirects=False
            ) as answer:
                return None if 200 <= answer.status < 300 else f"it answered {answer.status}"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            forget_frames(error)
            return describe_failure(error)

    async def close(self) -> None:
        """Close its connections."""
        if self._http is not None:
            await self._http.close()


@contextlib.asynccontextmanager
async def get(http: aiohttp.ClientSession, url: str, *, seconds: float) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a GET, within `seconds`; redirects are followed while they stay with this host and port.

    An https is never left for http, and an http may become https on its usual port. A redirect to elsewhere, or one too
    many, is the answer, with its 3xx.
    """
    ends_at, target = stopwatch() + seconds, URL(url)
    for left in range(MAX_REDIRECTS, -1, -1):
        timeout = aiohttp.ClientTimeout(total=max(ends_at - stopwatch(), 0.001))
        async with http.get(target, timeout=timeout, allow_redirects=False) as answer:
            following = _redirect(target, answer) if left else None
            if following is None:
                yield answer
                return
            target = following


def _redirect(called: URL, answer: aiohttp.ClientResponse) -> URL | None:
    location = answer.headers.get("Location")
    if answer.status not in (301, 302, 303, 307, 308) or location is None:
        return None
    try:
        target = called.join(URL(location)).with_user(called.user).with_password(called.password)
    except ValueError:
        return None
    upgraded = called.scheme == "http" and called.port == 80 and target.scheme == "https" and target.port == 443
    same = (target.scheme, target.port) == (called.scheme, called.port) or upgraded
    return target if same and target.raw_host == called.raw_host else None


def forget_frames(error: BaseException) -> None:
    """Free what the frames of a failed call hold.

    aiohttp's are in a reference cycle with the error and what has caused it, and would keep a body until Python looks
    for cycles.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # the end of the chain ends the loop


def describe_failure(error: BaseException) -> str:
    """Why a call failed, as the end of a sentence that begins with "it cannot be reached: ".

    Never in the error's own words: aiohttp's quote the url and what came back, asyncio's and OpenSSL's the host.
    """
    cause = error.__cause__ or error
    for exception in (error, cause):
        for kind, words in _WORDS.items():
            if isinstance(exception, kind):
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
