"""Real worker processes for tests: started on free ports, stopped by signals, observed by their log lines and log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import forks

from nullworker.eventlog.opening import open_log
from nullworker.fsm.events import Ended, Event, Held, Queued, SessionTerms
from nullworker.testing import FakeAutoscaler

ROOT = Path(__file__).parents[2]


def changed(**constants: float) -> tuple[str, ...]:
    """`nullworker serve` with other constants: `nullworker__http__server__PATIENCE_SECONDS=0.2`; for `module`."""
    script = "import importlib\nfrom nullworker.cli.commands import main\n"
    for name, value in constants.items():
        module, _, constant = name.replace("__", ".").rpartition(".")
        script += f"importlib.import_module({module!r}).{constant} = {value}\n"
    return ("-c", f"{script}main()", "serve")


#: `nullworker serve`, for which no ping comes too early to move a deadline.
EACH_PING_RENEWS = changed(nullworker__fsm__book__SMALLEST_RENEWAL_SECONDS=0)
#: Seconds after which a test stops waiting for something that should take far less.
PATIENCE = 20.0
#: Lines of a process that are shown when the one that was waited for does not come.
LAST_LINES = 30


class Answer(NamedTuple):
    """An HTTP answer, read to its end. `body` is the JSON of a JSON answer, else the text."""

    status: int
    body: Any
    headers: Mapping[str, str]


def signed(
    vast: FakeAutoscaler, url: str, payload: Any = None, *, session_id: str | None = None, **auth: Any
) -> dict[str, Any]:
    """The body of a signed POST, with a grant of the stand-in for the worker at url; `auth` goes over its fields."""
    return {"auth_data": {**vast.grant(url), **auth}, "payload": payload or {}, "session_id": session_id}


async def post(url: str, body: Any) -> Answer:
    """POST JSON, over a connection of its own: one that is cancelled is a client that hangs up."""
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
        is_json = answer.content_type == "application/json"
        return Answer(answer.status, await (answer.json() if is_json else answer.text()), answer.headers)


def secured(folder: Path, vast: FakeAutoscaler, **env: Any) -> WorkerProcess:
    """A worker that checks signatures and reports to the stand-in; it takes claims from its line `key_loaded` on."""
    return WorkerProcess(folder, CONTAINER_ID="7", MASTER_TOKEN="master-secret", REPORT_ADDR=vast.url, **env)


def leave_session(
    db: Path, *, begun: float, ended: float | None = None, route: str | None = None, request_idx: int | None = None
) -> None:
    """A log with one session, `old`, of a minute in it, as a worker left it that has gone since. Epoch seconds."""
    terms = SessionTerms(lifetime=60, on_close_route=route)
    queued = Queued(kind="session", duration_cap=60, give_up_at=begun + 30, session=terms, request_idx=request_idx)
    events = [Event(begun, "old", "queued", None, queued), Event(begun, "old", "held", None, Held(begun + 60))]
    if ended is not None:
        events.append(Event(ended, "old", "expired", "duration_elapsed", Ended()))
    log = open_log(db)
    log.append(list(enumerate(events, 1)))
    log.close()


class LogLines:
    """What one process says on stderr, read to its end: `lines` so far, each a dict with the word `event`.

    A line that is no JSON has the word "" and its `text`.
    """

    def __init__(self, process: asyncio.subprocess.Process | forks.ForkedProcess) -> None:
        self.lines: list[dict[str, Any]] = []
        self._process = process
        self._arrived = asyncio.Condition()
        self._ended = False
        self._reader = asyncio.ensure_future(self._read())

    async def line(self, event: str, nth: int, where: Callable[[dict[str, Any]], bool] | None) -> Any:
        """The nth line with that word, once it is there. It fails at once when no more lines can come."""

        def found() -> list[dict[str, Any]]:
            return [each for each in self.lines if each.get("event") == event and (where is None or where(each))]

        with contextlib.suppress(asyncio.TimeoutError):
            async with self._arrived:
                await asyncio.wait_for(self._arrived.wait_for(lambda: len(found()) >= nth or self._ended), PATIENCE)
        if len(found()) >= nth:
            return found()[nth - 1]
        end = f"has ended with code {await self._process.wait()}" if self._ended else "runs"
        said = "\n".join(each.get("text") or json.dumps(each) for each in self.lines[-LAST_LINES:])
        raise AssertionError(f"no line {event!r} number {nth}; the process {end}, and its last lines are:\n{said}")

    async def to_the_end(self) -> None:
        """Until nobody can say anything more: neither the process nor what it has started and left."""
        await asyncio.wait({self._reader}, timeout=PATIENCE)
        self._reader.cancel()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for raw in self._process.stderr:
            try:
                line = json.loads(raw)
            except ValueError:
                line = {"event": "", "text": raw.decode(errors="replace").rstrip()}
            async with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()
        async with self._arrived:
            self._ended = True
            self._arrived.notify_all()


P = TypeVar("P", bound="LoggedProcess")


class LoggedProcess:
    """A command in a folder, told by signals and read by its log lines. Its stdout goes to the file `out`, if any.

    Python programs are forks (forks.py), but for those that are made by `anew`.
    """

    def __init__(self, folder: Path, command: Sequence[str], env: dict[str, str], out: Path = Path(os.devnull)) -> None:
        self.folder, self.env, self.out, self.new = folder, env, out, False
        self.process: asyncio.subprocess.Process | forks.ForkedProcess
        self._command = command
        self._said: LogLines

    async def __aenter__(self: P) -> P:
        try:
            await self.start()
        except BaseException:  # no __aexit__ is called
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._said.to_the_end()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it has said since it was last started."""
        return self._said.lines

    async def spawn(self) -> None:
        """Start it, or start it again, without waiting for anything."""
        with self.out.open("ab") as out:
            self.process = await forks.start(self._command, cwd=self.folder, env=self.env, out=out, new=self.new)
        self._said = LogLines(self.process)

    async def start(self) -> None:
        """Start it, or start it again, and wait until it is there."""
        await self.spawn()

    async def line(self, event: str, *, nth: int = 1, where: Callable[[dict[str, Any]], bool] | None = None) -> Any:
        """The nth log line with that word, once it is there."""
        return await self._said.line(event, nth, where)

    async def kill(self) -> None:
        """kill -9. What it has started may live on, and write where it wrote."""
        self.process.kill()
        await self.process.wait()

    async def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(number)
        return await self.exit_code()

    async def exit_code(self) -> int:
        """Wait for its end."""
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        await self._said.to_the_end()
        return code


def anew(process: P) -> P:
    """The same, started as a new interpreter."""
    process.new = True
    return process


class WorkerProcess(LoggedProcess):
    """`python -m nullworker serve` in a folder. `env` are its settings; unsecured and standalone by default.

    Ports are any free ones.
    """

    def __init__(self, folder: Path, *, module: tuple[str, ...] = ("-m", "nullworker", "serve"), **env: str) -> None:
        self.db = folder / "nullworker.db"
        # Nothing of the environment of the tests but what a process needs; the settings are the test's own.
        own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | {
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
            "WORKER_PORT": "0",
            "NULL_CONTROL_PORT": "0",
            "NULL_LOG_FORMAT": "json",
            "NULL_EVENT_LOG": str(self.db),
            **({} if "CONTAINER_ID" in env else {"UNSECURED": "true"}),
            **env,
        }
        super().__init__(folder, (sys.executable, *module), own)

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        await super().start()
        started = await self.line("worker_started")
        self.port, self.control_port = started["external_port"], started["control_port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.control = f"http://127.0.0.1:{self.control_port}"

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the event log, as somebody with a SQLite shell would."""
        conn = sqlite3.connect(self.db)
        try:
            return conn.execute(query, values).fetchall()
        finally:
            conn.close()

    def story(self) -> list[tuple[str, str | None]]:
        """Kind and reason of every event, in order."""
        return [(kind, reason) for kind, reason in self.sql("SELECT kind, reason FROM events ORDER BY seq")]

    async def release(self, **body: Any) -> dict[str, Any]:
        """POST /release."""
        async with aiohttp.ClientSession() as http, http.post(self.control + "/release", json=body) as answer:
            result: dict[str, Any] = await answer.json()
            return result

    async def get(self, path: str) -> Any:
        """GET from the control port; the JSON."""
        async with aiohttp.ClientSession() as http, http.get(self.control + path) as answer:
            return await answer.json()

    async def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        async with aiohttp.ClientSession() as http, http.get(self.control + "/metrics") as answer:
            text = await answer.text()
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        ]
        assert len(values) == 1, f"{name}{labels} has {len(values)} samples"
        return float(values[0])
