"""One worker process: from its settings to its exit code.

The one rule: a worker that cannot start still tells the autoscaler so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Final

from nullworker import logs
from nullworker.app import STOP_SECONDS, Worker, identity
from nullworker.autoscaler import STATUS_PATH, failed_start
from nullworker.errors import CannotStart
from nullworker.link import Link
from nullworker.log import open_log
from nullworker.settings import Settings

#: Objects made before Python looks for cycles among the youngest. Each connection that waits is some forty that live
#: on, and at the default of 700 a sixth of the CPU of a long queue's claims went into looking at them again and again.
YOUNG_OBJECTS: Final = 20_000


def serve(settings: Settings) -> int:
    """Run a worker until it is told to stop. Returns the exit code."""
    logs.configure(settings.null_log_format, settings.null_log_level)
    gc.freeze()  # what is imported stays
    gc.set_threshold(YOUNG_OBJECTS)
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    try:
        async with contextlib.AsyncExitStack() as stack:
            worker = Worker(settings, open_log(settings.event_log, sync=settings.null_log_sync))
            stack.push_async_callback(worker.stop)
            await worker.start()
            return await worker.run()
    except CannotStart as error:
        if error.tell:
            await _tell_failed_start(settings, str(error))
        raise


async def _tell_failed_start(settings: Settings, why: str) -> None:
    """The autoscaler should not wait for a worker that will not come."""
    me = identity(settings)
    if me is None:
        return
    link = Link(settings.report_addr)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(link.post(STATUS_PATH, failed_start(me, why)), STOP_SECONDS)
    await link.close()
