"""Crowds of strangers who never send a whole request: what they cost a worker, and whether honest callers are served.

    python -m stress.crowds [--tls] [--seconds 15] [--share 1.0] [--only NAME]

    packed      1,000 with a body of a kilobyte that unpacks to a megabyte, and never ends
    large       1,000 with a body of 128 KiB but for its last bytes
    heads       4,300 with a head and no body: more than the port has places for
    silent      4,300 that connect and send nothing; with --tls the beginning of a handshake

Who is cut comes again. Beside each crowd an honest caller claims seven times a second, on a new connection. Memory is
that of the worker: before the crowd, at its highest, and a while after all have left.

Prints the figures; exit code 1 if a caller was not served.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import ssl
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

import psutil
import trustme

from nullworker.http.sockets import raise_fd_limit
from nullworker.testing import FakeAutoscaler
from stress.load import line_of, worker_env

#: Connections that are being made at once, so that the kernel's queue does not overflow.
AT_ONCE: Final = 100
#: Seconds between two honest callers, and for one to be served.
HONEST_SECONDS: Final = 0.15
PATIENCE_SECONDS: Final = 10.0
#: The port has so many places and NULL_MAX_QUEUED more.
MAX_QUEUED: Final = 100

HEAD: Final = b"POST /reserve HTTP/1.1\r\nHost: worker\r\n"
PACKED: Final = gzip.compress(bytes(1024 * 1024))

#: `nullworker serve` with a certificate of our own.
SERVE: Final = """
import sys
from pathlib import Path
from nullworker.http import sockets
sockets.tls.__defaults__ = (Path(sys.argv.pop(1)), Path(sys.argv.pop(1)))
from nullworker.cli.commands import main
main()
"""


class Crowd(NamedTuple):
    """So many who send this. `greets`: whether they end their TLS handshake."""

    strangers: int
    sends: bytes
    greets: bool = True


CROWDS: Final = {
    "packed": Crowd(
        1000,
        HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(PACKED), PACKED),
    ),
    "large": Crowd(1000, HEAD + b"Content-Length: 131072\r\n\r\n" + bytes(131_000)),
    "heads": Crowd(4300, HEAD + b"Content-Length: 1000\r\n\r\n"),
    "silent": Crowd(4300, b"", greets=False),
}
#: The first bytes of a TLS record with a ClientHello of 512 bytes.
HELLO: Final = b"\x16\x03\x01\x02\x00\x01\x00\x01"


class Seen(NamedTuple):
    """Memory in MB; how long each honest caller took in seconds, None: was not served; cuts of strangers."""

    before: float
    peak: float
    after: float
    honest: list[float | None]
    cuts: int


class Visit:
    """One crowd at a worker's external port, and the honest callers beside it."""

    def __init__(self, vast: FakeAutoscaler, url: str, process: psutil.Process, tls: ssl.SSLContext | None) -> None:
        self._vast, self._url, self._process, self._tls = vast, url, process, tls
        self._port = int(url.rpartition(":")[2])
        self._door = asyncio.Semaphore(AT_ONCE)
        self._cuts = 0

    async def see(self, crowd: Crowd, seconds: float, share: float, rest: float) -> Seen:
        """Let `share` of the strangers come for so many seconds, and look at the memory again after `rest`."""
        before = peak = self._memory()
        honest: list[asyncio.Task[float | None]] = []
        strangers = [asyncio.ensure_future(self._stranger(crowd)) for _ in range(int(crowd.strangers * share))]
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            honest.append(asyncio.ensure_future(self._claim()))
            await asyncio.sleep(HONEST_SECONDS)
            peak = max(peak, self._memory())
        took = await asyncio.gather(*honest)
        peak = max(peak, self._memory())
        for stranger in strangers:
            stranger.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        await asyncio.sleep(rest)
        return Seen(before, peak, self._memory(), took, self._cuts)

    def _memory(self) -> float:
        return float(self._process.memory_info().rss / 1e6)

    async def _connect(self, *, greets: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._tls is None or not greets:
            return await asyncio.open_connection("127.0.0.1", self._port)
        return await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls, server_hostname="localhost")

    async def _stranger(self, crowd: Crowd) -> None:
        """Comes again whenever it is cut."""
        sends = crowd.sends if crowd.greets or self._tls is None else HELLO
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with self._door:
                    reader, writer = await self._connect(greets=crowd.greets)
                try:
                    writer.write(sends)
                    await reader.read()
                    self._cuts += 1
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.1)

    async def _claim(self) -> float | None:
        """One honest caller: seconds until it was served."""
        body = json.dumps({"auth_data": self._vast.grant(self._url), "payload": {"duration": 0}}).encode()
        began = time.monotonic()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.wait_for(self._connect(), PATIENCE_SECONDS)
            try:
                writer.write(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
            finally:
                writer.transport.abort()
            if answer.startswith(b"HTTP/1.1 200"):
                return time.monotonic() - began
        return None


async def run(
    folder: Path, *, tls: bool, seconds: float, share: float = 1.0, only: str | None = None, rest: float = 10.0
) -> dict[str, Seen]:
    """All crowds or one, one after the other, at one worker."""
    pair = trustme.CA()
    issued = pair.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(folder / "crt"))
    issued.private_key_pem.write_to_path(str(folder / "key"))
    context = None
    if tls:
        context = ssl.create_default_context()
        pair.configure_trust(context)
    async with FakeAutoscaler() as vast:
        with (folder / "lines").open("wb") as lines:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SERVE, str(folder / "crt"), str(folder / "key"), "serve"),
                env={
                    **worker_env(vast, folder),
                    "USE_SSL": str(tls).lower(),
                    "NULL_MAX_QUEUED": str(MAX_QUEUED),
                },
                stderr=lines,
            )
        found = {}
        try:
            started = await line_of(folder / "lines", "worker_started")
            await line_of(folder / "lines", "key_loaded")
            url = f"http{'s' * tls}://127.0.0.1:{started['external_port']}"
            process = psutil.Process(worker.pid)
            print(f"load {os.getloadavg()[0]:.1f}, {'TLS' if tls else 'plain'}; memory in MB: before, highest, after")
            for name, crowd in CROWDS.items():
                if only in (None, name):
                    found[name] = await Visit(vast, url, process, context).see(crowd, seconds, share, rest)
                    tell(name, int(crowd.strangers * share), found[name])
        finally:
            worker.terminate()
            await worker.wait()
    return found


def tell(name: str, strangers: int, seen: Seen) -> None:
    """Print one line."""
    served = sorted(each for each in seen.honest if each is not None)
    waited = f"p50 {statistics.median(served) * 1000:.0f} ms, worst {served[-1] * 1000:.0f} ms" if served else "-"
    memory = f"{seen.before:4.0f} {seen.peak:4.0f} {seen.after:4.0f}"
    print(
        f"{name:8}{strangers:6}  {memory}  served {len(served)} of {len(seen.honest)}, {waited}; {seen.cuts} cuts",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tls", action="store_true", help="over TLS, as in Vast's template")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each crowd stays")
    parser.add_argument("--share", type=float, default=1.0, help="of the strangers, how many come")
    parser.add_argument("--only", choices=CROWDS, help="one of the crowds")
    arguments = parser.parse_args()
    needed = 2 * max(crowd.strangers for crowd in CROWDS.values())
    if raise_fd_limit() < needed:
        parser.error(f"this needs {needed} open files: ulimit -Hn {needed}")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder), **vars(arguments)))
    sys.exit(any(None in seen.honest for seen in found.values()))


if __name__ == "__main__":
    main()
