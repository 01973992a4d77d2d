"""`nullworker collect`: collects the events of all workers in one database, on a machine of yours."""

from __future__ import annotations

import asyncio
import ipaddress
import math
from pathlib import Path

import click

from nullworker import logs
from nullworker.cli.options import Seconds, log_format, warn_of_unknown_variables
from nullworker.collector.server import Options, serve
from nullworker.errors import BadSettings
from nullworker.settings import read_token


def _prices(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[float | None, dict[str, float]]:
    everywhere, by_instance = None, {}
    for text in texts:
        instance, equals, number = text.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = math.nan
        if not (math.isfinite(price) and price >= 0) or (equals and not instance):
            raise click.BadParameter(f"{text!r} must be dollars an hour, as 0.40, or as INSTANCE=0.40")
        if equals:
            by_instance[instance] = price
        else:
            everywhere = price
    return everywhere, by_instance


@click.command(context_settings={"show_default": True})
@click.option("--db", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The database file.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; any other than loopback requires a token.")
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=18997,
    help="Port of POST /events; 0: any free one.",
)
@click.option(
    "--token",
    envvar=["NULL_COLLECT_TOKEN", "NULL_SINK_TOKEN"],
    show_envvar=True,
    show_default=False,
    help="Bearer token that the workers send (NULL_SINK_TOKEN). Other users can read an argument: set the variable "
    "instead.",
)
@click.option(
    "--public",
    is_flag=True,
    help="Serve only POST /events on the port; needed behind a TLS proxy, implied when --host is not loopback.",
)
@click.option(
    "--page-port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=18995,
    help="With --public: port of the page and /metrics, on 127.0.0.1; 0: any free one.",
)
@click.option(
    "--price",
    "prices",
    multiple=True,
    metavar="[INSTANCE=]DOLLARS",
    callback=_prices,
    show_default=False,
    help="Price per hour, of all instances or of one; kept in the database. May be given several times.",
)
@click.option(
    "--silence",
    type=Seconds(more_than_0=True),
    default="3m",
    metavar="SECONDS",
    help="Time without news after which a worker is silent.",
)
@click.option(
    "--keep",
    type=Seconds(more_than_0=True),
    metavar="SECONDS",
    show_default=False,
    help="Time for which ended reservations are kept; older ones are removed daily.  [default: forever]",
)
@log_format
def collect(
    *,
    db: Path,
    host: str,
    port: int,
    token: str | None,
    public: bool,
    page_port: int,
    prices: tuple[float | None, dict[str, float]],
    silence: float,
    keep: float | None,
    log_format: str,
) -> None:
    """Collect the events of all workers whose NULL_SINK is http://HOST:PORT/events, in one SQLite database.

    It also serves a page, /status, /readyz and /metrics, to this machine only. SIGTERM ends it; workers keep the
    events that they could not deliver. Seconds may be written as 90, 15m, 6h or 30d.

    \b
    Example:
      nullworker collect --db fleet.db --price 0.40
    """
    loopback = _is_loopback(host)
    try:
        token = read_token((token or "").strip()) or None
    except ValueError:
        raise BadSettings("--token (NULL_COLLECT_TOKEN) must be printable text in one line") from None
    if token is None and (public or not loopback):
        why = "--public" if public else f"--host {host}"
        raise BadSettings(f"{why} needs a token, or anybody could write into {db}: set NULL_COLLECT_TOKEN")
    logs.configure(log_format, "info")
    warn_of_unknown_variables()
    price, by_instance = prices
    asyncio.run(
        serve(
            Options(
                db=db,
                host=host,
                port=port,
                token=token,
                public=public or not loopback,
                page_port=page_port,
                price=price,
                prices=by_instance,
                silence=silence,
                keep=keep,
            )
        )
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
