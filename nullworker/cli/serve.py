"""`nullworker serve`: the worker, with an option for each setting."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from nullworker.settings import Kind, Settings, read_settings, unknown_names, variable


def _option_name(field: str) -> str:
    return "--" + field.removeprefix("null_").replace("_", "-")


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting. Values stay texts here; settings.py parses them like the environment's."""
    for field in reversed(dataclasses.fields(Settings)):
        kind: Kind = field.metadata["kind"]
        bounds = f"; {kind.bounds}" if kind.bounds else ""
        default = "unset" if field.default is None else _shown(field.default)
        command = click.option(
            _option_name(field.name),
            field.name,
            metavar=kind.metavar,
            help=f"{field.metadata['help']}{bounds}  [env: {variable(field.name)}; default: {default}]",
            shell_complete=_completing(kind.words),
        )(command)
    return command


def _completing(words: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """The `shell_complete` of an option whose value is one of `words`."""
    return lambda ctx, param, incomplete: [word for word in words if word.startswith(incomplete)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


@click.command()
@_with_settings
def serve(**options: str | None) -> None:
    """Run the worker: hold one reservation at a time until the consumer releases it.

    Every option is also an environment variable; an option takes precedence. Seconds may be written as 90, 15m, 6h or
    30d. SIGTERM and SIGINT stop the worker: it refuses new reservations, lets the held one finish for up to
    --drain-seconds, and sends its last reports.

    \b
    For a trial on this machine:
      UNSECURED=true nullworker serve
    """
    values = dict(os.environ)
    port = options.get("worker_port") or values.get("WORKER_PORT", "").strip() or "3000"
    for name, text in options.items():
        if text is not None:
            values[variable(name).replace("<WORKER_PORT>", port)] = text
    settings = read_settings(values)

    from nullworker.worker import serve as run_worker

    sys.exit(run_worker(settings, unknown_names(os.environ)))
