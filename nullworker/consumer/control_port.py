"""An asyncio client of the control port, for a consumer: the held reservation, and its release.

A call returns the answer or raises `WorkerUnreachable`; the caller decides whether to try again. Commands, which must
start fast, use `nullworker.control_client` instead.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any
from urllib.parse import quote

import aiohttp

from nullworker.control_client import MAX_BODY_BYTES
from nullworker.errors import WorkerUnreachable

log = logging.getLogger(__name__)

#: Seconds between two tries of a worker that does not answer.
RETRY_SECONDS = 0.5
#: Seconds of one long poll for the next reservation; the worker allows 60.
POLL_SECONDS = 30.0
#: Seconds for any other answer; a long poll fits into it.
ANSWER_SECONDS = 35.0


class AsyncControlClient:
    """The control port of one worker. `url`: None is http://127.0.0.1:$NULL_CONTROL_PORT."""

    def __init__(self, url: str | None) -> None:
        self.url = (url or f"http://127.0.0.1:{os.environ.get('NULL_CONTROL_PORT') or 18999}").rstrip("/")
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=5))

    async def next(self) -> dict[str, Any]:
        """Wait until a reservation is held, and return it."""
        silent = False
        while True:
            try:
                reservation = await self.held(wait=0 if silent else POLL_SECONDS)
            except WorkerUnreachable as error:
                if not silent:
                    log.warning("%s; trying again", error)
                silent = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if silent:
                log.warning("the worker on %s answers again", self.url)
            silent = False
            if reservation is not None:
                return reservation

    async def held(self, *, wait: float = 0) -> dict[str, Any] | None:
        """The reservation that is held now, or within `wait` seconds; None: nothing is held."""
        status, content = await self._ask("GET", f"/reservation?wait={wait:g}")
        if status not in (200, 204):
            raise WorkerUnreachable(f"{self.url}/reservation answers {status}: {content}")
        held: dict[str, Any] | None = content
        return held

    async def known(self, reservation_id: str) -> dict[str, Any] | None:
        """A reservation, also one that has ended; None: the worker does not know it."""
        _, answer = await self._ask("GET", f"/reservations?id={quote(reservation_id)}")
        rows = (answer or {}).get("reservations", ())
        return next((row for row in rows if row["id"] == reservation_id), None)

    async def fate(self, reservation_id: str) -> str:
        """How a reservation has ended, in words."""
        row = await self.known(reservation_id)
        return f"{row['state']}, {row['reason']}" if row else "the worker does not hold it any more"

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """POST a body; return the status and the answer. Raises TypeError or ValueError if the body is not JSON."""
        try:
            text = json.dumps(body, allow_nan=False)
        except RecursionError as error:
            raise ValueError(str(error)) from error
        if len(text) > MAX_BODY_BYTES:  # the worker would answer this, and break the connection while it is sent
            return 413, {"error": f"the body has at most {MAX_BODY_BYTES} bytes"}
        return await self._ask("POST", path, text)

    async def _ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        try:
            async with self.http.request(method, self.url + path, data=body) as answer:
                text = await answer.text()
                content = json.loads(text) if text else None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            why = str(error).replace(" ssl:default", "") or type(error).__name__
            raise WorkerUnreachable(f"no worker answers on {self.url} ({why})") from error
        if answer.status >= 500:
            raise WorkerUnreachable(f"{self.url}{path} answers {answer.status}: {content}")
        return answer.status, content
