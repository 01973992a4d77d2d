"""`nullworker doctor`: checks this machine and an endpoint, changes nothing, and says what to change."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from typing import Final

import click

from nullworker.cli.options import COST
from nullworker.cli.words import folded
from nullworker.doctor.examine import examine
from nullworker.doctor.finding import Finding, Level
from nullworker.doctor.machine import Host

#: Columns in front of the text of a finding.
_INDENT: Final = 28
_COUNTED: Final[tuple[Level, ...]] = ("error", "warning")
_COLOURS: Final = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@click.option("--endpoint", metavar="NAME", help="Also check this endpoint's scaling parameters and workers.")
@click.option(
    "--cost",
    metavar="N",
    type=COST,
    default=100,
    show_default=True,
    help="Workload that your clients send with each request (their `cost`).",
)
@click.option("--autoscaler", metavar="URL", help="Fake autoscaler to use instead of Vast, such as `nullworker dev`.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Your API key at Vast.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.pass_context
def doctor(
    ctx: click.Context, *, endpoint: str | None, cost: float, autoscaler: str | None, api_key: str | None, as_json: bool
) -> None:
    """Check this machine, and with --endpoint an endpoint's scaling parameters, and say what to change.

    Run it on the instance, with the environment of the worker. It changes nothing. The exit code is 1 if there is an
    error.
    """
    if endpoint is not None and autoscaler is None and not api_key:
        raise click.UsageError("no API key for --endpoint: set VAST_API_KEY, or give --api-key")
    findings = list(examine(Host(), strict=endpoint is None))
    if endpoint is not None:
        from nullworker.doctor.endpoint import look_at_endpoint

        findings += asyncio.run(look_at_endpoint(endpoint, cost=cost, autoscaler=autoscaler, api_key=api_key))
    levels = Counter(finding.level for finding in findings)
    if as_json:
        details = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"ok": not levels["error"], "findings": details}))
    else:
        show(findings)
        counts = [f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in _COUNTED]
        click.echo(f"\n{', '.join(counts)}, {levels['ok']} ok")
    ctx.exit(1 if levels["error"] else 0)


def show(findings: Iterable[Finding]) -> None:
    """Print one line for a finding that is ok, and why and how to fix it for all others."""
    for finding in findings:
        parts = {finding.check: finding.what}
        if finding.level != "ok":
            parts |= {"why": finding.why, "fix": finding.fix}
        for number, (name, text) in enumerate(parts.items()):
            level = "" if number else finding.level
            first, *rest = folded(text, _INDENT)
            click.echo(f"{click.style(f'{level:<8}', fg=_COLOURS[finding.level])} {name:<18} {first}")
            for line in rest:
                click.echo(f"{'':<{_INDENT}}{line}")
