"""`nullworker doctor`: looks at this machine and, if one is named, at an endpoint, and says what to change.

What it leaves out: the looks themselves (doctor_machine.py, doctor_network.py, doctor_endpoint.py).

The one rule: it changes nothing, and may run beside a worker that holds something.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator

import click

from nullworker.doctor_machine import Machine, look_at_log, look_at_ports, look_at_programs, look_at_template
from nullworker.doctor_network import look_at_certificate, look_at_consumer, look_at_network
from nullworker.errors import BadSettings
from nullworker.finding import Finding, show, warning, wrong
from nullworker.settings import Settings, read_settings


@click.command()
@click.option("--endpoint", metavar="NAME", help="Also look at this endpoint's scaling parameters and workers.")
@click.option(
    "--cost", type=click.FloatRange(min=0, min_open=True), default=100, show_default=True, help="Clients send."
)
@click.option("--autoscaler", metavar="URL", help="A stand-in, in place of Vast.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Of your account at Vast.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
@click.pass_context
def doctor(
    ctx: click.Context, *, endpoint: str | None, cost: float, autoscaler: str | None, api_key: str | None, as_json: bool
) -> None:
    """Check this machine, and with --endpoint an endpoint's scaling parameters; say what to change.

    Run it on the instance, with the environment that the worker has. Exit code 1 when something is wrong.
    """
    if endpoint is not None and autoscaler is None and not api_key:
        raise click.UsageError("no API key for --endpoint: set VAST_API_KEY, or give --api-key")
    findings = list(examine(Machine(), strict=endpoint is None))
    if endpoint is not None:
        from nullworker.doctor_endpoint import look_at_endpoint

        findings += asyncio.run(look_at_endpoint(endpoint, cost=cost, autoscaler=autoscaler, api_key=api_key))
    levels = Counter(each.level for each in findings)
    if as_json:
        click.echo(json.dumps({"ok": not levels["wrong"], "findings": [dataclasses.asdict(each) for each in findings]}))
    else:
        show(findings)
        click.echo(f"\n{levels['wrong']} wrong, {levels['warning']} to think about, {levels['ok']} well")
    ctx.exit(1 if levels["wrong"] else 0)


def examine(machine: Machine, *, strict: bool = True) -> Iterator[Finding]:
    """All about one machine. `strict`: it should be able to run a worker, and is not just where somebody sits."""
    yield from look_at_programs(machine)
    yield from look_at_template(machine)
    try:
        settings = read_settings(machine.environ)
    except BadSettings as error:
        standalone = not machine.environ.get("CONTAINER_ID", "").strip()
        say = wrong if strict or not standalone else warning
        yield say(
            "settings",
            str(error),
            why="nullworker serve exits with code 2, and Vast's supervisor starts it again and again",
            mend="correct it in the template's environment"
            + ("; in a shell on an instance: set -a; . /etc/environment; set +a" if standalone else ""),
        )
        try:
            settings = read_settings({**machine.environ, "UNSECURED": "true"})
        except BadSettings:
            return
    else:
        yield Finding("settings", "ok", "all are allowed")
    yield from look_at_settings(settings)
    yield from look_at_ports(settings)
    yield from look_at_log(machine, settings)
    yield from look_at_certificate(machine, settings)
    yield from look_at_network(machine, settings)
    yield from look_at_consumer(settings)


def look_at_settings(settings: Settings) -> Iterator[Finding]:
    """What is allowed, and still not what an instance should have."""
    if settings.standalone:
        return
    if settings.unsecured:
        yield wrong(
            "signatures",
            "UNSECURED=true on an instance of Vast",
            why="anybody who finds the port can hold this machine, at your cost",
            mend="remove UNSECURED from the template's environment",
        )
    if not settings.master_token:
        yield warning(
            "master token",
            "MASTER_TOKEN is empty",
            why="/pyworker/update answers 401 to everybody, so Vast's rolling update does not reach this worker",
            mend="leave MASTER_TOKEN to Vast's template: it must come from the instance's own environment",
        )
    if settings.public_ipaddr == "127.0.0.1" or settings.vast_tcp_port is None:
        yield wrong(
            "public address",
            f"the worker tells the autoscaler that it is at {settings.own_url}",
            why="clients are sent to this address, and it is not the one that leads here from outside",
            mend=f"let the template open port {settings.worker_port}: Vast then sets PUBLIC_IPADDR and "
            f"VAST_TCP_PORT_{settings.worker_port} itself",
        )
    else:
        yield Finding("public address", "ok", settings.own_url)
