"""The `nullworker` command and its table of subcommands. Each subcommand imports only what it needs.

Errors are one line on stderr that says what to do. Exit codes: 0 done, 1 failed, 2 wrong use or settings.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Final

import click

from nullworker import __version__
from nullworker.errors import BadSettings, NullworkerError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Name of a command: its line in `nullworker --help`, and its module and function.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("Run the worker.", "nullworker.cli.serve:serve"),
    "reserve": ("Reserve a worker, with the official vastai client.", "nullworker.cli.reserve:reserve"),
    "dispatch": ("Keep as many workers reserved as a queue needs.", "nullworker.cli.dispatch:dispatch"),
    "work": ("Run a command once for each reservation.", "nullworker.cli.work:work"),
    "status": ("Show the state of the worker.", "nullworker.cli.control:status"),
    "release": ("End the held reservation.", "nullworker.cli.control:release"),
    "extend": ("Move the deadline of the held reservation.", "nullworker.cli.control:extend"),
    "wait": ("Wait until a reservation is held.", "nullworker.cli.control:wait"),
    "history": ("List the reservations in the event log.", "nullworker.cli.history:history"),
    "events": ("List the events in the event log.", "nullworker.cli.history:events"),
    "prune": ("Remove old reservations from the event log.", "nullworker.cli.prune:prune"),
    "collect": ("Keep the events of all workers in one database.", "nullworker.cli.collect:collect"),
    "demo": ("Show the whole system at work on this machine, without an account.", "nullworker.cli.demo:demo"),
    "dev": ("Run a fake Vast Serverless on this machine, for tests.", "nullworker.cli.dev:dev"),
    "doctor": ("Check this machine and an endpoint's parameters.", "nullworker.cli.doctor:doctor"),
}

#: For whom the commands are, in the order of `nullworker --help`.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Worker": ("serve", "status", "history", "events"),
    "Consumer": ("work", "wait", "extend", "release"),
    "Caller": ("reserve",),
    "Fleet": ("dispatch", "collect"),
    "Tools": ("demo", "dev", "doctor", "prune"),
}


class _Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][1].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but the error for a misspelled command names the nearest one."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"there is no command {args[0]!r}" + (f": is {near[0]!r} meant?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, COMMANDS))
        for group, names in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(longest), COMMANDS[name][0]) for name in names if name in COMMANDS])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands without their imports: a shell asks at each Tab."""
        from click.shell_completion import CompletionItem

        items = [CompletionItem(name, help=text) for name, (text, _) in COMMANDS.items() if name.startswith(incomplete)]
        return items or click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nullworker")
def cli() -> None:
    """A Vast.ai Serverless worker for people with their own job queue.

    A request holds a worker until your consumer releases it or its time is over. Then Vast scales the endpoint down.

    Start with `nullworker demo`. `nullworker COMMAND --help` describes a command.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run a command, and exit with its code. All entry points end here."""
    try:
        code = cli.main(arguments, prog_name="nullworker", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here a failed write is reported; Python's own flush at exit comes too late
        sys.exit(code)
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
    except OSError as error:
        _forget_stdout()
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has had enough
            sys.exit(1)
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _fail(f"{where}{error.strerror or error}", 1)


def _forget_stdout() -> None:
    """Discard output that could not be written, or Python tries again at exit."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    print(f"nullworker: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
