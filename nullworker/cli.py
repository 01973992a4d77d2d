"""The command line. Each command imports only what it needs: `nullworker release` must not pay for a web server.

Errors are one line on stderr that says what to do; exit codes: 0 done, 1 failed, 2 wrong use or settings.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import click

from nullworker import __version__
from nullworker.errors import BadSettings, NullworkerError

#: Command, its line in `nullworker --help`, and where it is.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("Run the worker.", "nullworker.cli:serve"),
    "reserve": ("Reserve a worker, with the official vastai client.", "nullworker.client:reserve"),
    "work": ("Run a command once for each reservation.", "nullworker.work:work"),
    "status": ("What the worker knows of itself now.", "nullworker.commands:status"),
    "release": ("End the held reservation.", "nullworker.commands:release"),
    "extend": ("Move the deadline of the held reservation.", "nullworker.commands:extend"),
    "wait": ("Wait until a reservation is held.", "nullworker.commands:wait"),
    "history": ("The reservations in the log.", "nullworker.commands_log:history"),
    "events": ("The events in the log.", "nullworker.commands_log:events"),
    "prune": ("Remove old reservations from the log.", "nullworker.prune:prune"),
    "demo": ("See the whole story on this machine.", "nullworker.demo:demo"),
    "dev": ("A stand-in for Vast Serverless on this machine.", "nullworker.dev:dev"),
    "doctor": ("Check this machine, and an endpoint's parameters.", "nullworker.doctor:doctor"),
}


class _Commands(click.Group):
    """Commands that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][1].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nullworker")
def cli() -> None:
    """A Vast.ai Serverless worker for people with their own job queue.

    A request comes in and you get a worker; release, and it scales back down.
    """


def _option_name(field: str) -> str:
    return "--" + field.removeprefix("null_").replace("_", "-")


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting. They are all texts here: settings.py reads them, wherever they come from."""
    from nullworker.settings import Settings, variable

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
    new reservations are refused, the held one may finish for --drain-seconds, the last reports are sent.
    """
    from nullworker.settings import read_settings, variable

    values = dict(os.environ)
    port = options.get("worker_port") or values.get("WORKER_PORT", "").strip() or "3000"
    for name, text in options.items():
        if text is not None:
            values[variable(name).replace("<WORKER_PORT>", port)] = text
    settings = read_settings(values)

    from nullworker.process import serve as run_worker

    sys.exit(run_worker(settings))


def main(arguments: list[str] | None = None) -> None:
    """The entry point of every door. Never returns."""
    try:
        sys.exit(cli.main(arguments, prog_name="nullworker", standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if not (arguments or sys.argv[1:]):
            click.echo(cli.get_help(click.Context(cli, info_name="nullworker")), err=True)
            sys.exit(error.exit_code)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nullworker"
        _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except BadSettings as error:
        _fail(str(error), 2)
    except NullworkerError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"nullworker: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
