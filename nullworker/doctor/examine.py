"""Runs all checks of `nullworker doctor` in order and collects the findings.

The doctor changes nothing and may run beside a worker that holds a reservation.
"""

from __future__ import annotations

from collections.abc import Iterator

from nullworker.doctor.finding import Finding, failed, warning
from nullworker.doctor.machine import Host, look_at_log, look_at_ports, look_at_programs, look_at_template
from nullworker.doctor.network import look_at_certificate, look_at_consumer, look_at_network
from nullworker.errors import BadSettings
from nullworker.settings import Settings, read_settings, settings_line, unknown_names, unknown_setting


def examine(host: Host, *, strict: bool = True) -> Iterator[Finding]:
    """All findings about a machine. `strict`: it should be able to run a worker; else it may be your own machine."""
    yield from look_at_programs(host)
    yield from look_at_template(host)
    try:
        settings = read_settings(host.environ)
    except BadSettings as error:
        standalone = not host.environ.get("CONTAINER_ID", "").strip()
        say = failed if strict or not standalone else warning
        yield say(
            "settings",
            str(error),
            why="nullworker serve exits with code 2, and Vast's supervisor restarts it repeatedly",
            fix="correct it in the template's environment"
            + ("; in a shell on an instance: set -a; . /etc/environment; set +a" if standalone else ""),
        )
        try:
            settings = read_settings({**host.environ, "UNSECURED": "true"})
        except BadSettings:
            return
    else:
        yield Finding("settings", "ok", f"all are allowed; in force: {settings_line(settings.in_force())}")
    for name, nearest in unknown_names(host.environ).items():
        yield warning(
            "settings",
            unknown_setting(name, nearest),
            why="it has no effect: the setting that is meant keeps its default",
            fix=f"rename it to {nearest}, or remove it" if nearest else "remove it",
        )
    yield from look_at_settings(settings)
    yield from look_at_ports(settings)
    yield from look_at_log(host, settings)
    yield from look_at_certificate(host, settings)
    yield from look_at_network(host, settings)
    yield from look_at_consumer(settings)


def look_at_settings(settings: Settings) -> Iterator[Finding]:
    """Check settings that are allowed but do not suit an instance."""
    if settings.standalone:
        return
    if settings.unsecured:
        yield failed(
            "signatures",
            "UNSECURED=true on an instance of Vast",
            why="anybody who finds the port can hold this machine, at your cost",
            fix="remove UNSECURED from the template's environment",
        )
    if not settings.master_token:
        yield warning(
            "master token",
            "MASTER_TOKEN is empty",
            why="/pyworker/update answers 401 to everybody, so Vast's rolling update does not reach this worker",
            fix="leave MASTER_TOKEN to Vast's template: it must come from the instance's own environment",
        )
    if settings.public_ipaddr == "127.0.0.1" or settings.vast_tcp_port is None:
        yield failed(
            "public address",
            f"the worker reports its address as {settings.own_url}",
            why="the autoscaler sends clients to this address, which cannot be reached from outside",
            fix=f"let the template open port {settings.worker_port}: Vast then sets PUBLIC_IPADDR and "
            f"VAST_TCP_PORT_{settings.worker_port} itself",
        )
    else:
        yield Finding("public address", "ok", settings.own_url)
