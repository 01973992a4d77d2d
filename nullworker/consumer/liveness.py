"""The liveness connection to one held reservation, on a thread of its own.

The kernel closes it when this process dies; from this, the worker learns of the death. Nothing else may keep it open:
it is close-on-exec, and a forked child closes its copy at once. The thread attaches again when the connection breaks,
as it does at a restart of the worker.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

from nullworker.control_client import MAX_HOLD_HEADER

log = logging.getLogger(__name__)

#: Seconds between two tries while the worker does not answer, and while another consumer is attached.
RETRY_SECONDS: Final = 0.5
BUSY_SECONDS: Final = 1.0
#: Seconds for a connection, and for the headers of the answer.
ANSWER_SECONDS: Final = 10.0
#: Seconds without a byte after which the connection counts as broken: the worker sends a keepalive each 15 s.
SILENT_SECONDS: Final = 50.0

#: Sockets of this process that child processes must close.
_own: set[socket.socket] = set()


def _close_in_child() -> None:
    for sock in _own:
        with contextlib.suppress(OSError):
            os.close(sock.detach())  # no shutdown: that would end it for the parent too
    _own.clear()


os.register_at_fork(after_in_child=_close_in_child)


def keep_from_children(sock: socket.socket) -> None:
    """Make forked children close their copy of a socket; executed programs never inherit it."""
    _own.add(sock)


def forget(sock: socket.socket) -> None:
    """Close a socket; forked children need not close it any more."""
    _own.discard(sock)
    sock.close()


Attachment = Literal["connecting", "attached", "taken", "over"]


class LivenessConnection(threading.Thread):
    """Keeps `POST /attach` open for one reservation until `close`, or until the reservation is not held any more.

    Attributes:
        state: `connecting` (also again), `attached`, `taken` (another consumer is attached), `over` (it is not held).
        max_hold: seconds for which this worker holds one reservation, extensions included; None: no limit, or not
            attached yet.

    `changed` is called from this thread at each change of state and each event of the reservation.
    """

    def __init__(self, url: str, reservation_id: str, *, extend: str, changed: Callable[[], None]) -> None:
        super().__init__(name=f"attached to {reservation_id}", daemon=True)
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._path = f"/attach?reservation_id={quote(reservation_id)}&extend={extend}"
        self._id = reservation_id
        self._changed = changed
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.state: Attachment = "connecting"
        self.max_hold: float | None = None

    def run(self) -> None:
        """Attach, and again when the connection breaks."""
        while not self._closed.is_set():
            pause = RETRY_SECONDS
            try:
                self._attach()
            except (OSError, http.client.HTTPException, ValueError) as error:
                log.debug("reservation %s: the liveness connection broke: %s", self._id, error)
            if self.state == "over":
                return
            if self.state == "taken":
                pause = BUSY_SECONDS
            else:
                self._become("connecting")
            self._closed.wait(pause)

    def close(self) -> None:
        """Close the connection and end the thread; to be called when the reservation is released."""
        self._closed.set()
        with self._lock:
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def _attach(self) -> None:
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        keep_from_children(sock)
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            with self._lock:
                if self._closed.is_set():
                    return
                self._sock = sock
            sock.settimeout(ANSWER_SECONDS)
            sock.connect((self._host, self._port))
            connection.sock = sock
            connection.request("POST", self._path, body=b"")
            answer = connection.getresponse()
            if answer.status != 200:
                self._refused(answer.status, answer.read())
                return
            max_hold = answer.headers.get(MAX_HOLD_HEADER)
            self.max_hold = None if max_hold is None else float(max_hold)
            self._become("attached")
            sock.settimeout(SILENT_SECONDS)
            while answer.read1(65536):
                self._changed()
        finally:
            with self._lock:
                self._sock = None
            connection.close()  # closes the answer's file too, or the socket would stay open
            forget(sock)

    def _refused(self, status: int, body: bytes) -> None:
        content: dict[str, Any] = json.loads(body)
        if content.get("state") == "attached":
            self._become("taken")
        elif status in (404, 409):
            self._become("over")
        else:
            raise ValueError(f"the worker answers {status}: {content.get('error')}")

    def _become(self, state: Attachment) -> None:
        if state != self.state:
            self.state = state
            self._changed()
