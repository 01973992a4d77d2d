"""The HTTP server against slow and oversized requests."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import trustme
from doors import EMPTY, HEAD, HOLD, Door

from nullworker.http import bodies, server, sockets
from nullworker.http.sockets import KEEPALIVE

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with Door().opened() as door:
        yield door


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience that a test can wait for."""
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.02)


# -- what is slow ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sent", [b"", b"POST /echo", HEAD, b"\r\n" * 50], ids=["nothing", "line", "headers", "blank"])
async def test_a_connection_without_a_request_is_closed(door: Door, sent: bytes) -> None:
    wire = await door.connect(sent)
    assert await wire.end() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_request_head_sent_byte_by_byte_is_closed(door: Door) -> None:
    wire = await door.connect(b"POST /echo HTTP/1.1\r\nX: ")
    ended = asyncio.ensure_future(wire.end())
    while not (await asyncio.wait({ended}, timeout=0.02))[0]:
        await wire.send(b"a")
    assert ended.result() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_an_incomplete_second_request_is_closed(door: Door) -> None:
    wire = await door.connect(EMPTY)
    assert (await wire.answer()).body == {"bytes": 0}
    await wire.send(HEAD)
    assert await wire.end() == b""
    await wire.close()


@pytest.mark.usefixtures("quick")
async def test_an_idle_connection_after_an_answer_has_a_longer_timeout(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = await door.connect(EMPTY)
    await idle.answer()
    silent = await door.connect()
    assert await silent.end() == b""
    await idle.send(EMPTY)
    assert (await idle.answer()).status == 200
    await idle.close()
    monkeypatch.setattr(server, "KEEPALIVE_SECONDS", 0.1)
    idle = await door.connect(EMPTY)
    await idle.answer()
    assert await idle.end() == b""
    for wire in (idle, silent):
        await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_request_under_way_is_never_closed(door: Door) -> None:
    held = await door.hold_one()
    for _ in range(3):
        silent = await door.connect()
        assert await silent.end() == b""
        await silent.close()
    door.let_go.set()
    assert (await held.answer()).body == {"held": True}
    await held.close()


UPGRADE = HOLD[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sends", [(HOLD * 40,), (HOLD, HOLD * 40), (UPGRADE, bytes(1_000_000))])
async def test_who_sends_so_much_more_that_its_end_could_not_be_noticed_is_hung_up_on(
    door: Door, sends: tuple[bytes, ...]
) -> None:
    wire = await door.connect(sends[0])
    await door.held.acquire()
    for more in sends[1:]:
        await wire.send(more)
    await asyncio.wait_for(door.left.wait(), 20)
    await wire.close()


async def test_closing_one_half_of_the_connection_is_a_hang_up(door: Door) -> None:
    wire = await door.hold_one()
    wire.writer.write_eof()
    await asyncio.wait_for(door.left.wait(), 20)
    await wire.close()


async def test_tcp_keepalive_notices_a_vanished_peer(door: Door) -> None:
    wire = await door.hold_one()
    (accepted,) = door.sockets
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    named = {name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
    assert named == KEEPALIVE
    await wire.close()


# -- what is too much --------------------------------------------------------------------------------------------------


async def test_a_full_port_keeps_requests_under_way_and_refuses_new_connections(
    logged: Callable[[], list[str]],
) -> None:
    async with Door().opened(max_connections=3) as door:
        held = [await door.hold_one() for _ in range(3)]
        for _ in range(5):
            refused = await door.connect(EMPTY)
            assert await refused.end() == b""
            await refused.close()
        door.let_go.set()
        for wire in held:
            assert (await wire.answer()).body == {"held": True}
            await wire.close()
        late = await door.connect(EMPTY)
        assert (await late.answer()).status == 200
        await late.close()
    assert logged() == ["port_full"]  # not a line for each


async def test_a_full_port_closes_the_oldest_connection_without_a_request(door: Door) -> None:
    async with Door().opened(max_connections=4) as door:
        held = await door.hold_one()
        silent = [await door.connect(b"P") for _ in range(3)]
        for _ in range(2):
            newcomer = await door.connect(EMPTY)
            assert (await newcomer.answer()).status == 200
            await newcomer.close()
        assert await silent[0].end() == b""
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (held, *silent):
            await wire.close()


async def test_a_full_port_closes_the_oldest_idle_connection() -> None:
    async with Door().opened(max_connections=3) as door:
        idle = [await door.connect(EMPTY) for _ in range(3)]
        for wire in idle:
            await wire.answer()
        newcomer = await door.connect(EMPTY)
        assert (await newcomer.answer()).status == 200
        assert await idle[0].end() == b""
        await idle[2].send(EMPTY)
        assert (await idle[2].answer()).status == 200
        for wire in (newcomer, *idle):
            await wire.close()


async def test_a_full_port_closes_a_connection_of_the_largest_group() -> None:
    async with Door().opened(max_connections=4) as door:
        silent = await door.connect(b"P")
        idle = [await door.connect(EMPTY) for _ in range(3)]
        for wire in idle:
            await wire.answer()
        newcomer = await door.connect(EMPTY)
        assert (await newcomer.answer()).status == 200
        assert await idle[0].end() == b""
        await silent.send(EMPTY[1:])
        assert (await silent.answer()).status == 200
        for wire in (silent, newcomer, *idle):
            await wire.close()


@pytest.mark.parametrize("look_seconds", [0.01, 0.3])
async def test_memory_is_given_back_once_when_a_crowd_has_left(
    look_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it came and went between two looks."""
    given_back = asyncio.Event()
    times: list[int] = []

    def give_back() -> None:
        times.append(1)
        given_back.set()

    monkeypatch.setattr(server, "LOOK_SECONDS", look_seconds)
    monkeypatch.setattr(server, "CROWD_SIZE", 3)
    monkeypatch.setattr(server, "_give_memory_back", give_back)
    async with Door().opened() as door:
        crowd = [await door.connect(EMPTY) for _ in range(3)]
        for wire in crowd:
            await wire.answer()
        await asyncio.sleep(0.05)
        assert not times
        for wire in crowd:
            await wire.close()
        await asyncio.wait_for(given_back.wait(), 5)
        await asyncio.sleep(0.05)
        assert times == [1]


HALF = HEAD + b"Content-Length: 10\r\n\r\n12345"


@pytest.mark.parametrize("sent", [HALF, CHUNKED + b"\r\n5\r\n12345\r\n", HEAD + b"Content-Length: 1\r\n\r\n"])
async def test_who_has_sent_half_a_body_makes_room(sent: bytes) -> None:
    async with Door().opened(max_connections=4) as door:
        held = await door.hold_one()
        crowd = [await door.connect(sent) for _ in range(3)]
        for _ in range(2):
            newcomer = await door.connect(EMPTY)
            assert (await newcomer.answer()).status == 200
            await newcomer.close()
        assert await crowd[0].end() == b""
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (held, *crowd):
            await wire.close()


async def test_what_those_have_sent_who_have_not_sent_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNVERIFIED_BYTES", 50_000)
    begun = HEAD + b"Content-Length: 20010\r\n\r\n" + bytes(20_000)
    async with Door().opened() as door:
        held = await door.hold_one()
        silent = await door.connect()
        for _ in range(3):  # what is there as a whole, or was answered, is not counted
            first, second = await door.connect(begun), await door.connect(begun)
            newcomer = await door.connect(begun)
            assert await first.end() == b""
            for wire in (second, newcomer):
                await wire.send(bytes(10))
                assert (await wire.answer()).body == {"bytes": 20_010}
            for wire in (first, second, newcomer):
                await wire.close()
        await silent.send(EMPTY)
        assert (await silent.answer()).status == 200, "who has sent nothing is in nobody's way"
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (silent, held):
            await wire.close()


async def test_a_small_request_is_not_cut_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNVERIFIED_BYTES", 50_000)
    begun = HEAD + b"Content-Length: 20010\r\n\r\n" + bytes(20_000)
    async with Door().opened() as door:
        small = await door.connect(HALF)
        large = [await door.connect(begun) for _ in range(3)]
        assert await large[0].end() == b""
        await small.send(b"67890")
        assert (await small.answer()).body == {"bytes": 10}
        for wire in (small, *large):
            await wire.close()


@pytest.mark.usefixtures("quick")
async def test_a_body_that_does_not_come_is_not_waited_for(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    wire = await door.connect(HALF)
    assert (await wire.answer()).status == 408
    assert await wire.end() == b""
    await wire.close()


@pytest.fixture
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


@pytest.mark.usefixtures("quick")
async def test_the_limits_hold_with_tls(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    ours, theirs = tls
    secure = {"ssl": theirs, "server_hostname": "localhost"}
    async with Door().opened(max_connections=3, tls=ours) as door:
        held = await door.connect(HOLD, **secure)
        await door.held.acquire()
        plain = await door.connect(EMPTY)  # no TLS at all
        await plain.end()
        silent = [await door.connect() for _ in range(4)]  # no handshake
        newcomer = await door.connect(EMPTY, **secure)
        assert (await newcomer.answer()).status == 200
        for wire in silent:
            assert await wire.end() == b""
        late = await door.connect(HEAD, **secure)
        assert await late.end() == b""
        more = await door.connect(HOLD * 40, **secure)
        await door.held.acquire()
        await asyncio.wait_for(door.left.wait(), 20)
        door.let_go.set()
        assert (await held.answer()).body == {"held": True}
        for wire in (plain, *silent, newcomer, late, more, held):
            await wire.close()


async def test_a_machine_without_descriptors_accepts_again_when_it_has_some(
    door: Door, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(server, "EXHAUSTED_SECONDS", 0.05)
    accept, left = socket.socket.accept, [errno.EMFILE, errno.ENFILE]

    def failing(self: socket.socket) -> object:
        if left:
            raise OSError(left.pop(), "none left")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    wire = await door.connect(EMPTY)
    assert (await wire.answer()).status == 200
    assert logged() == ["cannot_accept"] * 2
    await wire.close()


def test_a_worker_raises_its_limit_of_open_files() -> None:
    script = (
        "import resource as r; _, hard = r.getrlimit(r.RLIMIT_NOFILE); r.setrlimit(r.RLIMIT_NOFILE, (256, hard));"
        "from nullworker.http.sockets import raise_fd_limit; "
        "print(raise_fd_limit() == r.getrlimit(r.RLIMIT_NOFILE)[0] == hard)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"True\n"


@pytest.mark.parametrize("files", [1024, 4096, 20_000, 65_536, 2**31])
def test_connections_never_take_the_files_that_the_worker_itself_needs(files: int) -> None:
    external, local = sockets.shares(files, 1_000_000)
    assert files - external - 3 * local >= min(files // 6, 1000)
    assert sockets.shares(2**20, 1000) == (1000 + sockets.SPARE_CONNECTIONS, sockets.LOCAL_CONNECTIONS)
