"""`nullworker doctor`: checks this machine and an endpoint, changes nothing, and says what to change."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from typing import Final

import click

from nullworker.doctor.examine import examine
from nullworker.doctor.finding import Finding
from nullworker.doctor.machine import Host

_COLOURS: Final = {"ok": "green", "warning": "yellow", "wrong": "red"}


@click.command()
@click.option("--endpoint", metavar="NAME", help="Also check this endpoint's scaling parameters and workers.")
@click.option(
    "--cost",
    type=click.FloatRange(min=0, min_open=True),
    default=100,
    show_default=True,
    help="Sent by clients.",
)
@click.option("--autoscaler", metavar="URL", help="A fake autoscaler instead of Vast.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Your API key at Vast.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
@click.pass_context
def doctor(
    ctx: click.Context, *, endpoint: str | None, cost: float, autoscaler: str | None, api_key: str | None, as_json: bool
) -> None:
    """Check this machine, and with --endpoint an endpoint's scaling parameters, and say what to change.

    Run it on the instance, with the environment of the worker. The exit code is 1 if there is an error.
    """
    if endpoint is not None and autoscaler is None and not api_key:
        raise click.UsageError("no API key for --endpoint: set VAST_API_KEY, or give --api-key")
    findings = list(examine(Host(), strict=endpoint is None))
    if endpoint is not None:
        from nullworker.doctor.endpoint import look_at_endpoint

        findings += asyncio.run(look_at_endpoint(endpoint, cost=cost, autoscaler=autoscaler, api_key=api_key))
    levels = Counter(each.level for each in findings)
    if as_json:
        click.echo(json.dumps({"ok": not levels["wrong"], "findings": [dataclasses.asdict(each) for each in findings]}))
    else:
        show(findings)
        click.echo(f"\n{levels['wrong']} wrong, {levels['warning']} to think about, {levels['ok']} well")
    ctx.exit(1 if levels["wrong"] else 0)


def show(findings: Iterable[Finding]) -> None:
    """Print one line for each finding, and its reason and fix if it is not ok."""
    for each in findings:
        level = click.style(f"{each.level:<8}", fg=_COLOURS[each.level])
        click.echo(f"{level} {each.check:<18} {each.what}")
        if each.level != "ok":
            click.echo(f"{'':<9}{'why':<18} {each.why}\n{'':<9}{'fix':<18} {each.fix}")
