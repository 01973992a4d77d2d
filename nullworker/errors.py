"""The error classes of this project, in one tree, with their HTTP statuses.

    NullworkerError                 500
    ├── BadSettings                 a setting is wrong: exit 2
    ├── CannotStart                 a port, a certificate or the log's lock: exit 1
    ├── IllegalMove                 the transition table forbids it; nothing has changed
    ├── LogUnavailable              503  the event log cannot be written
    ├── LogDamaged                  the event log cannot be read; the next start sets it aside
    ├── WorkerUnreachable           no worker answers on a control port
    └── RequestError                an error answer, as JSON
        ├── Unauthorized            401
        ├── Forbidden               403
        ├── NotFound                404
        ├── SlowBody                408
        ├── Conflict                409
        │   └── Busy                    with Retry-After
        ├── Gone                    410
        ├── BodyTooLarge            413
        ├── UnsupportedMedia        415
        ├── Invalid                 422  names each wrong field
        └── Unavailable             503  with Retry-After

A refused claim (429, 503, 499) is not an error: it is the end of a reservation, see fsm/table.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

#: The Retry-After of refused callers; short, since a release may come at any moment.
RETRY_AFTER_SECONDS = 1


class NullworkerError(Exception):
    """The base class. `str(error)` is one sentence that says what to do next."""

    status: ClassVar[int] = 500


class BadSettings(NullworkerError):
    """A setting is not allowed; the message names it, its value and what is allowed."""


class CannotStart(NullworkerError):
    """The worker cannot start.

    Attributes:
        tell: whether to report it to the autoscaler; not if another worker of this instance is running.
    """

    def __init__(self, message: str, *, tell: bool = True) -> None:
        super().__init__(message)
        self.tell = tell


class IllegalMove(NullworkerError):
    """The transition table does not allow an event in the reservation's present state."""


class LogUnavailable(NullworkerError):
    """The event log could not be written; nothing was stored.

    `momentary`: whether the cause is the lock of another program: a SQLite shell, VACUUM, a backup.
    """

    status: ClassVar[int] = 503

    def __init__(self, message: str, *, momentary: bool = False) -> None:
        super().__init__(message)
        self.momentary = momentary


class LogDamaged(NullworkerError):
    """The file is not a readable event log."""


class WorkerUnreachable(NullworkerError):
    """The control port does not answer, or not as a worker does."""


class RequestError(NullworkerError):
    """An error answer: a status, and a JSON body with `error` and further fields, such as the wrong ones.

    `about`: the id of the reservation that it is about, for the header.
    """

    status: ClassVar[int] = 400

    def __init__(self, message: str, *, about: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.about = about
        self.fields = fields

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": str(self), **self.fields}

    @property
    def headers(self) -> dict[str, str]:
        """Further headers of the answer."""
        return {}


class Unauthorized(RequestError):
    """A signature, a session's auth or a token is missing or wrong. `reason` is a label of the metric."""

    status: ClassVar[int] = 401

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Forbidden(RequestError):
    """The caller may not use this port: a browser page from elsewhere, or a rebound host name."""

    status: ClassVar[int] = 403


class NotFound(RequestError):
    """No such route or reservation."""

    status: ClassVar[int] = 404


class SlowBody(RequestError):
    """The body did not arrive in time."""

    status: ClassVar[int] = 408


class Conflict(RequestError):
    """The request does not fit the present state, for example because nothing is held."""

    status: ClassVar[int] = 409


class Busy(Conflict):
    """What is asked for is taken, perhaps only for a moment."""

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After: a consumer that was restarted may be quicker than the end of the one before."""
        return {"Retry-After": str(RETRY_AFTER_SECONDS)}


class Gone(RequestError):
    """The session has ended or never existed."""

    status: ClassVar[int] = 410


class BodyTooLarge(RequestError):
    """The body is larger than is allowed."""

    status: ClassVar[int] = 413


class UnsupportedMedia(RequestError):
    """The body is of a kind or an encoding that is not taken."""

    status: ClassVar[int] = 415


class Invalid(RequestError):
    """The body or a query parameter is wrong; the fields say which, and what is allowed."""

    status: ClassVar[int] = 422


class Unavailable(RequestError):
    """Temporarily unavailable: try again, here or on another worker."""

    status: ClassVar[int] = 503

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, see RFC 9110 section 10.2.3."""
        return {"Retry-After": str(RETRY_AFTER_SECONDS)}
