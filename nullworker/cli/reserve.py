"""`nullworker reserve`: the command line of nullworker.client, and its exit codes.

The answer is JSON on stdout; progress messages go to stderr.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import click

from nullworker.cli.options import SECONDS, Seconds
from nullworker.client.hold import LIFETIME_SECONDS, STAND_IN_KEY, WAIT_SECONDS, hold, hold_at, hold_session
from nullworker.client.vastai_sdk import Answer, HoldError, Say
from nullworker.settings import is_absolute_http_url

__all__ = ["HoldError", "hold", "hold_at", "hold_session", "reserve"]


def json_object(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Parse an option that is a JSON object."""
    if value is None:
        return None
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"{value!r} is not a JSON object")
    return parsed


@click.command(short_help="Hold a worker until its consumer releases it.")
@click.option("--endpoint", metavar="NAME", help="The name of the endpoint at Vast.")
@click.option("--url", help="Instead of --endpoint: the address of one UNSECURED worker, as http://HOST:PORT.")
@click.option("--duration", type=SECONDS, help="Seconds.  [default: the cap of the worker]")
@click.option("--metadata", metavar="JSON", callback=json_object, help="Passed to the consumer; up to 4 KiB.")
@click.option(
    "--cost",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Workload; as NULL_MAX_PERF.",
)
@click.option("--session", is_flag=True, help="Hold a session, at an endpoint: it survives a restarted worker.")
@click.option(
    "--lifetime",
    type=Seconds(more_than_0=True),
    default=LIFETIME_SECONDS,
    show_default=True,
    help="Seconds that a session outlives this client, should it die.",
)
@click.option("--autoscaler", metavar="URL", help="A fake autoscaler instead of Vast.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Your API key at Vast.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=WAIT_SECONDS,
    show_default=True,
    help="Longest wait for a worker, in seconds.",
)
@click.option("--stream/--no-stream", default=True, help="Wait on a stream of events (default) or on a plain request.")
@click.option("--json", "as_json", is_flag=True, help="Only the final answer, as one line of JSON.")
@click.pass_context
def reserve(
    ctx: click.Context,
    *,
    endpoint: str | None,
    url: str | None,
    duration: float | None,
    metadata: dict[str, Any] | None,
    cost: int,
    session: bool,
    lifetime: float,
    autoscaler: str | None,
    api_key: str | None,
    timeout: float,
    stream: bool,
    as_json: bool,
) -> None:
    """Hold one worker until its consumer releases it, or for --duration seconds.

    Ctrl-C closes the connection, which ends the reservation; a session is ended. Needs `pip install
    'nullworker[client]'`, unless --url is given. Exit codes: 0 done, 1 failed, 2 wrong use, 130 Ctrl-C, 143 SIGTERM.
    """
    say: Say = (lambda line: None) if as_json else (lambda line: click.echo(line, err=True))
    if (endpoint is None) == (url is None):
        raise click.UsageError("give either --endpoint NAME or --url URL")
    if url is not None and (session or autoscaler is not None):
        raise click.UsageError("--url goes straight to a worker: --session and --autoscaler need --endpoint")
    if url is not None and not is_absolute_http_url(url):
        raise click.UsageError(f"--url must be as http://HOST:PORT, not {url!r}")
    if session and metadata is not None:
        raise click.UsageError("the SDK's sessions carry no --metadata")
    key = api_key or (STAND_IN_KEY if url or autoscaler else "")
    if not key:
        raise click.UsageError("no API key: set VAST_API_KEY, or give --api-key")

    async def start() -> Answer:
        if url is not None:
            return await hold_at(url, duration=duration, metadata=metadata, timeout=timeout, stream=stream, say=say)
        common: dict[str, Any] = {"cost": cost, "api_key": key, "autoscaler": autoscaler, "timeout": timeout}
        if session:
            return await hold_session(str(endpoint), duration=duration, lifetime=lifetime, say=say, **common)
        return await hold(str(endpoint), duration=duration, metadata=metadata, stream=stream, say=say, **common)

    try:
        show(asyncio.run(interruptible(start)), as_json)
    except SignalError as error:
        click.echo(str(error), err=True)
        ctx.exit(128 + error.signal)
    except HoldError as error:
        if error.answer is not None:
            show(error.answer, as_json)
        message = str(error).replace(api_key, "***") if api_key else str(error)  # other programs' messages may quote it
        click.echo(f"nullworker reserve: {message}", err=True)
        ctx.exit(1)


class SignalError(Exception):
    """SIGINT or SIGTERM came; the message says what that did."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


async def interruptible(start: Callable[[], Awaitable[Answer]]) -> Answer:
    """What `start` gives. SIGINT and SIGTERM cancel it; then SignalError is raised, with the cancellation's message."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[int] = []

    def stop(number: int) -> None:
        came.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await start()
    except asyncio.CancelledError as error:
        if not came:
            raise
        raise SignalError(str(error) or "interrupted", came[0]) from None


def show(answer: Answer, as_json: bool) -> None:
    """Print the answer: on one line for scripts, indented for people."""
    click.echo(json.dumps(answer) if as_json else json.dumps(answer, indent=2))
