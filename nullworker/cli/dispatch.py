"""`nullworker dispatch`: its options, and one dispatcher from start to exit code."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from nullworker import logs
from nullworker.aio import Interrupted, on_signals, run_until_signalled
from nullworker.cli.options import (
    COST,
    SECONDS,
    Number,
    Seconds,
    json_object,
    log_format,
    log_level,
    warn_of_unknown_variables,
)
from nullworker.client.vastai_sdk import STAND_IN_KEY
from nullworker.clock import SystemClock
from nullworker.dispatch.decision import Policy
from nullworker.dispatch.dispatcher import Dispatcher, Plan, running
from nullworker.dispatch.driver import Terms
from nullworker.dispatch.ledger import Ledger, open_ledger
from nullworker.dispatch.limits import Limits
from nullworker.dispatch.queues.local import CommandQueue
from nullworker.dispatch.queues.opening import open_queue
from nullworker.dispatch.queues.reading import Queue
from nullworker.dispatch.vast import Vast
from nullworker.errors import BadSettings, CannotStart
from nullworker.settings import is_absolute_http_url

#: Bytes of metadata that a worker takes, less what the claim's id needs.
METADATA_BYTES = 4096 - 64
POSITIVE_SECONDS = Seconds(more_than_0=True)


def _option(*names: str, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that is also an environment variable: --queue is NULL_QUEUE, --min is NULL_DISPATCH_MIN."""
    short = names[0].removeprefix("--").replace("-", "_").upper()
    variable = attributes.pop("variable", f"NULL_DISPATCH_{short}")
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


def _metadata(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, Any] | None:
    parsed = json_object(ctx, param, text)
    if parsed is None:
        return None
    if len(json.dumps(parsed)) > METADATA_BYTES:
        raise click.BadParameter(f"it is longer than {METADATA_BYTES} bytes")
    return parsed


@click.command(short_help="Keep as many workers reserved as a queue needs.", context_settings={"show_default": True})
@_option("--endpoint", metavar="NAME", help="Name of the endpoint at Vast.  [required]")
@_option(
    "--queue",
    metavar="URL",
    variable="NULL_QUEUE",
    help="The queue: redis://, nats://, amqp://, sqs:// or sqlite://; docs/dispatch.md has each form.",
)
@_option(
    "--command",
    metavar="CMD",
    help="For any other queue: a command that prints one or two numbers, waiting and in flight.",
)
@_option(
    "--max",
    "most",
    metavar="N",
    type=click.IntRange(1),
    help="Maximum number of workers held.  [required]",
    variable="NULL_DISPATCH_MAX",
)
@_option("--min", "least", metavar="N", type=click.IntRange(0), default=0, help="Minimum number of workers held.")
@_option(
    "--jobs-per-worker",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    help="Jobs for which one worker is held. More than 1 needs consumers that stay, such as work --until.",
)
@_option("--interval", type=POSITIVE_SECONDS, default=5.0, help="Time between two polls of the queue.")
@_option(
    "--settle",
    type=SECONDS,
    default=10.0,
    help="Time within which a new hold takes its job; one that ends sooner and did none delays the next.",
)
@_option(
    "--lifetime",
    type=POSITIVE_SECONDS,
    default=300.0,
    help="Time that a session without a consumer survives the death of this process.",
)
@_option(
    "--attach", type=SECONDS, default="15m", help="Time within which a consumer must attach; 0: none ever attaches."
)
@_option("--stall", type=POSITIVE_SECONDS, default="10m", help="Time after which a claim without a worker is reported.")
@_option(
    "--cost",
    metavar="N",
    type=COST,
    default=100,
    help="Workload of one hold; should equal the workers' NULL_MAX_PERF.",
)
@_option("--metadata", metavar="JSON", callback=_metadata, help="A JSON object for each consumer, up to 4 KiB.")
@_option(
    "--max-hours-per-day",
    metavar="HOURS",
    type=Number(min=0, min_open=True),
    help="Limit on held time, over the last 24 hours.",
)
@_option(
    "--max-dollars-per-day",
    metavar="DOLLARS",
    type=Number(min=0, min_open=True),
    help="Limit on the cost of held time, over the last 24 hours.",
)
@_option(
    "--price",
    metavar="DOLLARS",
    type=Number(min=0),
    help="Price of an instance per hour.  [default: each instance's own, from Vast]",
)
@_option(
    "--at-limit",
    type=click.Choice(["wait", "end"]),
    default="wait",
    help="At a limit: open nothing new (wait), or also end what is held (end).",
)
@_option(
    "--ledger",
    type=click.Path(dir_okay=False, path_type=Path),
    default="nullworker-dispatch.db",
    help="SQLite file with all claims.",
)
@_option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=18996,
    help="Port of /status, /readyz and /metrics, on 127.0.0.1; 0: any free one.",
)
@_option("--autoscaler", metavar="URL", help="Fake autoscaler to use instead of Vast, such as `nullworker dev`.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Your API key at Vast.")
@log_format
@log_level
@click.option("--end-all", is_flag=True, help="End every session in the ledger, and exit.")
def dispatch(
    *,
    endpoint: str | None,
    queue: str | None,
    command: str | None,
    most: int | None,
    least: int,
    jobs_per_worker: int,
    interval: float,
    settle: float,
    lifetime: float,
    attach: float,
    stall: float,
    cost: float,
    metadata: dict[str, Any] | None,
    max_hours_per_day: float | None,
    max_dollars_per_day: float | None,
    price: float | None,
    at_limit: Literal["wait", "end"],
    ledger: Path,
    port: int,
    autoscaler: str | None,
    api_key: str | None,
    log_format: str,
    log_level: str,
    end_all: bool,
) -> None:
    """Reserve as many workers as a queue needs, for as long as it needs them.

    It only opens reservations; consumers end them. It may be stopped or killed at any time: jobs continue, and the
    next start continues with the sessions in the ledger. SIGTERM leaves all sessions held; --end-all ends them. Needs
    `pip install 'nullworker[client,queues]'`. Seconds may be written as 90, 15m, 6h or 30d.

    \b
    Example:
      nullworker dispatch --endpoint NAME --queue 'redis://HOST?list=jobs' --max 5
    """
    if autoscaler is not None and not is_absolute_http_url(autoscaler):
        raise BadSettings(f"--autoscaler must be as http://HOST:PORT, not {autoscaler!r}")
    key = api_key or (STAND_IN_KEY if autoscaler else "")
    needed = {
        "--endpoint NAME": endpoint,
        "an API key (VAST_API_KEY, or --api-key)": key,
        "--max N": end_all or most,
        "--queue URL or --command CMD": end_all or queue or command,
    }
    if missing := [name for name, value in needed.items() if not value]:
        raise click.UsageError(f"missing: {', '.join(missing)}")
    if end_all:
        source: Queue = CommandQueue("false")
    elif most is not None and least > most:
        raise BadSettings(f"--min {least} is more than --max {most}")
    elif queue and command:
        raise click.UsageError("give either --queue URL or --command CMD, not both")
    else:
        source = open_queue(queue) if queue else CommandQueue(str(command))
    plan = Plan(
        Policy(most or 1, least, jobs_per_worker, interval, settle),
        Terms(cost, lifetime, attach),
        Limits(max_hours_per_day, max_dollars_per_day, price),
        at_limit,
        stall,
        metadata,
    )
    logs.configure(log_format, log_level)
    warn_of_unknown_variables()
    opened = open_ledger(ledger)
    try:
        clock = SystemClock(opened.anchor(), not_before=opened.latest())
        opened.store_anchor(clock.anchor)
        vast = Vast(str(endpoint), key, autoscaler)
        if end_all:
            left = asyncio.run(_end_all(plan, source, vast, opened, clock))
            if left:
                raise CannotStart(f"{left} sessions could not be ended: their workers do not answer; try it again")
        else:
            asyncio.run(_run(plan, source, vast, opened, clock, port))
    finally:
        opened.close()


async def _run(plan: Plan, queue: Queue, vast: Vast, ledger: Ledger, clock: SystemClock, port: int) -> None:
    from nullworker.dispatch.server import server
    from nullworker.http.sockets import listen, raise_fd_limit

    log = logs.get_log(__name__)
    early: list[signal.Signals] = []  # signals that come after the port is open and before the dispatcher runs
    on_signals(early.append, (signal.SIGTERM, signal.SIGINT))
    raise_fd_limit()  # each session has a connection of its own, and the usual limit is 1024
    listener = listen(port, host="127.0.0.1", variable="--port")
    async with running(plan, queue, vast, ledger, clock) as dispatcher:
        site = server(dispatcher, listener)
        await site.start()
        log.info(
            "dispatcher_started",
            endpoint=vast.endpoint,
            queue=queue.shown,
            ledger=str(ledger.path),
            port=listener.getsockname()[1],
            **plan.policy._asdict(),
            open_claims=len(dispatcher.book.claims),
        )
        try:
            await run_until_signalled(dispatcher.run(), before=early)
        except Interrupted as interrupted:
            held = len(dispatcher.book.in_state("held"))
            log.info("dispatcher_stopped", signal=interrupted.signal.name, held=held, message="sessions stay held")
        finally:
            await site.stop()
            listener.close()


async def _end_all(plan: Plan, queue: Queue, vast: Vast, ledger: Ledger, clock: SystemClock) -> int:
    async with running(plan, queue, vast, ledger, clock) as dispatcher:
        return await _ended(dispatcher)


async def _ended(dispatcher: Dispatcher) -> int:
    if dispatcher.book.claims:
        await dispatcher.connect()
    return await dispatcher.end_all()
