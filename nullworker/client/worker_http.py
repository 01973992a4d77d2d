"""HTTP from a client to a worker's external port: a POST, a stream, and why either failed.

The endpoint's API key is never sent to a worker. (The SDK puts it into the query of each request, where the next tenant
of the machine could find it in an access log.)
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nullworker.aio import wait_for
from nullworker.errors import NullworkerError

if TYPE_CHECKING:
    import aiohttp

Answer = dict[str, Any]

#: Header of answers about a reservation: the worker's CONTAINER_ID.
INSTANCE_HEADER: Final = "Nullworker-Instance"
#: Seconds for a POST that is answered at once.
CALL_SECONDS: Final = 10.0
#: Seconds without a byte after which a stream is given up. A worker sends a comment each 15 s.
SILENCE_SECONDS: Final = 45.0
#: Bytes of a line: a result of 64 KiB may be several times as long when escaped.
LINE_BYTES: Final = 2**20
#: The root of the certificates of Vast's instances (vastai 1.9.1, client/client.py, SSL_CERT_URL).
VAST_ROOT: Final = "https://console.vast.ai/static/jvastai_root.cer"

ADVICE: Final = {
    401: "the worker accepts grants of another autoscaler: check its REPORT_ADDR",
    404: "this is not the external port of a nullworker: check --url, or the endpoint's template",
    422: "correct the named fields",
    429: "every worker is taken: try later, or raise the endpoint's max_workers",
    503: "the worker is stopping or cannot work: try again, or look at its /readyz",
}


class Reply(NamedTuple):
    """The answer to a POST."""

    status: int
    answer: Answer
    headers: Mapping[str, str]


class HoldError(NullworkerError):
    """No worker could be held, or the hold broke off. `answer` is the worker's body, if there was one."""

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        # aiohttp adds a TLS setting to each address
        super().__init__(" ".join(re.sub(r" ssl:(default|True|False|<[^>]*>)", "", message).split()))
        self.answer = answer


class Refused(HoldError):
    """The worker answered with an error status."""

    def __init__(self, url: str, status: int, text: str) -> None:
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        answer = body if isinstance(body, dict) else None
        reason = answer["error"] if answer and "error" in answer else text[:200]
        other = "see the worker's log" if status >= 500 else "check the command and the worker's version"
        super().__init__(f"{url} answered {status} {reason}; {ADVICE.get(status, other)}", answer)
        self.http_status = status

    @property
    def again(self) -> bool:
        """Whether to try again, at this worker or another one."""
        return self.http_status in (408, 429) or self.http_status >= 500


class NoAnswer(HoldError):
    """No answer came. `sent`: the request may have reached the worker."""

    def __init__(self, url: str, error: BaseException) -> None:
        import aiohttp

        from nullworker.outgoing import describe_failure  # imports aiohttp, which `nullworker --help` must not load

        self.sent = not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
        trouble = "does not answer" if self.sent else "cannot be reached"
        super().__init__(f"{url} {trouble}: {describe_failure(error)}")


async def post(http: aiohttp.ClientSession, url: str, path: str, body: Any, *, seconds: float = CALL_SECONDS) -> Reply:
    """POST JSON to the worker at `url`. Return the answer, a JSON object with status 200, 201, 400 or 410.

    Raises:
        Refused: the answer has another status, or is not a JSON object.
        NoAnswer: none came within `seconds`.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with http.post(url + path, json=body, timeout=timeout, allow_redirects=False) as response:
            status, headers, text = response.status, response.headers, await response.text()
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise NoAnswer(url, error) from error
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if status not in (200, 201, 400, 410) or not isinstance(answer, dict):
        raise Refused(url, status, text)
    return Reply(status, answer, headers)


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    path: str,
    body: Any,
    *,
    head_seconds: float = CALL_SECONDS,
    on_head: Callable[[Mapping[str, str]], None] = lambda headers: None,
) -> AsyncGenerator[Answer, None]:
    """POST JSON to the worker at `url`, and yield each `data:` of its stream, or its JSON body.

    The headers, which the worker sends once the reservation is held, must come within `head_seconds`; `on_head` gets
    them. Iterate within `contextlib.aclosing`, so that leaving the loop closes the connection.

    Raises:
        Refused: the status is not 200.
        NoAnswer: no answer or nothing for SILENCE_SECONDS, or the stream broke off in the middle of a line.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_SECONDS)
    posting = asyncio.ensure_future(
        http.post(url + path, json=body, timeout=timeout, allow_redirects=False, read_bufsize=LINE_BYTES)
    )
    try:
        response = await wait_for(posting, head_seconds)
        if response.status != 200:
            raise Refused(url, response.status, await response.text())
        if response.content_type != "text/event-stream":
            yield json.loads(await response.text())
            return
        on_head(response.headers)
        while line := await wait_for(response.content.readline(), SILENCE_SECONDS):
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise NoAnswer(url, error) from error
    finally:
        if posting.done() and not posting.cancelled() and posting.exception() is None:
            posting.result().close()  # also if the headers came together with a cancellation


async def open_http(url: str) -> aiohttp.ClientSession:
    """An HTTP client for the worker at `url`, to be closed. For https, it trusts Vast's own root certificate.

    Raises:
        HoldError: the certificate cannot be fetched.
    """
    import aiohttp

    from nullworker.outgoing import describe_failure

    if not url.startswith("https:"):
        return aiohttp.ClientSession()
    try:
        async with aiohttp.ClientSession() as web, web.get(VAST_ROOT) as response:
            response.raise_for_status()
            root = await response.read()
        context = ssl.create_default_context()
        context.load_verify_locations(cadata=root.decode() if root.startswith(b"-----") else root)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise HoldError(
            f"Vast's root certificate cannot be fetched from {VAST_ROOT}: {describe_failure(error)}"
        ) from error
    # Vast's root lacks keyCertSign, which Python's strict check requires (vastai 1.9.1, client/client.py)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))
