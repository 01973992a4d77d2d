"""A blocking client of the control port, for commands. It uses only the standard library, to start fast.

Every failure becomes one sentence that says what to do. For asyncio see consumer/control_port.py.
"""

from __future__ import annotations

import http.client
import json
from typing import Any, Final, NoReturn

from nullworker.errors import NullworkerError, WorkerUnreachable

#: Seconds for an answer to a call that does not wait for anything.
ANSWER_SECONDS: Final = 10.0
#: The header `Server` of every answer of a worker; a port with another one belongs to another program.
SERVER_NAME: Final = "nullworker"
#: The header of an answer of /attach: seconds for which one reservation may be held, extensions included, if limited.
MAX_HOLD_HEADER: Final = "Nullworker-Max-Hold"
#: Bytes of a body that a worker takes; of a larger one it does not read the rest.
MAX_BODY_BYTES: Final = 1024 * 1024


class Refused(NullworkerError):
    """The worker refused. The message is its own; `answer` is the JSON."""

    def __init__(self, message: str, answer: Any) -> None:
        super().__init__(message)
        self.answer = answer


class ControlClient:
    """The control port of one worker, `http://HOST:PORT`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = url.removeprefix("http://")

    def ask(self, method: str, path: str, body: Any = None, *, seconds: float = ANSWER_SECONDS) -> Any:
        """Send a request. Returns the JSON of the answer, or None if it has no body.

        Raises:
            WorkerUnreachable: there is no answer within `seconds`, or it is not a worker's.
            Refused: the answer is an error.
        """
        connection = http.client.HTTPConnection(self._address, timeout=seconds)
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            content: Any = json.loads(text) if text else None
        except TimeoutError:
            self._unreachable(f"a worker on {self._address} takes the call but does not answer: look at its log")
        except OSError:
            self._unreachable(
                f"no worker answers on {self._address}: is it running? set NULL_CONTROL_PORT or --control-url"
            )
        except (http.client.HTTPException, ValueError, RecursionError):
            self._stranger()
        finally:
            connection.close()
        if answer.headers.get("Server") != SERVER_NAME:
            self._stranger()
        if answer.status >= 300:
            fields = {name: value for name, value in content.items() if name != "error" and isinstance(value, str)}
            words = [content["error"], *(f"{name}: {value}" for name, value in fields.items())]
            raise Refused("; ".join(words), content)
        return content

    def _stranger(self) -> NoReturn:
        self._unreachable(
            f"{self._address} answers, but it is not nullworker's control port: set NULL_CONTROL_PORT or --control-url"
        )

    @staticmethod
    def _unreachable(message: str) -> NoReturn:
        raise WorkerUnreachable(message) from None
