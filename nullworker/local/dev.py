"""`nullworker dev`: a fake Vast Serverless that keeps running, for your own client, consumer, template or SDK script.

It starts a real worker when a request needs one, routes, and stops idle workers. When it ends, it has ended every
process that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys

from nullworker.aio import on_signals
from nullworker.clock import SystemClock
from nullworker.errors import CannotStart
from nullworker.local.fleet import Fleet
from nullworker.local.fleet_worker import Plan
from nullworker.local.screen import Lines, Screen, Show
from nullworker.testing import FakeAutoscaler, Parameters


async def run(port: int, endpoint: str, parameters: Parameters, plan: Plan, *, engine: str = "strict") -> None:
    """Run the fake autoscaler on `port` and a fleet of workers, until SIGINT, SIGTERM or SIGHUP.

    `engine`: as that of the Router.

    Raises:
        CannotStart: the port is taken.
    """
    now = SystemClock().now
    show: Show = Screen(now) if sys.stdout.isatty() else Lines(now)
    vast = FakeAutoscaler(
        port, endpoint=endpoint, parameters=parameters, mtoken=secrets.token_hex(8), tell=show.heard, clock=now
    )
    vast.fleet.engine = engine
    fleet = Fleet(vast, plan, now, show.changed)
    stop = asyncio.Event()

    def on_signal(_: signal.Signals) -> None:
        if stop.is_set():
            fleet.hurry()
        else:
            show.say("stopping all workers; a second signal cancels what they hold")
        stop.set()

    on_signals(on_signal)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(vast)
        except OSError as error:
            raise CannotStart(
                f"port {port} is not free ({error.strerror}): is another one running? use --port"
            ) from error
        _introduce(vast, plan, show)
        drawing = asyncio.ensure_future(show.draw(vast, fleet))
        stack.callback(drawing.cancel)
        await stack.enter_async_context(fleet)
        waits = {asyncio.ensure_future(stop.wait()), asyncio.ensure_future(fleet.run()), drawing}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits - {drawing}:
            task.cancel()
        for task in done:
            task.result()


def _introduce(vast: FakeAutoscaler, plan: Plan, show: Show) -> None:
    show.say(f"a stand-in for Vast Serverless, endpoint {vast.endpoint!r}, at {vast.url}")
    show.say("for tests: production scaling is done by Vast; Ctrl-C stops everything")
    show.say(f"reserve with: nullworker reserve --endpoint {vast.endpoint} --autoscaler {vast.url}")
    show.say(f'or with the official client: Serverless("any", autoscaler_url="{vast.url}", webserver_url="{vast.url}")')
    show.say('answers are not wrapped: read answer["released"], not answer["result"]["released"]')
    if vast.fleet.engine != "strict":
        show.say(f"the engine is that of {vast.fleet.engine}: docs/deploying.md says what it does")
    if plan.consumer:
        show.say(f"beside each worker: {' '.join(plan.consumer)}")
    else:
        show.say("no consumer: release on the control port of the worker, or start dev with -- CONSUMER")
    show.say(f"logs: {plan.folder}")
