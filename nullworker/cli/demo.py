"""`nullworker demo`: shows all of it on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import click

from nullworker.local.demo import run


@click.command()
@click.option("--keep", is_flag=True, help="Keep the folder with the ledger, the workers' event logs and output.")
def demo(*, keep: bool) -> None:
    """See all of it work on this machine: no account, no GPU, half a minute.

    A queue of ten jobs, `nullworker dispatch`, workers that are started and stopped on demand, consumers that drain the
    queue, and what each job cost. All of these are real processes; only the autoscaler is a fake.
    """
    with contextlib.ExitStack() as stack:
        if keep:
            folder = Path(tempfile.mkdtemp(prefix="nullworker-demo-"))
            stack.callback(click.echo, f"\nThe logs are in {folder}: sqlite3 {folder}/nullworker-dispatch.db")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nullworker-demo-")))
        asyncio.run(run(folder))
