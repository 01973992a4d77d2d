"""`nullworker dev`: a fake Vast Serverless on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import click

from nullworker.cli.options import SECONDS, Number
from nullworker.local.dev import run
from nullworker.local.fleet_worker import COMMON, Plan
from nullworker.settings import read_settings
from nullworker.testing import Parameters


def _seconds_or_never(ctx: click.Context, option: click.Parameter, text: str) -> float:
    """Seconds; a negative number is never, as in Vast's parameter of that name."""
    try:
        if (number := float(text)) < 0:
            return number
    except ValueError:
        pass  # 15m is none
    return float(SECONDS.convert(text, option, ctx))


@click.command(context_settings={"show_default": True, "allow_interspersed_args": False})
@click.argument("consumer", metavar="[-- CONSUMER [ARG]...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=8080,
    help="Port of the fake autoscaler, on 127.0.0.1; 0: any free one.",
)
@click.option("--endpoint", default="null", metavar="NAME", help="Name of its only endpoint.")
@click.option(
    "--max-workers", metavar="N", type=click.IntRange(1), default=5, help="Maximum number of workers at a time."
)
@click.option(
    "--min-load",
    metavar="LOAD",
    type=Number(min=0),
    default=0,
    help="Load for which workers run even when nothing is reserved; 100 is one worker.",
)
@click.option(
    "--cold-workers",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="Number of stopped workers to keep. A kept worker starts again with the same id and log.",
)
@click.option(
    "--target-util",
    metavar="SHARE",
    type=Number(0, 1, min_open=True),
    default=1.0,
    help="Share of the running workers' capacity to use; 1: no spare worker.",
)
@click.option(
    "--max-queue-time",
    type=SECONDS,
    default=1,
    help="Load of a worker, in seconds of work, above which it gets no further request.",
)
@click.option(
    "--target-queue-time",
    type=SECONDS,
    default=0.5,
    help="Load of all running workers, in seconds of work, above which one is added.",
)
@click.option(
    "--inactivity-timeout",
    "--inactivity",
    metavar="SECONDS",
    callback=_seconds_or_never,
    default="10",
    help="Time after which an idle worker is stopped; -1: never.",
)
@click.option(
    "--engine",
    type=click.Choice(["strict", "may-2026"]),
    default="strict",
    help="strict: scale as Vast documents it. may-2026: also show what was seen of Vast's engine in May 2026: a held "
    "worker that reports no cur_perf counts for less and less, and no third worker is started while two are held at "
    "exactly 100 % load.",
)
@click.option("--loading-timeout", type=SECONDS, default=60, help="Time within which a started worker must be ready.")
@click.option(
    "--worker-port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=3000,
    help="External port of the first worker, the next ones follow; 0: any free ones.",
)
@click.option(
    "--control-port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=18999,
    help="Control port of the first worker, the next ones follow; 0: any free ones.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the workers' event logs and output here.  [default: a temporary folder, removed at the end]",
)
def dev(
    *,
    consumer: tuple[str, ...],
    port: int,
    endpoint: str,
    max_workers: int,
    min_load: float,
    cold_workers: int,
    target_util: float,
    max_queue_time: float,
    target_queue_time: float,
    inactivity_timeout: float,
    engine: str,
    loading_timeout: float,
    worker_port: int,
    control_port: int,
    folder: Path | None,
) -> None:
    """Run a fake Vast Serverless on this machine: real workers, started on demand, for your own client and consumer.

    CONSUMER runs beside each worker, in this folder, with NULL_CONTROL_PORT set, and HEALTH_PORT, a free port for its
    health endpoint. Workers take their settings from this environment. The options for scaling have Vast's names.
    This is a tool for tests; in production, Vast does the scaling. Ctrl-C stops all workers in order; a second Ctrl-C
    cancels what they hold.

    \b
    Example:
      nullworker dev -- nullworker work -- ./job.sh
    """
    settings = read_settings(
        {**os.environ, **COMMON, "CONTAINER_ID": "1", "WORKER_PORT": "0", "NULL_CONTROL_PORT": "0"}
    )
    if consumer and shutil.which(consumer[0]) is None:
        raise click.UsageError(f"there is no command {consumer[0]!r}: give a path, or set PATH")
    parameters = Parameters(
        min_load=min_load,
        max_workers=max_workers,
        cold_workers=cold_workers,
        target_util=target_util,
        max_queue_time=max_queue_time,
        target_queue_time=target_queue_time,
        inactivity_timeout=inactivity_timeout,
    )
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nullworker-dev-")))
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            folder.absolute(),
            os.environ,
            perf=settings.null_max_perf,
            drain=settings.null_drain_seconds,
            consumer=consumer,
            consumer_folder=Path.cwd(),
            first_port=worker_port,
            first_control_port=control_port,
            loading=loading_timeout,
        )
        asyncio.run(run(port, endpoint, parameters, plan, engine=engine))
