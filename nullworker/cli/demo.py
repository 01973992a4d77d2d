"""`nullworker demo`: shows the whole system at work on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import click

from nullworker.local.demo import run


@click.command()
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the folder with the ledger and the workers' event logs and output, and print its path.",
)
def demo(*, keep: bool) -> None:
    """Show the whole system at work on this machine, in half a minute, without an account or a GPU.

    It shows a queue of ten jobs, `nullworker dispatch`, workers that start and stop on demand, consumers that drain the
    queue, and what each job cost. All of these are real processes; only the autoscaler is a fake.
    """
    with contextlib.ExitStack() as stack:
        if keep:
            folder = Path(tempfile.mkdtemp(prefix="nullworker-demo-"))
            stack.callback(click.echo, f"\nThe logs are in {folder}: sqlite3 {folder}/nullworker-dispatch.db")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nullworker-demo-")))
        asyncio.run(run(folder))
