"""`nullworker serve`: the worker, with an option for each setting."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from nullworker.settings import Settings, read_settings, unknown_names, variable


def _option_name(field: str) -> str:
    return "--" + field.removeprefix("null_").replace("_", "-")


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting. Values stay texts here; settings.py parses them like the environment's."""
    for field in reversed(dataclasses.fields(Settings)):
        kind = field.metadata["kind"]
        default = "unset" if field.default is None else _shown(field.default)
        command = click.option(
            _option_name(field.name),
            field.name,
            metavar="TEXT",
            help=f"{field.metadata['help']}; {kind.allowed}  [env: {variable(field.name)}; default: {default}]",
        )(command)
    return command


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

    Every option is also an environment variable; an option wins over the variable. SIGTERM and SIGINT stop the worker:
    it refuses new reservations, lets the held one finish for up to --drain-seconds, and sends its last reports.
    """
    values = dict(os.environ)
    port = options.get("worker_port") or values.get("WORKER_PORT", "").strip() or "3000"
    for name, text in options.items():
        if text is not None:
            values[variable(name).replace("<WORKER_PORT>", port)] = text
    settings = read_settings(values)

    from nullworker.worker import serve as run_worker

    sys.exit(run_worker(settings, unknown_names(os.environ)))
