"""Polls the consumer's health endpoint (BACKEND_HEALTH_URL) and tells the service the result.

The worker becomes ready at the first success. After that, NULL_HEALTH_FAILURES failures in a row mark it errored, and
one success clears that. They count from the first poll on when the consumer should be well already: it was so before a
restart of the worker, or a session is held for it. A start that takes longer than it should is logged, and in the end
reported to the autoscaler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from nullworker.clock import stopwatch
from nullworker.logs import get_log
from nullworker.outgoing import describe_failure, get, http_session
from nullworker.service import Service
from nullworker.settings import without_secrets

log = get_log(__name__)


#: The longest interval in seconds between two polls until the first success.
FIRST_LOOKS_SECONDS = 1.0
#: Seconds without a success after which a start is worth a log line; and after which the autoscaler hears of it, whose
#: machine is paid for all the while. A consumer may load a large model first.
SLOW_START_SECONDS = 60.0
LATE_START_SECONDS = 900.0


class HealthPoll:
    """Polls one URL.

    Attributes:
        last: the result of the last poll, in words.
        url: the URL as it may be shown.

    `was_healthy`: whether the consumer was healthy before this process; `on_healthy` is called at the first success.
    """

    def __init__(
        self,
        url: str,
        service: Service,
        *,
        interval: float,
        timeout: float,
        failures: int,
        cancel_held: bool,
        was_healthy: bool = False,
        on_healthy: Callable[[], None] = lambda: None,
    ) -> None:
        self.last = "not asked yet"
        self.url = without_secrets(url)
        self._url = url
        self._service = service
        self._interval = interval
        self._timeout = timeout
        self._failures = failures
        self._cancel_held = cancel_held
        held = service.book.held
        self._should_be_well = was_healthy or (held is not None and held.terms.kind == "session")
        self._on_healthy = on_healthy
        self._begun = stopwatch()
        self._told_of_slow_start = False
        self._failed = 0

    async def run(self) -> None:
        """Poll until cancelled."""
        async with http_session() as http:
            while True:
                self.saw(await self._look(http))
                # poll often at first: a worker that waits for its consumer costs money
                starting = self._service.readiness.starting and not self._should_be_well
                await asyncio.sleep(min(self._interval, FIRST_LOOKS_SECONDS) if starting else self._interval)

    def saw(self, trouble: str | None) -> None:
        """Process a result: None for a success, else the reason of the failure."""
        readiness = self._service.readiness
        before = (readiness.starting, readiness.unhealthy)
        self.last = trouble or "healthy"
        if trouble is None:
            self._failed = 0
            readiness.consumer_is_healthy()
            if any(before):
                log.info("consumer_healthy", url=self.url)
            if before[0]:
                self._on_healthy()
        elif readiness.starting and not self._should_be_well:
            self._still_starting(trouble)
        else:
            self._failed += 1
            if self._failed >= self._failures:
                cause = f"the consumer is unhealthy: {trouble}"
                if not readiness.unhealthy:
                    log.error("consumer_unhealthy", url=self.url, why=trouble, failures=self._failed)
                    self._service.consumer_unhealthy(cause, cancel_held=self._cancel_held)
                readiness.consumer_is_unhealthy(cause)

    def _still_starting(self, trouble: str) -> None:
        readiness, seconds = self._service.readiness, stopwatch() - self._begun
        why = f"the consumer has not been healthy yet: {trouble}"
        readiness.consumer_is_starting(why)
        if seconds >= SLOW_START_SECONDS and not self._told_of_slow_start:
            self._told_of_slow_start = True
            log.warning("consumer_starts_slowly", url=self.url, why=trouble, seconds=round(seconds))
        if seconds >= LATE_START_SECONDS:
            if not readiness.late:
                log.error("consumer_is_late", url=self.url, why=trouble, seconds=round(seconds))
            readiness.consumer_is_late(f"{why}, for {seconds / 60:.0f} minutes")

    async def _look(self, http: aiohttp.ClientSession) -> str | None:
        try:
            async with get(http, self._url, seconds=self._timeout) as answer:
                return None if answer.status == 200 else f"{self.url} answered {answer.status}"
        except asyncio.TimeoutError:
            return f"{self.url} did not answer in {self._timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"{self.url} cannot be reached: {describe_failure(error)}"
