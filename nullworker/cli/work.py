"""`nullworker work -- CMD ...`: runs CMD for each reservation, as a consumer in any language."""

from __future__ import annotations

import asyncio
import shutil

import click

from nullworker import logs
from nullworker.cli.options import SECONDS, with_control
from nullworker.consumer.reservations import PATIENCE_SECONDS
from nullworker.consumer.work import Work, run
from nullworker.control_client import ControlClient


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--kill-after",
    metavar="SECONDS",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="Between SIGTERM and SIGKILL. Vast's supervisor kills after 10 s.",
)
@click.option("--extend", is_flag=True, help="While CMD runs, extend a request too, as is done for a session.")
@click.option(
    "--until",
    metavar="CODE",
    type=click.IntRange(1, 255),
    help='Run CMD again in the same reservation until it exits with CODE, "the queue is empty".',
)
@click.option(
    "--idle", metavar="SECONDS", type=SECONDS, default=0.0, help="With --until: how long an empty queue is asked again."
)
@click.option("--run-timeout", metavar="SECONDS", type=SECONDS, help="End a CMD that runs for longer: exit code 124.")
@click.option("--health-port", type=click.IntRange(0, 65535), help="Serve GET /health here, for BACKEND_HEALTH_URL.")
@click.option(
    "--patience",
    metavar="SECONDS",
    type=SECONDS,
    default=PATIENCE_SECONDS,
    show_default=True,
    help="How long the worker may not answer before CMD is ended.",
)
@click.option("--log-format", envvar="NULL_LOG_FORMAT", type=click.Choice(["console", "json"]), default="console")
@click.option(
    "--log-level", envvar="NULL_LOG_LEVEL", type=click.Choice(["debug", "info", "warning", "error"]), default="info"
)
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
    its environment. When the reservation ends first, CMD and its process group get SIGTERM, then SIGKILL. SIGTERM to
    this command does the same and releases the reservation; a second SIGTERM kills at once.
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
