"""Opens listening sockets and TLS contexts and computes connection limits, so that a failure ends the start."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import ssl
from pathlib import Path
from typing import Final

from nullworker.errors import CannotStart

#: Where Vast's start script stores the instance's certificate (vastai 1.9.1, server/lib/server.py).
CERTIFICATE: Final = Path("/etc/instance.crt")
PRIVATE_KEY: Final = Path("/etc/instance.key")

#: Connections that the kernel queues while the process is busy.
BACKLOG: Final = 4096

#: A peer that vanished is noticed after idle + interval * count = 60 s, so that its reservation does not stay held.
#: Accepted sockets inherit these options (Linux, tcp(7)); the kernel's default is two hours.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}

#: Connections of the external port in addition to the queue's, and of each port on 127.0.0.1.
SPARE_CONNECTIONS: Final = 4096
LOCAL_CONNECTIONS: Final = 1024


def raise_fd_limit() -> int:
    """Raise the soft limit of open files to the hard limit. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def shares(files: int, max_queued: int) -> tuple[int, int]:
    """The maximum connections of the external port and of each other port, which leave files for the worker itself.

    The external port gets all but 3/8 of the files, or all but 4096 where there are many.
    """
    return min(max_queued + SPARE_CONNECTIONS, files - min(files * 3 // 8, 4096)), min(LOCAL_CONNECTIONS, files // 16)


def listen(port: int, *, host: str | None, variable: str) -> socket.socket:
    """A listening socket; host None is every address of this machine, with IPv6 if it has that.

    Raises:
        CannotStart: it cannot be opened; the sentence names the variable that sets the port.
    """
    try:
        if host is None and socket.has_dualstack_ipv6():
            sock = _create(("", port), socket.AF_INET6, dualstack=True)
        else:
            family = socket.AF_INET6 if host is not None and ":" in host else socket.AF_INET
            sock = _create((host or "", port), family, dualstack=False)
    except OSError as error:
        where = f"{host or '*'}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"{variable}: {where} is taken by another process; is this command running already? set {variable}"
            ) from error
        raise CannotStart(f"{variable}: {where} cannot be listened on: {error.strerror or error}") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def tls(certificate: Path = CERTIFICATE, key: Path = PRIVATE_KEY) -> ssl.SSLContext:
    """The TLS context of the external port.

    Raises:
        CannotStart: the certificate or its key cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise CannotStart(f"USE_SSL: {certificate} and {key} are no matching pair of PEM files: {error}") from error
    except OSError as error:
        raise CannotStart(f"USE_SSL: {certificate} or {key} cannot be read: {error.strerror}") from error
    return context


def _create(address: tuple[str, int], family: socket.AddressFamily, *, dualstack: bool) -> socket.socket:
    return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=dualstack)
