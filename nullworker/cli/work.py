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
@click.option("--extend", is_flag=True, help="Extend the reservation for as long as CMD runs.")
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
    logs.configure(log_format, log_level)

    async def start() -> None:
        await run(Work(command, control.url, kill_after=kill_after, extend=extend, patience=patience), health_port)

    asyncio.run(start())
