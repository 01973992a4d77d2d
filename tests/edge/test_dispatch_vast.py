"""The dispatcher's side of Vast by the official SDK: grants, workers, prices, and what it says of faults."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from fake_worker import FakeWorker
from programs import free_port

from nullworker.dispatch import vast as dispatch_vast
from nullworker.dispatch.vast import Instance, Routed, Unreachable, Vast, WorkerSeen, address, trust
from nullworker.errors import CannotStart
from nullworker.testing import FakeAutoscaler, keys

KEY = "sesame"


class Account(FakeAutoscaler):
    """A fake autoscaler whose account has the instances of `pages`.

    Attributes:
        status: of the answer with a page; queries, keys: of the requests for one.
    """

    def __init__(self) -> None:
        super().__init__(api_key=KEY)
        self.pages: list[Any] = []
        self.status = 200
        self.queries: list[dict[str, str]] = []
        self.keys: list[str | None] = []

    async def _instances(self, request: web.Request) -> web.Response:
        self.queries.append(dict(request.query))
        self.keys.append(request.headers.get("Authorization"))
        page = int(request.query.get("after_token", 0))
        after = page + 1 if page + 1 < len(self.pages) else None
        body = {"instances": self.pages[page], "next_token": after and str(after)} if self.pages else {}
        return web.json_response(body, status=self.status)


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    account = Account()
    async with account:
        yield account


@asynccontextmanager
async def connected(account: FakeAutoscaler, key: str = KEY) -> AsyncIterator[Vast]:
    vast = Vast(account.endpoint, key, account.url)
    try:
        await vast.connect()
        yield vast
    finally:
        await vast.close()


class Silent:
    """An endpoint whose answers have neither a worker nor a number."""

    async def _route(self, **_: Any) -> Any:
        return SimpleNamespace(status="WAITING", request_idx=None)


async def test_a_request_is_repeated_by_its_number_until_there_is_a_worker(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(account) as vast:
        waiting = await vast.route(150.0, 0)
        assert waiting == Routed(None, 1)
        assert await vast.route(150.0, waiting.request_idx) == waiting
        assert account.waiting_load == 150.0
        async with FakeWorker(account.url) as worker:
            grant, idx = await vast.route(150.0, waiting.request_idx)
            assert idx == 1
            assert grant is not None
            assert (grant.url, grant.auth_data["url"]) == (worker.url, worker.url)
            assert (grant.auth_data["cost"], grant.auth_data["request_idx"]) == (150.0, 1)
            assert grant.auth_data["signature"] == keys.sign(account.key, worker.url)
        monkeypatch.setattr(vast, "_found", Silent())
        assert await vast.route(150.0, 5) == Routed(None, 5)
        assert await vast.route(150.0, 0) == Routed(None, 0)
    assert [seen.payload["replay_timeout"] for seen in account.seen if seen.call == "route"] == [60.0] * 3


async def test_a_grant_waits_for_the_connection_and_everything_else_says_that_there_is_none(account: Account) -> None:
    vast = Vast("null", KEY, account.url)
    assert vast.trouble == "no call has been answered yet"
    for call in (vast.workers, vast.running, vast.instances, vast.ssl_context):
        with pytest.raises(Unreachable, match="no call has been answered yet"):
            await call()
    routed = asyncio.ensure_future(vast.route(100.0, 0))
    await asyncio.sleep(0)
    assert not routed.done()
    await vast.connect()
    assert await routed == Routed(None, 1)
    assert vast.trouble is None
    await vast.close()


async def test_the_workers_are_those_of_the_endpoint_and_a_stopped_one_does_not_run(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = [1000.0]
    monkeypatch.setattr(dispatch_vast, "stopwatch", lambda: time[0])
    async with (
        FakeWorker(account.url, number=17) as busy,
        FakeWorker(account.url, number=18),
        connected(account) as vast,
    ):
        busy._working = {"r1": 5, "r2": 6}
        await busy.report()
        assert await vast.workers() == [WorkerSeen(17, 2, False), WorkerSeen(18, 0, False)]
        assert await vast.running() == {17, 18}
        account.fleet.stopped.add(18)
        assert await vast.workers() == [WorkerSeen(17, 2, False), WorkerSeen(18, 0, True)]
        time[0] += dispatch_vast.FRESH_SECONDS
        assert await vast.running() == {17, 18}  # asked by many claims at once, Vast by one
        time[0] += 0.1
        assert await vast.running() == {17}


async def test_an_instance_is_found_by_its_number_and_by_each_of_its_external_ports(account: Account) -> None:
    ports = {"3000/tcp": [{"HostPort": "40001"}, {"HostPort": "40001"}], "22/tcp": [{"HostPort": "40002"}]}
    account.pages = [
        [{"id": 17, "dph_total": "0.25", "public_ipaddr": " 10.0.0.1\n", "ports": ports}],
        [
            {"id": 18, "dph_total": 0.5, "public_ipaddr": "10.0.0.2", "ports": None},  # it does not run yet
            {"id": 19, "dph_total": None},
            {"id": None, "dph_total": 0.5},
            {"dph_total": 0.5},
            None,
            {"id": 20, "dph_total": 2, "public_ipaddr": "10.0.0.3", "ports": {"3000/tcp": [{"HostPort": "40003"}]}},
        ],
        None,
    ]
    first, last = Instance(17, 0.25), Instance(20, 2.0)
    async with connected(account) as vast:
        assert await vast.instances() == {
            "17": first,
            "10.0.0.1:40001": first,
            "10.0.0.1:40002": first,
            "18": Instance(18, 0.5),
            "20": last,
            "10.0.0.3:40003": last,
        }
        assert account.queries == [
            {"limit": "100"},
            {"limit": "100", "after_token": "1"},
            {"limit": "100", "after_token": "2"},
        ]
        assert account.keys == [f"Bearer {KEY}"] * 3
        account.status = 503
        with pytest.raises(Unreachable, match=rf"^127\.0\.0\.1:{account.port} answered 503 for the instances' prices$"):
            await vast.instances()
        assert vast.trouble is None  # workers can still be asked for


async def test_a_call_that_fails_is_a_trouble_until_one_is_answered(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(account) as vast:
        account.fail("route", 500)
        with pytest.raises(Unreachable, match=r"^Failed to route endpoint: .*HTTP 500") as refused:
            await vast.route(100.0, 0)
        assert vast.trouble == str(refused.value)
        assert len(await vast.workers()) == 0
        assert vast.trouble is None
        monkeypatch.setattr(dispatch_vast, "API_SECONDS", 0.1)
        account.fail("route", "late")
        with pytest.raises(Unreachable, match=rf"^{account.url} does not answer$"):
            await vast.route(100.0, 0)
        vast._autoscaler = None
        with pytest.raises(Unreachable, match=r"^Vast does not answer$"):
            await vast.route(100.0, 0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(f"GET /x?id=1&api_key={KEY}&y=2 of '{KEY}' failed"), "GET /x?id=1&api_key=***&y=2 of '***' failed"),
        (OSError("GET /x?api_key=another-one'"), "GET /x?api_key=***'"),
        (OSError("host:443 ssl:<ssl.SSLContext object at 0x7f>\n [refused]"), "host:443 [refused]"),
        (OSError("host:443 ssl:default [refused]"), "host:443 [refused]"),
        (RuntimeError("x" * 400), "x" * 300),
        (RuntimeError(), "the call failed (RuntimeError)"),
    ],
)
async def test_a_fault_is_told_in_one_line_without_a_key(error: Exception, said: str) -> None:
    vast = Vast("null", KEY, None)
    assert str(vast._unreachable(error)) == vast.trouble == said


@pytest.mark.parametrize(("endpoint", "key", "said"), [("nul", KEY, "no endpoint named 'nul'"), ("null", "x", "401")])
async def test_what_will_never_work_is_an_error_and_not_waited_for(
    account: Account, endpoint: str, key: str, said: str
) -> None:
    vast = Vast(endpoint, key, account.url)
    with pytest.raises(CannotStart, match=said):
        await vast.connect()
    await vast.close()


async def test_an_autoscaler_that_is_not_there_is_waited_for() -> None:
    vast = Vast("null", KEY, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unreachable, match="nothing answers") as caught:
        await vast.connect()
    assert vast.trouble == str(caught.value)
    await vast.close()


@pytest.mark.parametrize(
    ("url", "host_and_port"),
    [
        ("https://10.0.0.1:40001", "10.0.0.1:40001"),
        ("https://10.0.0.1", "10.0.0.1:443"),
        ("http://10.0.0.1/x", "10.0.0.1:80"),
    ],
)
def test_the_address_of_a_url_has_a_port(url: str, host_and_port: str) -> None:
    assert address(url) == host_and_port


async def test_workers_are_trusted_as_the_sdk_trusts_them(account: Account) -> None:
    async with connected(account) as vast:
        theirs = await vast.ssl_context()
        theirs.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust(ours, theirs)
        assert ours.get_ca_certs(binary_form=True) == theirs.get_ca_certs(binary_form=True) != []
        assert ours.verify_flags == theirs.verify_flags
