"""The control port as a command sees it: one question, one answer. On the standard library, so that it starts at once.

What it leaves out: waiting and streams, which are a consumer's (consumer_port.py), and what a command prints.
The one rule: whatever goes wrong is one sentence that says what to do.
"""

from __future__ import annotations

import functools
import http.client
import json
from collections.abc import Callable
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import click

from nullworker.errors import NullworkerError

#: Seconds for an answer that need not be waited for.
ANSWER_SECONDS: Final = 10.0
#: What a worker answers, by path and status, as far as commands read it. Any other status comes with `error`.
ANSWERS: Final[dict[tuple[str, int], Any]] = {
    ("/status", 200): {
        "state": str,
        "url": str,
        "version": str,
        "held": dict | None,
        "queue": {"length": int, "limit": int, "oldest_seconds": float | int | None},
        "consumer": {"url": str | None, "why": str | None, "last": str | None},
        "autoscaler": {"reports_to": list | None, "trouble": str | None, "backlog": int},
        "log": {"path": str, "why": str | None, "last_seq": int, "bytes": int},
    },
    ("/release", 200): {"released": bool},
    ("/extend", 200): {"reservation_id": str, "ends_at": str},
    ("/reservation", 200): {
        "id": str,
        "kind": str,
        "state": str,
        "held_at": str,
        "ends_at": str,
        "duration_cap": object,
    },
    ("/reservation", 204): None,
}


class NoWorker(NullworkerError):
    """Nothing answers, or it is no worker."""


class Refused(NullworkerError):
    """The worker says no: its sentence, and `answer`, the JSON."""

    def __init__(self, message: str, answer: Any) -> None:
        super().__init__(message)
        self.answer = answer


class Control:
    """The control port of one worker, `http://HOST:PORT`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = url.removeprefix("http://")

    def ask(self, method: str, path: str, body: Any = None, *, seconds: float = ANSWER_SECONDS) -> Any:
        """The JSON of a good answer; None when it has none.

        Raises:
            NoWorker: nobody answers within `seconds`, or not as a worker does.
            Refused: it is an error.
        """
        connection = http.client.HTTPConnection(self._address, timeout=seconds)
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            told: Any = json.loads(text) if text else None
        except TimeoutError:
            self._nobody(f"a worker on {self._address} takes the call but does not answer: look at its log")
        except OSError:
            self._nobody(f"no worker answers on {self._address}: is it running? set NULL_CONTROL_PORT or --control-url")
        except (http.client.HTTPException, ValueError, RecursionError):
            self._stranger()
        finally:
            connection.close()
        asked = (path.partition("?")[0], answer.status)
        if not _fits(told, ANSWERS.get(asked, {"error": str})):
            self._stranger()
        if asked not in ANSWERS:
            fields = {name: each for name, each in told.items() if name != "error" and isinstance(each, str)}
            raise Refused("; ".join([told["error"], *(f"{name}: {each}" for name, each in fields.items())]), told)
        return told

    def _stranger(self) -> NoReturn:
        self._nobody(
            f"{self._address} answers, but it is not nullworker's control port: set NULL_CONTROL_PORT or --control-url"
        )

    @staticmethod
    def _nobody(message: str) -> NoReturn:
        raise NoWorker(message) from None


def _fits(told: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return isinstance(told, dict) and all(name in told and _fits(told[name], each) for name, each in shape.items())
    return told is None if shape is None else isinstance(told, shape)


def _url(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """A control port is spoken to in plain HTTP, and its address is a host and a port."""
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
    """The options that say where the worker is; the command gets `control`."""

    @click.option("--control-url", metavar="URL", callback=_url, help="The control port, as http://HOST:PORT.")
    @click.option(
        "--control-port",
        envvar="NULL_CONTROL_PORT",
        show_envvar=True,
        type=click.IntRange(1, 65535),
        default=18999,
        show_default=True,
        help="The control port, on 127.0.0.1.",
    )
    @functools.wraps(command)
    def wrapped(control_url: str | None, control_port: int, **options: Any) -> None:
        command(control=Control(control_url or f"http://127.0.0.1:{control_port}"), **options)

    return wrapped
