"""`nullworker work -- CMD ...`: runs CMD for each reservation, as a consumer in any language."""

from __future__ import annotations

import asyncio
import shutil

import click

from nullworker import logs
from nullworker.cli.options import SECONDS, log_format, log_level, with_control
from nullworker.consumer.reservations import PATIENCE_SECONDS
from nullworker.consumer.work import Work, run
from nullworker.control_client import ControlClient


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--kill-after",
    metavar="SECONDS",
    type=SECONDS,
    default="5",
    show_default=True,
    help="Time from SIGTERM to SIGKILL for a CMD that must end. Vast's supervisor kills after 10 s.",
)
@click.option(
    "--extend",
    is_flag=True,
    help="Extend the deadline of a request for as long as CMD runs. A session is always extended.",
)
@click.option(
    "--until",
    metavar="CODE",
    type=click.IntRange(1, 255),
    help='Run CMD again and again in the same reservation. Exit code CODE means "the queue is empty": release.',
)
@click.option(
    "--idle",
    metavar="SECONDS",
    type=SECONDS,
    default="0",
    show_default=True,
    help="With --until: time for which an empty queue is polled again, before the release.",
)
@click.option(
    "--run-timeout",
    metavar="SECONDS",
    type=SECONDS,
    help="End a CMD that runs for longer; its exit code is 124.  [default: no limit]",
)
@click.option(
    "--health-port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    help="Serve GET /health on this port of 127.0.0.1, for the worker's BACKEND_HEALTH_URL; 0: any free one.  "
    "[default: none]",
)
@click.option(
    "--patience",
    metavar="SECONDS",
    type=SECONDS,
    default=f"{PATIENCE_SECONDS:g}",
    show_default=True,
    help="Time for which the worker may be silent before CMD is ended.",
)
@log_format
@log_level
@with_control
def work(
    command: tuple[str, ...],
    control: ControlClient,
    kill_after: float,
    extend: bool,
    until: int | None,
    idle: float,
    run_timeout: float | None,
    health_port: int | None,
    patience: float,
    log_format: str,
    log_level: str,
) -> None:
    """Run CMD once for each reservation. Its exit releases the reservation, with the exit code as the result.

    CMD has NULLWORKER_RESERVATION_ID, NULLWORKER_RESERVATION_DEADLINE and NULLWORKER_RESERVATION_METADATA (JSON) in
    its environment. If the reservation ends first, CMD and its process group get SIGTERM, then SIGKILL. SIGTERM to
    this command does the same and releases the reservation; a second SIGTERM kills at once. Seconds may be written as
    90, 15m or 6h.

    \b
    Example:
      nullworker work --until 3 --idle 30s -- python job.py
    """
    if shutil.which(command[0]) is None:
        raise click.UsageError(f"there is no command {command[0]!r}: give a path, or set PATH")
    if idle and until is None:
        raise click.UsageError("--idle needs --until, the exit code with which CMD says that the queue is empty")
    logs.configure(log_format, log_level)

    async def start() -> None:
        runs = Work(
            command,
            control.url,
            kill_after=kill_after,
            extend=extend,
            patience=patience,
            until=until,
            idle=idle,
            run_timeout=run_timeout,
        )
        await run(runs, health_port)

    asyncio.run(start())
