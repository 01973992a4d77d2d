"""One worker of a local fleet: a number with fixed ports and an event log, its process, and the consumer beside it.

A consumer starts after its worker and ends after it, so that it can still release; it outlives a worker that has died
and is started again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from nullworker.errors import CannotStart
from nullworker.http.sockets import listen
from nullworker.processes import ChildProcess, OrphanGuard, how_it_ended

#: Seconds that a stop may take beyond NULL_DRAIN_SECONDS: 3, doubled for a busy machine.
STOP_SECONDS: Final = 6.0
#: Seconds between SIGTERM and SIGKILL for a consumer; `nullworker work` gives 5 of them to its command.
CONSUMER_SECONDS: Final = 7.0
#: The same after `hurry`.
HURRY_SECONDS: Final = 1.0
#: Seconds until a consumer that has ended by itself is started again.
CONSUMER_PAUSE_SECONDS: Final = 1.0
ROOT: Final = Path(__file__).parents[2]
#: Settings of every worker of a fleet, which override the environment; an empty value means unset.
COMMON: Final = {
    "PUBLIC_IPADDR": "127.0.0.1",
    "WORKER_HTTP_PORT": "",  # the port after WORKER_PORT
    "NULL_METRICS_HOST": "",  # a single port cannot serve several workers
    "NULL_METRICS_PORT": "",
    "USE_SSL": "false",
    "UNSECURED": "false",
}

State = Literal["starting", "ready", "held", "errored", "stopping", "dead", "cold", "gone"]


class Change(NamedTuple):
    """A change of a worker's state. `at`: epoch seconds; `why`: a reason, or empty."""

    at: float
    worker: int
    state: State
    why: str


@dataclass
class Plan:
    """How to start the workers of a fleet.

    Attributes:
        folder: where the logs of workers and consumers are.
        env: the environment of every worker and consumer; number, ports and addresses are added.
        perf: a worker's max_perf.
        drain: a worker's NULL_DRAIN_SECONDS.
        consumer: a command that runs beside each worker, in `consumer_folder` or `folder`. Its environment has
            NULL_CONTROL_PORT, its worker's, and HEALTH_PORT, a free port on which it may serve its health.
        first_port, first_control_port: ports of the first worker; further workers use the next ones. 0: any free port.
        loading: seconds that a worker may take to become ready.
    """

    folder: Path
    env: Mapping[str, str]
    perf: float = 100.0
    drain: float = 5.0
    consumer: Sequence[str] = ()
    consumer_folder: Path | None = None
    first_port: int = 0
    first_control_port: int = 0
    loading: float = 60.0


class FleetWorker:
    """One worker. Times are epoch seconds.

    Attributes:
        since: when its state last changed; `started_at`: when its process was started.
        consumer_failed: how its consumer ended unexpectedly, in words; empty if it did not.
        held_by: the request_idx of its held reservation, from its last report; `queued`: the length of its queue.
        was_ready: whether its present process has been ready.
        idle_since: since when it has been ready and idle.
        replaced: whether its number is not used again.
    """

    def __init__(self, number: int, plan: Plan, guard: OrphanGuard) -> None:
        self.number = number
        self.log = plan.folder / f"nullworker-{number}.db"
        self.state: State = "cold"
        self.since = self.started_at = self.idle_since = 0.0
        self.port = self.control_port = 0
        self.held_by: int | None = None
        self.queued = 0
        self.was_ready = self.replaced = False
        self.consumer_failed = ""
        self.worker: ChildProcess | None = None
        self.consumer: ChildProcess | None = None
        self._plan, self._guard = plan, guard
        self._env: dict[str, str] = {}
        self._consumer_at = 0.0
        self._patience = CONSUMER_SECONDS
        self._again_at = 0.0

    @property
    def runs(self) -> bool:
        """Whether its worker or its consumer runs."""
        return self.worker is not None or self.consumer is not None

    def start(self, vast: str, token: str, taken: Collection[int]) -> None:
        """Start its process, which reports to the fake autoscaler at `vast`; `taken`: ports of other workers."""
        plan = self._plan
        # step 2, since the next port is WORKER_HTTP_PORT; after a restart the same, for a consumer that still runs
        self.port = free_port(self.port or plan.first_port, taken, step=2, host=None)
        first = self.control_port or plan.first_control_port
        self.control_port = free_port(first, {*taken, self.port, self.port + 1}, step=1, host="127.0.0.1")
        self.was_ready = self.replaced = False
        self._env = {name: value for name, value in plan.env.items() if not name.startswith("VAST_TCP_PORT_")} | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), plan.env.get("PYTHONPATH")))),
            "CONTAINER_ID": str(self.number),
            "MASTER_TOKEN": token,
            "REPORT_ADDR": vast,
            "WORKER_PORT": str(self.port),
            "NULL_CONTROL_PORT": str(self.control_port),
            "NULL_EVENT_LOG": str(self.log),
            "HEALTH_PORT": str(free_port(0, (), step=1, host=None)),
            **COMMON,
        }
        self.worker = self._spawn("worker", (sys.executable, "-m", "nullworker", "serve"), plan.folder)

    def stop(self, now: float) -> None:
        """Send SIGTERM; a held reservation may finish within the drain time."""
        if self.worker is not None:
            self.worker.end(now + self._plan.drain + STOP_SECONDS)

    def hurry(self, now: float) -> None:
        """Send a second SIGTERM, which cancels the held reservation at once."""
        self._patience = HURRY_SECONDS
        if self.worker is not None:
            self._repeat_end(now)
        elif self.consumer is not None:
            self.consumer.end(now + self._patience)

    def _repeat_end(self, now: float) -> None:
        """Repeat SIGTERM, since a process sees two simultaneous signals as one."""
        if self.worker is not None and self._patience == HURRY_SECONDS and now >= self._again_at:
            self.worker.end(now + STOP_SECONDS)
            self._again_at = now + HURRY_SECONDS

    def reap(self, now: float) -> int | None:
        """The exit code of its process, once, when it has ended; else None."""
        self._tend_consumer(now)
        self._repeat_end(now)
        code = None
        if self.worker is not None and (code := self.worker.poll(now)) is not None:
            self.worker, self.held_by, self.queued = None, None, 0
        return code

    def file(self, what: str) -> Path:
        """The file with the output of its worker or its consumer."""
        return self._plan.folder / f"{what}-{self.number}.log"

    def _tend_consumer(self, now: float) -> None:
        if self.consumer is not None and (code := self.consumer.poll(now)) is not None:
            if not self.consumer.ending:
                self.consumer_failed = f"its consumer has ended, {how_it_ended(code)}, and is started again"
            self.consumer, self._consumer_at = None, now + CONSUMER_PAUSE_SECONDS
        if self.worker is None:
            self._consumer_at = 0.0
            if self.consumer is not None and not self.consumer.ending and self.state != "dead":
                self.consumer.end(now + self._patience)
        elif self.consumer is None and self._plan.consumer and now >= self._consumer_at and not self.worker.ending:
            self.consumer = self._spawn(
                "consumer", self._plan.consumer, self._plan.consumer_folder or self._plan.folder
            )

    def _spawn(self, what: str, command: Sequence[str], folder: Path) -> ChildProcess:
        try:
            return ChildProcess(command, env=self._env, cwd=folder, out=self.file(what), guard=self._guard)
        except OSError as error:
            raise CannotStart(f"{command[0]} cannot be started: {error.strerror}") from error


def free_port(first: int, taken: Collection[int], *, step: int, host: str | None) -> int:
    """The first free port from `first` on; 0: any. Another process may take it before the worker does.

    Raises:
        CannotStart: no port is free.
    """
    if first == 0:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])
    for port in range(first, 65536, step):
        if port not in taken:
            with contextlib.suppress(CannotStart):
                listen(port, host=host, variable="").close()
                return port
    raise CannotStart(f"no port from {first} on is free")
