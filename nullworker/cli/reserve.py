"""`nullworker reserve`: the command line of nullworker.client, and its exit codes.

The answer is JSON on stdout; progress messages go to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from nullworker.aio import on_signals
from nullworker.cli.options import SECONDS, Seconds, json_object
from nullworker.cli.state_file import StateFile
from nullworker.client.held_session import hold_session
from nullworker.client.hold import hold, hold_at
from nullworker.client.outcome import HoldCancelled, is_result_failed
from nullworker.client.session import LIFETIME_SECONDS, SessionLost
from nullworker.client.vastai_sdk import STAND_IN_KEY, WAIT_SECONDS, Say
from nullworker.client.worker_http import Answer, HoldError, Refused
from nullworker.settings import MAX_COST, is_absolute_http_url

__all__ = ["HoldError", "hold", "hold_at", "hold_session", "reserve"]


#: Exit codes beside 0, 2 (wrong use), 130 (Ctrl-C) and 143 (SIGTERM).
NOT_HELD, ENDED_EARLY, JOB_FAILED = 1, 3, 4


@click.command(short_help="Hold a worker until its consumer releases it.")
@click.option("--endpoint", metavar="NAME", help="Name of the endpoint at Vast.")
@click.option("--url", metavar="URL", help="Instead of --endpoint: the address of an UNSECURED worker.")
@click.option("--duration", type=SECONDS, help="Hold it for no longer than this.  [default: the worker's cap]")
@click.option("--metadata", metavar="JSON", callback=json_object, help="A JSON object for the consumer, up to 4 KiB.")
@click.option(
    "--cost",
    metavar="N",
    type=click.IntRange(1, MAX_COST),
    default=100,
    show_default=True,
    help="Workload of the request; should equal the workers' NULL_MAX_PERF.",
)
@click.option(
    "--session", is_flag=True, help="Hold a session instead of a request: it survives restarts of the worker."
)
@click.option(
    "--state",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the session in FILE. The same command, run again, continues the session. Implies --session.",
)
@click.option(
    "--lifetime",
    type=Seconds(more_than_0=True),
    default=f"{LIFETIME_SECONDS:g}",
    show_default=True,
    help="Time that a session without a consumer survives the death of this client.",
)
@click.option("--autoscaler", metavar="URL", help="Fake autoscaler to use instead of Vast, such as `nullworker dev`.")
@click.option("--api-key", envvar="VAST_API_KEY", show_envvar=True, help="Your API key at Vast.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=f"{WAIT_SECONDS:g}",
    show_default=True,
    help="Longest wait until a worker is held.",
)
@click.option(
    "--stream/--no-stream", default=True, help="Wait on a stream of events (the default), or on one plain request."
)
@click.option("--json", "as_json", is_flag=True, help="Print only the answer, as one line of JSON.")
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
    state: Path | None,
    lifetime: float,
    autoscaler: str | None,
    api_key: str | None,
    timeout: float,
    stream: bool,
    as_json: bool,
) -> None:
    """Hold one worker until its consumer releases it, or for --duration.

    Ctrl-C ends the reservation; with --state, SIGTERM leaves the session held. Needs `pip install
    'nullworker[client]'`, unless --url is given. Seconds may be written as 90, 15m or 6h.

    \b
    Example:
      nullworker reserve --endpoint NAME --duration 2h --metadata '{"job": "42"}'

    Exit codes: 0 released and the job succeeded, or the time is over; 1 not held, or lost; 2 wrong use; 3 ended early
    by a cap, or cancelled; 4 released, and the job failed (exit_code not 0, or `error`); 130 Ctrl-C; 143 SIGTERM.
    """
    say: Say = (lambda line: None) if as_json else (lambda line: click.echo(line, err=True))
    if (endpoint is None) == (url is None):
        raise click.UsageError("give either --endpoint NAME or --url URL")
    if url is not None and (session or state or autoscaler is not None):
        raise click.UsageError("--url goes straight to a worker: --session, --state and --autoscaler need --endpoint")
    if url is not None and not is_absolute_http_url(url):
        raise click.UsageError(f"--url must be as http://HOST:PORT, not {url!r}")
    key = api_key or (STAND_IN_KEY if url or autoscaler else "")
    if not key:
        raise click.UsageError("no API key: set VAST_API_KEY, or give --api-key")
    received: list[int] = []
    arguments = {
        "endpoint": endpoint,
        "duration": duration,
        "metadata": metadata,
        "cost": cost,
        "lifetime": lifetime,
        "autoscaler": autoscaler,
    }

    async def start(file: StateFile | None) -> Answer:
        if url is not None:
            return await hold_at(url, duration=duration, metadata=metadata, timeout=timeout, stream=stream, say=say)
        common: dict[str, Any] = {"cost": cost, "api_key": key, "autoscaler": autoscaler, "timeout": timeout}
        if not session and file is None:
            return await hold(str(endpoint), duration=duration, metadata=metadata, stream=stream, say=say, **common)
        return await hold_session(
            str(endpoint),
            duration=duration,
            lifetime=lifetime,
            metadata=metadata,
            say=say,
            saved=None if file is None else file.saved,
            save=None if file is None else file.save,
            leave=lambda: file is not None and signal.SIGINT not in received,
            **common,
        )

    try:
        with contextlib.ExitStack() as stack:
            file = None if state is None else stack.enter_context(StateFile(state, arguments))
            try:
                answer = asyncio.run(interruptible(lambda: start(file), received))
            except SignalError as error:
                if file is not None and (error.signal == signal.SIGINT or file.saved is None):
                    file.remove()
                click.echo(str(error), err=True)
                ctx.exit(128 + error.signal)
            except HoldError as error:
                code = ENDED_EARLY if isinstance(error, HoldCancelled) else NOT_HELD
                if error.answer is not None:
                    show(error.answer, as_json)
                # messages of other programs may quote the key
                message = str(error).replace(api_key, "***") if api_key else str(error)
                if file is not None:
                    if file.saved is None or isinstance(error, (HoldCancelled, SessionLost, Refused)):
                        file.remove()
                    else:
                        message += f"; {state} is kept: run the command again to continue"
                click.echo(f"nullworker reserve: {message}", err=True)
                ctx.exit(code)
            show(answer, as_json)
            if file is not None:
                file.remove()
            ctx.exit(exit_code(answer, duration, say))
    except BlockingIOError:
        click.echo(f"nullworker reserve: {state} is in use by another nullworker reserve", err=True)
        ctx.exit(NOT_HELD)


def exit_code(answer: Answer, duration: float | None, say: Say) -> int:
    """The exit code for the answer of a hold that was not cancelled."""
    if answer["released"] == "duration_elapsed":
        seconds = answer["held_seconds"] or 0
        if duration is not None and seconds + 0.01 >= duration:
            return 0
        say(f"ended by the worker's cap, after {seconds:g} s: set MAX_RESERVATION_SECONDS in its template")
        return ENDED_EARLY
    if is_result_failed(answer["result"]):
        say(f"the job failed: {json.dumps(answer['result'])[:200]}")
        return JOB_FAILED
    return 0


class SignalError(Exception):
    """SIGINT or SIGTERM was received; the message says what that did."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


async def interruptible(start: Callable[[], Awaitable[Answer]], received: list[int]) -> Answer:
    """The result of `start`. SIGINT and SIGTERM cancel it, and are added to `received`.

    Raises:
        SignalError: with the cancellation's message.
    """
    task = asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    on_signals(stop, (signal.SIGINT, signal.SIGTERM))
    try:
        return await start()
    except asyncio.CancelledError as error:
        if not received:
            raise
        raise SignalError(str(error) or "interrupted", received[0]) from None


def show(answer: Answer, as_json: bool) -> None:
    """Print the answer: on one line for scripts, indented for people."""
    click.echo(json.dumps(answer) if as_json else json.dumps(answer, indent=2))
