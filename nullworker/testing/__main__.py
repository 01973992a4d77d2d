"""`python -m nullworker.testing`: the fake autoscaler as a process, until SIGINT or SIGTERM.

The first line on stdout ends with its URL.
"""

import asyncio
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from nullworker.aio import on_signals
from nullworker.testing.fake_autoscaler import FakeAutoscaler


@click.command(context_settings={"show_default": True})
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="On 127.0.0.1; 0 takes any free port.")
@click.option("--endpoint", default="null", help="The name of its only endpoint.")
@click.option("--key", type=click.Path(dir_okay=False, path_type=Path), help="PEM file of the RSA key; made if absent.")
@click.option("--mtoken", help="Refuse reports with another MASTER_TOKEN.  [default: accept any]")
@click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append each accepted message to this file, as a JSON line.",
)
@click.option("--quiet", is_flag=True, help="Print only where it listens.")
def main(port: int, endpoint: str, key: Path | None, mtoken: str | None, record: Path | None, quiet: bool) -> None:
    """A fake Vast Serverless on this machine, for your own worker, client or SDK script.

    Point a worker at it with REPORT_ADDR, the official client with autoscaler_url and webserver_url.
    POST /faults makes it fail on demand: {"call": "worker_status", "how": "down", "times": 3}.
    """
    tell = (lambda line: None) if quiet else (lambda line: print(line, flush=True))

    async def run() -> None:
        stop = asyncio.Event()
        on_signals(lambda _: stop.set(), (signal.SIGINT, signal.SIGTERM))
        with ExitStack() as stack:
            file = stack.enter_context(record.open("a", encoding="utf-8")) if record else None
            async with FakeAutoscaler(port, endpoint=endpoint, key=key, mtoken=mtoken, record=file, tell=tell) as vast:
                print(f"stand-in autoscaler for endpoint {endpoint!r} listens on {vast.url}", flush=True)
                await stop.wait()

    try:
        asyncio.run(run())
    except (OSError, ValueError) as error:
        sys.exit(f"the fake autoscaler cannot start: {error}")  # exit code 1


if __name__ == "__main__":
    main(prog_name="python -m nullworker.testing")
