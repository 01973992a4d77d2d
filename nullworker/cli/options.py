"""Options that several commands share."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click

from nullworker.control_client import ControlClient
from nullworker.logs import get_log
from nullworker.settings import MAX_COST as MAX_COST
from nullworker.settings import read_seconds, unknown_names, unknown_setting


class Number(click.FloatRange):
    """A finite number; click takes `nan` into every range, and `inf` into one without a maximum."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number.

        Raises:
            click.BadParameter: it is none, or out of range.
        """
        try:
            finite = math.isfinite(float(value))
        except ValueError:
            finite = False
        if not finite:
            self.fail(f"{value!r} is not a number", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """Seconds from 0 up, as 90, 15m, 6h or 30d; `inf` and `nan` are refused."""

    name = "seconds"

    def __init__(self, *, more_than_0: bool = False) -> None:
        super().__init__(min=0, min_open=more_than_0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number.

        Raises:
            click.BadParameter: it is none.
        """
        try:
            seconds = read_seconds(str(value))
        except ValueError:
            seconds = math.nan
        if math.isnan(seconds) or (self.min_open and seconds == 0):
            least = "more than 0" if self.min_open else "0 or more"
            self.fail(f"{value!r} is not a number of seconds, {least}, as 90, 15m, 6h or 30d", param, ctx)
        return seconds


SECONDS = Seconds()
COST = Number(0, MAX_COST, min_open=True)


def _url(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """Check a URL of a control port: plain HTTP, a host and a port."""
    if text is None:
        return None
    try:
        parts = urlsplit(text if "//" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        port = None
    if port is None or parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise click.BadParameter(f"{text!r} must be http://HOST:PORT")
    return f"http://{parts.netloc}"


def with_control(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that locate the control port; the command gets the argument `control`."""

    @click.option(
        "--control-url",
        metavar="URL",
        callback=_url,
        help="The worker's control port as http://HOST:PORT, instead of --control-port.",
    )
    @click.option(
        "--control-port",
        metavar="PORT",
        envvar="NULL_CONTROL_PORT",
        show_envvar=True,
        type=click.IntRange(1, 65535),
        default=18999,
        show_default=True,
        help="The worker's control port, on 127.0.0.1.",
    )
    @functools.wraps(command)
    def wrapped(control_url: str | None, control_port: int, **options: Any) -> None:
        command(control=ControlClient(control_url or f"http://127.0.0.1:{control_port}"), **options)

    return wrapped


log_format = click.option(
    "--log-format",
    envvar="NULL_LOG_FORMAT",
    show_envvar=True,
    type=click.Choice(["console", "json"]),
    default="console",
    show_default=True,
    help="Format of the log lines on stderr.",
)
log_level = click.option(
    "--log-level",
    envvar="NULL_LOG_LEVEL",
    show_envvar=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Lowest level of the log lines shown.",
)


def warn_of_unknown_variables() -> None:
    """Log each variable that looks like one of this command, or like a setting, and is none: a limit would not be in
    force, for example, and nobody would know.
    """
    options = click.get_current_context().command.params
    named = (option.envvar for option in options if option.envvar)
    own = {name for names in named for name in ([names] if isinstance(names, str) else names)}
    for name, nearest in unknown_names(os.environ, own).items():
        get_log(__name__).warning("unknown_setting", name=name, nearest=nearest, message=unknown_setting(name, nearest))


def json_object(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """The value of an option that is a JSON object."""
    if text is None:
        return None
    from nullworker.http.bodies import MAX_DEPTH, is_deeper  # imports aiohttp, which `nullworker --help` must not load

    example = """write it as '{"job": "42"}', in single quotes"""
    deep = False
    try:
        parsed = json.loads(text)
        json.dumps(parsed, allow_nan=False)  # Python reads NaN and Infinity, which are not JSON
        deep = is_deeper(parsed, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON ({error}): {example}") from error
    if deep:
        raise click.BadParameter(f"it nests more than {MAX_DEPTH} deep")
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"{text!r} is not a JSON object: {example}")
    return parsed
