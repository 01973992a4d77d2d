"""The dispatcher's port: its status, whether it is ready, its metrics, and who may ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from nullworker.clock import SystemClock
from nullworker.dispatch.decision import Counts, Policy
from nullworker.dispatch.dispatcher import Dispatcher, Plan, running
from nullworker.dispatch.ledger import open_ledger
from nullworker.dispatch.server import server
from nullworker.dispatch.vast import Vast
from nullworker.http.sockets import listen
from nullworker.testing import FakeAutoscaler


class Jobs:
    """A queue without jobs."""

    shown = "memory"
    secrets: tuple[str, ...] = ()
    closed = False

    async def read(self) -> Counts:
        return Counts(0, 0)

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Dispatcher, str]]:
    """A dispatcher that is about to start, and the url of its port."""
    ledger = open_ledger(tmp_path / "ledger.db")
    listener = listen(0, host="127.0.0.1", variable="--port")
    async with running(Plan(Policy(1)), Jobs(), Vast("null", "key", None), ledger, SystemClock()) as dispatcher:
        site = server(dispatcher, listener)
        await site.start()
        yield dispatcher, f"http://127.0.0.1:{listener.getsockname()[1]}"
        await site.stop()
    listener.close()
    ledger.close()


async def test_its_connections_are_closed_at_its_end(tmp_path: Path, vast: FakeAutoscaler) -> None:
    queue, sdk, ledger = Jobs(), Vast("null", "key", vast.url), open_ledger(tmp_path / "ledger.db")
    async with running(Plan(Policy(1)), queue, sdk, ledger, SystemClock()) as dispatcher:
        await dispatcher.connect()
        http = sdk._found.client._session
        assert (queue.closed, http.closed) == (False, False)
    assert (queue.closed, http.closed) == (True, True)
    ledger.close()


async def test_its_status_is_that_of_the_dispatcher(
    served: tuple[Dispatcher, str], http: aiohttp.ClientSession
) -> None:
    dispatcher, url = served
    async with http.get(url + "/status") as answer:
        assert (answer.status, await answer.json()) == (200, dispatcher.status())


async def test_each_session_may_have_a_connection_of_its_own(served: tuple[Dispatcher, str]) -> None:
    connector = served[0].driver._http.connector
    assert connector is not None
    assert connector.limit == 0


async def test_it_is_ready_once_nothing_is_wrong_and_says_what_is(
    served: tuple[Dispatcher, str], http: aiohttp.ClientSession
) -> None:
    dispatcher, url = served
    dispatcher.vast._worked()
    async with http.get(url + "/readyz") as answer:
        assert answer.status == 503
        assert await answer.json() == {
            "ready": False,
            "checks": {
                "queue": {"ok": False, "why": "it has not been read yet"},
                "ledger": {"ok": True, "why": None},
                "autoscaler": {"ok": True, "why": None},
            },
        }
    await dispatcher._look()
    async with http.get(url + "/readyz") as answer:
        assert (answer.status, (await answer.json())["ready"]) == (200, True)


async def test_its_metrics_are_those_of_the_dispatcher_and_of_its_process(
    served: tuple[Dispatcher, str], http: aiohttp.ClientSession
) -> None:
    async with http.get(served[1] + "/metrics") as answer:
        text = await answer.text()
    for name in ("nullworker_dispatch_queue_waiting", "process_open_fds", "python_info"):
        assert f"\n{name}" in text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example", "Origin": "http://localhost"}, 403),
    ],
)
async def test_it_answers_only_to_this_machine(
    served: tuple[Dispatcher, str], http: aiohttp.ClientSession, headers: dict[str, str], status: int
) -> None:
    for path in ("/status", "/readyz", "/metrics"):
        async with http.get(served[1] + path, headers=headers) as answer:
            assert answer.status == (503 if status == 200 and path == "/readyz" else status)
