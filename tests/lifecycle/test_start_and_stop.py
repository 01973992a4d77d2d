"""The start and the stop of a real worker: what prevents a start, and that a stop loses nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from claims import data_of, reserve
from harness import ROOT, WorkerProcess, anew, post, secured, signed
from programs import inherited, python_path

from nullworker.testing import FakeAutoscaler

#: What the contract gives to the end of a worker beside NULL_DRAIN_SECONDS.
STOP_SECONDS = 3.0


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("", 0)) as sock:
        yield sock.getsockname()[1]


@contextmanager
def taken_after_a_free_one() -> Iterator[int]:
    """A port that is taken, and the one before it is free; below those that the system gives to other tests."""
    for port in range(20_001 + 2 * (os.getpid() % 5000), 32_000, 2):
        with suppress(OSError), socket.create_server(("", port)) as sock:
            with socket.create_server(("", port - 1)):
                pass
            yield sock.getsockname()[1]
            return


def said(worker: WorkerProcess) -> list[str]:
    """The lines on stderr that are no log lines."""
    return [line["text"] for line in worker.lines if not line["event"]]


async def failed_start(worker: WorkerProcess) -> str:
    """Start a worker that cannot; the one line that it says."""
    await worker.spawn()
    assert await worker.exit_code() == 1
    (line,) = said(worker)
    return line


# -- what keeps it from starting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["WORKER_PORT", "NULL_CONTROL_PORT", "WORKER_HTTP_PORT"])
async def test_a_taken_port_is_told_to_the_autoscaler_and_in_one_line(
    tmp_path: Path, vast: FakeAutoscaler, variable: str
) -> None:
    with taken_port() as port:
        worker = secured(tmp_path, vast, **{variable: str(port)})
        line = await failed_start(worker)
    assert line.startswith(f"nullworker: {variable}: ")
    assert f":{port} is taken by another process" in line
    (status,) = vast.statuses
    assert status["error_msg"] == line.removeprefix("nullworker: ")
    assert (status["id"], status["mtoken"], status["max_perf"], status["cur_load"]) == (7, "master-secret", 0, 0)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "metrics.invalid", "a..b"])
async def test_a_metrics_address_that_is_not_there_is_a_warning(tmp_path: Path, host: str) -> None:
    async with WorkerProcess(tmp_path, NULL_METRICS_HOST=host, NULL_METRICS_PORT="0") as worker:
        line = await worker.line("metrics_site_not_up")
        assert line["level"] == "warning"
        assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200
        assert await worker.terminate() == 0
    assert said(worker) == []


async def test_a_taken_metrics_port_is_a_warning_and_listened_on_once_it_is_free(tmp_path: Path) -> None:
    with ExitStack() as taken:
        port = taken.enter_context(taken_port())
        site: Any = {"NULL_METRICS_HOST": "127.0.0.1", "NULL_METRICS_PORT": str(port)}
        async with WorkerProcess(tmp_path, **site) as worker:
            line = await worker.line("metrics_site_not_up")
            assert line["level"] == "warning"
            assert f":{port} is taken by another process" in line["why"]
            taken.close()
            assert (await worker.line("metrics_site_up"))["port"] == port
            assert await worker.terminate() == 0
    assert said(worker) == []


async def test_the_line_of_the_start_has_each_port_that_was_chosen(tmp_path: Path) -> None:
    env: Any = {"NULL_METRICS_HOST": "127.0.0.1", "NULL_METRICS_PORT": "0", "WORKER_HTTP_PORT": "0"}
    async with WorkerProcess(tmp_path, **env) as worker, aiohttp.ClientSession() as http:
        line = await worker.line("worker_started")
        assert (line["external_port"], line["control_port"]) == (worker.port, worker.control_port)
        async with http.get(f"http://127.0.0.1:{line['metrics_port']}/metrics") as answer:
            assert answer.status == 200
        async with http.post(f"http://127.0.0.1:{line['session_end_port']}/session/end", json={}) as answer:
            assert answer.status == 422


async def test_a_dead_dns_does_not_delay_the_exit(tmp_path: Path) -> None:
    """getaddrinfo takes 10 s and more then, and nothing can interrupt it: 17.4 s were seen."""
    path = python_path(
        tmp_path,
        "import socket, time\n"
        "found = socket.getaddrinfo\n"
        "def dead(host, *more, **named):\n"
        "    if host and 'example' in str(host):\n"
        "        time.sleep(60)\n"
        "    return found(host, *more, **named)\n"
        "socket.getaddrinfo = dead\n",
    )
    names: Any = {"REPORT_ADDR": "http://run.example", "BACKEND_HEALTH_URL": "http://health.example/"}
    names |= {"NULL_SINK": "https://sink.example/", "NULL_METRICS_HOST": "metrics.example", "NULL_METRICS_PORT": "0"}
    worker = WorkerProcess(tmp_path, CONTAINER_ID="7", MASTER_TOKEN="x", NULL_DRAIN_SECONDS="0", **names)
    worker.env["PYTHONPATH"] = path
    async with worker:
        await asyncio.sleep(1)  # all of them are asked for
        began = time.monotonic()
        assert await worker.terminate() == 0
        assert time.monotonic() - began < 10, "the drain, 3 s, and a busy machine"
        assert said(worker) == []


async def test_a_metrics_address_that_comes_later_is_listened_on(tmp_path: Path) -> None:
    """`localhost` has no address for a while, as the name of a machine in a private network."""
    path = python_path(
        tmp_path,
        "import socket, nullworker.http.ports as ports\n"
        "listen, left = ports.listen, [1, 2]\n"
        "def late(port, *, host, variable):\n"
        "    if host == 'localhost' and left:\n"
        "        left.pop()\n"
        "        raise ports.CannotStart('it is not there') from socket.gaierror(-2, 'unknown')\n"
        "    return listen(port, host=host, variable=variable)\n"
        "ports.listen = late\n",
    )
    env: Any = {"NULL_METRICS_HOST": "localhost", "NULL_METRICS_PORT": "0", "NULL_METRICS_TOKEN": "t"}
    worker = WorkerProcess(tmp_path, **env)
    worker.env["PYTHONPATH"] = path
    async with worker:
        await worker.line("metrics_site_not_up", nth=2)
        port = (await worker.line("metrics_site_up"))["port"]
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer t"}) as http:
            async with http.get(f"http://127.0.0.1:{port}/metrics") as answer:
                assert answer.status == 200
            async with http.get(f"http://127.0.0.1:{port}/status") as answer:
                assert answer.status == 404
        assert await worker.terminate() == 0
        assert said(worker) == []


async def test_a_certificate_that_cannot_be_read_is_told_to_the_autoscaler_and_in_one_line(
    tmp_path: Path, vast: FakeAutoscaler
) -> None:
    worker = secured(tmp_path, vast, USE_SSL="true", module=with_certificate(tmp_path))
    line = await failed_start(worker)
    assert f"{tmp_path}/instance.crt" in line
    assert "No such file" in line
    (status,) = vast.statuses
    assert status["error_msg"] == line.removeprefix("nullworker: ")
    assert status["url"].startswith("https://")


async def test_a_default_port_for_session_end_that_is_taken_is_only_a_warning(tmp_path: Path) -> None:
    with taken_after_a_free_one() as port:
        async with WorkerProcess(tmp_path, WORKER_PORT=str(port - 1)) as worker:
            assert (await worker.line("session_end_port_taken"))["port"] == port
            assert (await post(worker.url + "/reserve", {"duration": 0})).status == 200


async def test_a_second_worker_on_one_log_names_the_first_and_keeps_still(
    tmp_path: Path, vast: FakeAutoscaler, worker: WorkerProcess
) -> None:
    ready = await vast.wait_for(lambda: [status for status in vast.statuses if status["max_perf"]])
    second = secured(tmp_path, vast)
    line = await failed_start(second)
    assert f"pid {worker.process.pid}" in line
    assert str(worker.db) in line
    assert not [status for status in vast.statuses if status["error_msg"]]
    assert ready[0]["url"] == worker.url
    claim = await reserve(worker, vast, duration=0)
    assert (await claim.answer()).status == 200


async def test_a_failed_start_waits_for_no_autoscaler(tmp_path: Path, vast: FakeAutoscaler) -> None:
    vast.fail("worker_status", "late")
    with taken_port() as port:
        worker = secured(tmp_path, vast, WORKER_PORT=str(port))
        await worker.spawn()
        await vast.wait_for(lambda: vast.seen, timeout=20)
        told_at = time.monotonic()
        assert await worker.exit_code() == 1
    assert time.monotonic() - told_at < STOP_SECONDS


# -- doors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "door", [("-m", "nullworker", "serve"), ("-m", "workers.null.worker"), ("-m", "worker"), (str(ROOT / "worker.py"),)]
)
async def test_every_entry_point_starts_the_same_worker(
    tmp_path: Path, vast: FakeAutoscaler, door: tuple[str, ...]
) -> None:
    async with anew(secured(tmp_path, vast, module=door)) as worker:
        await worker.line("key_loaded")
        claim = await reserve(worker, vast)
        assert await worker.release() == {"released": True}
        assert (await claim.answer()).status == 200
        assert await worker.terminate() == 0


async def test_each_entry_point_exits_with_2_for_bad_settings(tmp_path: Path) -> None:
    worker = anew(WorkerProcess(tmp_path, module=(str(ROOT / "worker.py"),), NULL_MAX_PERF="fast"))
    await worker.spawn()
    assert await worker.exit_code() == 2
    assert said(worker) == [
        "nullworker: NULL_MAX_PERF='fast' is not allowed: it must be a number above 0 and at most 1000000000"
    ]


# -- TLS ---------------------------------------------------------------------------------------------------------


def with_certificate(folder: Path) -> tuple[str, ...]:
    """`nullworker serve`, but with the certificate in a folder of the test instead of /etc."""
    lines = (
        "import functools, pathlib, sys",
        "from nullworker.http import ports\nfrom nullworker.cli import commands",
        "paths = [pathlib.Path(sys.argv[1], name) for name in ('instance.crt', 'instance.key')]",
        "ports.tls = functools.partial(ports.tls, *paths)",
        "commands.main(['serve'])",
    )
    return ("-c", "\n".join(lines), str(folder))


async def test_use_ssl_puts_tls_on_the_external_port_and_on_no_other(tmp_path: Path, vast: FakeAutoscaler) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "instance.key")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(tmp_path / "instance.crt", append=True)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with secured(tmp_path, vast, USE_SSL="true", module=with_certificate(tmp_path)) as worker:
        await worker.line("key_loaded")
        url = f"https://127.0.0.1:{worker.port}"
        reported = await vast.wait_for(lambda: [s["url"] for s in vast.statuses if s["max_perf"]])
        assert reported[0] == url
        async with aiohttp.ClientSession() as http:
            async with http.post(url + "/reserve", json=signed(vast, url, {"duration": 0}), ssl=trusting) as answer:
                assert (answer.status, (await answer.json())["released"]) == (200, "duration_elapsed")
            with pytest.raises(aiohttp.ClientError):
                await http.post(worker.url + "/reserve", json={})
        assert (await worker.get("/readyz"))["ready"] is True


# -- the stop ----------------------------------------------------------------------------------------------------


async def test_what_is_held_may_finish_and_is_answered(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    claim = await reserve(worker, vast)
    worker.process.send_signal(signal.SIGTERM)
    await worker.line("stopping")
    ready = await worker.get("/readyz")
    assert (ready["ready"], ready["state"], ready["checks"]["draining"]["ok"]) == (False, "draining", False)
    assert await worker.release() == {"released": True}
    assert (await claim.answer()).body["released"] == "explicit"
    assert await worker.exit_code() == 0
    assert worker.story()[-1] == ("released", "explicit")
    assert await claim.outcome() == "Success"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_not_released_in_time_is_cancelled_and_told(
    tmp_path: Path, vast: FakeAutoscaler, stream: bool
) -> None:
    async with secured(tmp_path, vast, NULL_DRAIN_SECONDS="0.2") as worker:
        await worker.line("key_loaded")
        claim = await reserve(worker, vast, stream=stream)
        assert await worker.terminate() == 0
        answer = await claim.answer()
        if stream:
            assert f'"reservation_id":"{claim.id}"' in data_of(answer.body)[-1]
            assert '"reason":"draining"' in data_of(answer.body)[-1]
        else:
            assert (answer.status, answer.body["reason"]) == (503, "draining")
            assert answer.headers["Retry-After"]
        assert worker.story()[-1] == ("cancelled", "draining")
        assert await claim.outcome() == "Cancelled"


async def test_a_drain_cancels_the_queue_and_refuses_new_claims(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    held, queued = [await reserve(worker, vast) for _ in range(2)]
    worker.process.send_signal(signal.SIGTERM)
    await worker.line("stopping")
    late = await reserve(worker, vast)
    for refused in (queued, late):
        answer = await refused.answer()
        assert (answer.status, answer.body["reason"]) == (503, "draining")
        assert answer.headers["Retry-After"]
    assert (await worker.get("/reservation"))["id"] == held.id
    await worker.release()
    assert await worker.exit_code() == 0
    assert [await claim.outcome() for claim in (held, queued, late)] == ["Success", "Rejected", "Rejected"]
    assert await vast.wait_for(lambda: vast.statuses[-1]["cur_load"] == 0)


async def test_a_signal_as_soon_as_the_ports_are_open_is_a_stop_in_order(tmp_path: Path) -> None:
    path = python_path(
        tmp_path,
        "import os, signal, nullworker.http.ports as ports\n"
        "opened = ports.Ports.__init__\n"
        "def stopped_at_once(self, settings):\n"
        "    opened(self, settings)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "ports.Ports.__init__ = stopped_at_once\n",
    )
    worker = WorkerProcess(tmp_path)
    worker.env["PYTHONPATH"] = path
    await worker.spawn()
    assert await worker.exit_code() == 0
    assert [line["event"] for line in worker.lines][-1] == "worker_stopped"


async def test_a_terminal_that_is_closed_is_a_stop_in_order(tmp_path: Path, vast: FakeAutoscaler) -> None:
    with inherited(signal.SIG_DFL):
        async with secured(tmp_path, vast) as worker:
            await worker.line("key_loaded")
            held = await reserve(worker, vast)
            worker.process.send_signal(signal.SIGHUP)
            assert (await worker.line("stopping"))["signal"] == "SIGHUP"
            await worker.release()
            assert (await held.answer()).status == 200
            assert await worker.exit_code() == 0


async def test_under_nohup_a_closed_terminal_is_nothing(tmp_path: Path) -> None:
    with inherited(signal.SIG_IGN):
        async with WorkerProcess(tmp_path) as worker:
            worker.process.send_signal(signal.SIGHUP)
            assert (await worker.get("/readyz"))["ready"] is True
            worker.process.send_signal(signal.SIGTERM)
            assert (await worker.line("stopping"))["signal"] == "SIGTERM"
            assert await worker.exit_code() == 0


async def test_a_second_signal_ends_what_is_held(worker: WorkerProcess, vast: FakeAutoscaler) -> None:
    claim = await reserve(worker, vast)
    worker.process.send_signal(signal.SIGINT)
    await worker.line("stopping")
    worker.process.send_signal(signal.SIGINT)
    assert (await claim.answer()).body["reason"] == "draining"
    assert await worker.exit_code() == 0


async def test_with_nothing_held_it_stops_at_once_though_others_watch(tmp_path: Path, vast: FakeAutoscaler) -> None:
    async with secured(tmp_path, vast, NULL_DRAIN_SECONDS="600") as worker, aiohttp.ClientSession() as http:
        await worker.line("key_loaded")
        async with http.get(worker.control + "/events") as events:
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.control_port)
            writer.write(b"GET /reservation?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await writer.drain()
            await worker.get("/status")  # what came before it is read by then
            started = time.monotonic()
            assert await worker.terminate() == 0
            assert time.monotonic() - started < STOP_SECONDS
            assert (await reader.read()).startswith(b"HTTP/1.1 204 ")  # an answer, and not cut off
            assert await events.text() == ": open\n\n"
            writer.close()


@pytest.mark.parametrize("how", ["down", "late", 500])
async def test_no_autoscaler_holds_up_the_end_and_what_is_owed_arrives_after_the_next_start(
    tmp_path: Path, vast: FakeAutoscaler, how: Any
) -> None:
    async with secured(tmp_path, vast, NULL_DRAIN_SECONDS="0.2") as worker:
        await worker.line("key_loaded")
        vast.fail("worker_status", how)
        vast.fail("delete_requests", how)
        claims = [await reserve(worker, vast) for _ in range(2)]
        started = time.monotonic()
        assert await worker.terminate() == 0
        assert time.monotonic() - started < 0.2 + STOP_SECONDS
        assert [(await claim.answer()).status for claim in claims] == [503, 503]
        vast.clear()
        await worker.start()
        await vast.wait_for(lambda: all(vast.outcomes_of(claim.idx) for claim in claims))
        assert {claim.idx: vast.outcomes_of(claim.idx)[-1]["status"] for claim in claims} == {
            claims[0].idx: "Cancelled",
            claims[1].idx: "Rejected",
        }


async def test_a_hold_that_ends_by_itself_while_it_drains_is_a_success(
    worker: WorkerProcess, vast: FakeAutoscaler
) -> None:
    claim = await reserve(worker, vast, duration=0.3)
    assert await worker.terminate() == 0
    assert (await claim.answer()).body["released"] == "duration_elapsed"
    assert await claim.outcome() == "Success"


async def test_what_is_set_and_what_is_misspelled_is_said_at_the_start(tmp_path: Path) -> None:
    async with (
        FakeAutoscaler() as vast,
        secured(tmp_path, vast, NULL_DRAIN_SECOND="1", NULL_QUEUE="redis://h") as worker,
    ):
        warning = await worker.line("unknown_setting")
        assert (warning["level"], warning["name"], warning["nearest"]) == (
            "warning",
            "NULL_DRAIN_SECOND",
            "NULL_DRAIN_SECONDS",
        )
        started = await worker.line("worker_started")
        status = await worker.get("/status")
        assert started["settings"] == status["settings"]
        assert status["settings"].items() >= {"CONTAINER_ID": 7, "MASTER_TOKEN": "***"}.items()
        assert "master-secret" not in str(worker.lines)
        assert (status["instance"], {line["instance"] for line in worker.lines}) == (7, {7})
        assert [line for line in worker.lines if line["event"] == "unknown_setting"] == [warning]
