"""`nullworker doctor` on a machine: each finding is provoked once, and a healthy machine has none."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import WorkerProcess, secured
from instances import NOW, Well, consumer, found, the_only
from programs import free_port

from nullworker.clock import SystemClock
from nullworker.eventlog.opening import open_log
from nullworker.testing import FakeAutoscaler


@pytest.fixture
async def well(tmp_path: Path, vast: FakeAutoscaler) -> AsyncIterator[Well]:
    async with consumer() as health:
        yield Well(tmp_path, vast, health)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program has; the one before it is free."""
    with socket.create_server(("127.0.0.1", free_port())) as sock:
        yield int(sock.getsockname()[1])


async def test_every_check_of_a_healthy_instance_is_ok(well: Well) -> None:
    findings = await found(well.machine())
    assert [each for each in findings if each.level != "ok"] == []
    assert [each.check for each in findings] == [
        *("python", "packages", "settings", "public address", "ports", "ports", "ports", "event log", "file system"),
        *("disk", "certificate", "autoscaler", "clock", "consumer"),
    ]


# ---- programs and template ----


async def test_an_old_python(well: Well) -> None:
    finding = the_only(await found(replace(well.machine(), python=(3, 9, 18))), "python")
    assert (finding.level, finding.what) == ("error", "Python 3.9.18")
    assert "uv venv -p 3.10" in finding.fix


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("cryptography", "50.0.2", "vastai needs cryptography==49.0.0, not 50.0.2"),
        ("aiohttp", "3.13.0", "nullworker needs aiohttp<4,>=3.14, not 3.13.0"),
        ("msgspec", None, "nullworker needs msgspec>=0.19, not none"),
    ],
)
async def test_a_package_that_is_not_what_vastai_or_we_need(
    well: Well, package: str, version: str | None, words: str
) -> None:
    def version_of(name: str) -> str:
        if name != package:
            return importlib.metadata.version(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    finding = the_only(await found(replace(well.machine(), version_of=version_of)), "packages")
    assert finding.level == "error"
    assert words in finding.what.split("; ")
    assert "requirements.txt vastai && uv pip check" in finding.fix


async def test_a_backend_without_a_token(well: Well) -> None:
    finding = the_only(await found(well.machine(BACKEND="null")), "template")
    assert (finding.level, finding.what) == ("error", "BACKEND=null without HF_TOKEN")


# ---- settings ----


async def test_a_bad_setting_skips_the_checks_that_need_it(well: Well) -> None:
    findings = await found(well.machine(NULL_MAX_PERF="0"))
    assert "NULL_MAX_PERF='0' is not allowed" in the_only(findings, "settings").what
    assert findings[-1].check == "settings"


async def test_a_shell_without_the_instances_environment(well: Well) -> None:
    finding = next(each for each in await found(well.machine(CONTAINER_ID="")) if each.check == "settings")
    assert finding.level == "error"
    assert ". /etc/environment" in finding.fix


async def test_unsecured_on_an_instance(well: Well) -> None:
    assert the_only(await found(well.machine(UNSECURED="true")), "signatures").level == "error"


async def test_no_master_token(well: Well) -> None:
    assert the_only(await found(well.machine(MASTER_TOKEN="")), "master token").level == "warning"


@pytest.mark.parametrize("unset", ["PUBLIC_IPADDR", "VAST_TCP_PORT"])
async def test_a_public_address_that_is_not_set(well: Well, unset: str) -> None:
    name = unset if unset == "PUBLIC_IPADDR" else f"VAST_TCP_PORT_{well.port}"
    finding = the_only(await found(well.machine(**{name: ""})), "public address")
    assert finding.level == "error"
    assert f"open port {well.port}" in finding.fix


# ---- ports and workers ----


@pytest.mark.parametrize("variable", ["WORKER_PORT", "NULL_CONTROL_PORT", "WORKER_HTTP_PORT"])
async def test_a_port_taken_by_another_program(well: Well, taken: int, variable: str) -> None:
    finding = the_only(await found(well.machine(**{variable: str(taken), f"VAST_TCP_PORT_{taken}": "40123"})), "ports")
    assert finding.level == "error"
    assert finding.what.startswith(f"{variable}: ")
    assert f"ss -ltnp 'sport = :{taken}'" in finding.fix


async def test_a_taken_default_port_for_session_ends_is_a_warning(well: Well, taken: int) -> None:
    env = {"WORKER_PORT": str(taken - 1), f"VAST_TCP_PORT_{taken - 1}": "40123", "WORKER_HTTP_PORT": ""}
    assert the_only(await found(well.machine(**env)), "ports").level == "warning"


async def test_a_running_worker_holds_its_ports(well: Well, vast: FakeAutoscaler, tmp_path: Path) -> None:
    async with secured(tmp_path, vast) as worker:
        await worker.line("key_loaded")
        port = str(worker.control_port)
        findings = await found(well.machine(WORKER_PORT=str(worker.port), NULL_CONTROL_PORT=port))
    assert [each.what for each in findings if each.check == "worker"] == [
        f"a worker runs and is ready; its control port is {worker.control}"
    ]
    assert not [each for each in findings if each.check in ("ports", "second worker")]


async def test_a_worker_that_runs_and_is_not_ready(well: Well, tmp_path: Path) -> None:
    async with consumer(503) as health, WorkerProcess(tmp_path, BACKEND_HEALTH_URL=health) as worker:
        finding = the_only(await found(well.machine(NULL_CONTROL_PORT=str(worker.control_port))), "worker")
    assert (finding.level, "a worker runs and is starting" in finding.what) == ("error", True)
    assert f"curl -s {worker.control}/readyz" in finding.fix


async def test_a_second_worker_on_one_log(well: Well, tmp_path: Path) -> None:
    log = open_log(tmp_path / "nullworker-7.db")
    finding = the_only(await found(well.machine()), "second worker")
    log.close()
    assert f"pid {os.getpid()}" in finding.what
    assert [each for each in await found(well.machine()) if each.level != "ok"] == []


# ---- log and disk ----


async def test_a_log_in_a_folder_that_cannot_be_written(well: Well) -> None:
    finding = the_only(await found(well.machine(NULL_EVENT_LOG="/proc/nullworker.db")), "event log")
    assert finding.level == "error"
    assert "NULL_EVENT_LOG" in finding.fix


async def test_a_log_that_is_a_database_of_another_program(well: Well, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "nullworker-7.db")) as conn:
        conn.execute("CREATE TABLE somebody_elses (a)")
    assert "another program" in the_only(await found(well.machine()), "event log").what


async def test_a_log_on_a_network_file_system(well: Well) -> None:
    well.mounts.write_text(f"overlay / overlay rw 0 0\nserver:/x {well.folder} nfs4 rw 0 0\n")
    finding = the_only(await found(well.machine()), "file system")
    assert (finding.level, "nfs4" in finding.what) == ("error", True)


@pytest.mark.parametrize(("free", "level"), [(50 * 10**6, "error"), (500 * 10**6, "warning")])
async def test_a_disk_that_is_almost_full(well: Well, free: int, level: str) -> None:
    finding = the_only(await found(replace(well.machine(), free_bytes=lambda path: free)), "disk")
    assert finding.level == level


# ---- certificate ----


async def test_no_certificate(well: Well) -> None:
    well.certificate.unlink()
    assert the_only(await found(well.machine()), "certificate").level == "error"


async def test_a_key_of_another_certificate(well: Well) -> None:
    certificate = well.certificate.read_bytes()
    well.sign(timedelta(days=90))
    well.certificate.write_bytes(certificate)
    assert "does not belong to" in the_only(await found(well.machine()), "certificate").what


async def test_a_self_signed_certificate(well: Well) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.fromtimestamp(NOW, timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=90))
    ).sign(key, hashes.SHA256())
    well.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    well.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert "is self-signed" in the_only(await found(well.machine()), "certificate").what


async def test_a_certificate_that_the_base_image_has_signed_itself(well: Well) -> None:
    (well.folder / "mark").touch()
    assert "is self-signed" in the_only(await found(well.machine()), "certificate").what


@pytest.mark.parametrize(("days", "level"), [(-1, "error"), (3, "warning")])
async def test_a_certificate_about_to_expire(well: Well, days: int, level: str) -> None:
    well.sign(timedelta(days=days))
    assert the_only(await found(well.machine()), "certificate").level == level


async def test_an_instance_without_tls(well: Well) -> None:
    assert the_only(await found(well.machine(USE_SSL="false")), "certificate").level == "warning"


# ---- the network ----


async def test_an_autoscaler_that_does_not_answer(well: Well) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    finding = the_only(await found(well.machine(REPORT_ADDR=address)), "autoscaler")
    assert finding.level == "error"
    assert f"curl -v {address}/pubkey/" in finding.fix


async def test_one_of_two_addresses_does_not_answer(well: Well, vast: FakeAutoscaler) -> None:
    addresses = f"http://127.0.0.1:{free_port()},{vast.url}"
    assert the_only(await found(well.machine(REPORT_ADDR=addresses)), "autoscaler").level == "warning"


async def test_an_autoscaler_key_that_is_no_key(well: Well) -> None:
    async def nonsense(_: web.Request) -> web.Response:
        return web.Response(text="no key")

    app = web.Application()
    app.router.add_get("/pubkey/", nonsense)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    finding = the_only(await found(well.machine(REPORT_ADDR=address)), "autoscaler")
    await runner.cleanup()
    assert finding.level == "error"


@pytest.mark.parametrize(("ahead", "words"), [(120.0, "120 s ahead of"), (-120.0, "s behind")])
async def test_a_clock_that_is_wrong(well: Well, ahead: float, words: str) -> None:
    machine = replace(well.machine(), now=lambda: SystemClock().now() + ahead)
    assert words.partition(" ")[2] in the_only(await found(machine), "clock").what


async def test_a_consumer_that_does_not_answer(well: Well) -> None:
    url = f"http://127.0.0.1:{free_port()}/health"
    finding = the_only(await found(well.machine(BACKEND_HEALTH_URL=url)), "consumer")
    assert (finding.level, f"curl -i {url}" in finding.fix) == ("error", True)


@pytest.mark.parametrize("status", [503, 302, 204])
async def test_a_consumer_that_answers_something_else(well: Well, status: int) -> None:
    async with consumer(status) as url:
        assert the_only(await found(well.machine(BACKEND_HEALTH_URL=url)), "consumer").level == "error"


async def test_a_consumer_without_a_health_url(well: Well) -> None:
    assert the_only(await found(well.machine(BACKEND_HEALTH_URL="")), "consumer").level == "warning"
