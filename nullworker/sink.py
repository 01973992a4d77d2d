"""POSTs every event of the log to NULL_SINK, in order and at least once, from a cursor in the log.

Appends wake it; a hold never waits for it. An event is sent at once after a quiet PACE_SECONDS, else PACE_SECONDS after
the last POST, because a POST for each event would cost more than the reservation. The cursor belongs to the URL and
moves at each 2xx; a receiver recognizes a repetition by `source` and `id`.

A batch that is refused (400, 413, 422) is halved until the refused event is found. That event is set aside in `settled`
only if this receiver has accepted another one since the start, because a wrong path refuses everything. All other
failures are retried without limit.

Events of the worker itself (started, alive, stopped) are not in the log and are sent at most once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import aiohttp

from nullworker import __version__, aio
from nullworker.aio import AutoResetEvent, Backoff
from nullworker.errors import LogUnavailable
from nullworker.eventlog import cloudevents
from nullworker.eventlog.log import EventLog
from nullworker.logs import get_log
from nullworker.outgoing import describe_failure, forget_frames, http_session, is_elsewhere
from nullworker.settings import without_secrets

log = get_log(__name__)

#: Events and bytes of one POST.
BATCH_EVENTS: Final = 500
BATCH_BYTES: Final = 1024 * 1024 - 4096  # below 1 MiB with its brackets and commas
#: Seconds from one POST to the next, and between two tries of the last ones.
PACE_SECONDS: Final = 0.2
#: Seconds until the first retry, and between two at most. Short: a machine may be destroyed with unsent events.
RETRY_SECONDS: Final = (0.2, 2.0)
#: Seconds that a POST may take, and one during the stop.
CALL_SECONDS, LAST_CALL_SECONDS = 10.0, 2.0
#: Seconds after which an outage that goes on for the same reason is warned about again.
WARN_SECONDS: Final = 60.0
#: Seconds without a POST after which the worker sends `alive`.
ALIVE_SECONDS: Final = 60.0
#: Seconds for nvidia-smi.
GPU_SECONDS: Final = 5.0
#: Statuses with which a receiver refuses the body itself.
REFUSALS: Final = frozenset((400, 413, 422))

Outcome = Literal["accepted", "refused", "failed", "unknown"]


@dataclass(frozen=True)
class Target:
    """Where events are sent, and which parts of them."""

    url: str
    token: str | None
    form: cloudevents.Format
    with_results: bool
    with_metadata: bool


class _Item(NamedTuple):
    """One event of a batch: its JSON, and its seq, or None for an event of the worker itself."""

    body: bytes
    seq: int | None


class Sink:
    """Add `appended` to the log's listeners, then run `run`; at the end `hurry`, `finish`, `close`.

    Args:
        now: the worker's clock, in epoch seconds.
        count: called with a word of the metric's SINK_RESULTS and a number.

    Attributes:
        backlog: events that the receiver has not accepted.
        trouble: why the last POST was not accepted; None after one that was.
        shown: the URL as it may be shown.
    """

    def __init__(
        self,
        target: Target,
        event_log: EventLog,
        now: Callable[[], float],
        count: Callable[[str, int], None],
        *,
        instance: str,
        own_url: str,
    ) -> None:
        self.shown = without_secrets(target.url)
        self.trouble: str | None = "no POST has been answered yet"
        self._target = target
        self._log = event_log
        self._now = now
        self._count = count
        self._instance, self._own_url = instance, own_url
        self._source = cloudevents.source(instance, event_log.log_id)
        self._name = cursor_name(target.url, event_log.sink_key)
        self._cursor = event_log.cursor(self._name)
        self.backlog = self._count_backlog()
        self._worker_events: list[tuple[cloudevents.WorkerKind, float, dict[str, Any]]] = []
        self._size = BATCH_EVENTS
        self._has_accepted = False
        self._hurried = False
        self._next_post = 0.0  # loop time
        self._warned: tuple[str | None, float] = (None, 0.0)  # why, and the loop time from which it is said again
        self._wake, self._hurry, self._empty = AutoResetEvent(), AutoResetEvent(), asyncio.Event()
        self._call: asyncio.Task[Outcome] | None = None
        self._http: aiohttp.ClientSession | None = None
        with contextlib.suppress(LogUnavailable):  # tried again by the first move of the cursor
            event_log.set_sink(self._name)
            event_log.move_cursor(self._name, self._cursor)

    def appended(self, events: int, _: float) -> None:
        """A listener of the log: it now has this many events."""
        self.backlog += events
        self._empty.clear()
        self._wake.set()

    async def run(self) -> None:
        """Deliver for as long as the worker lives."""
        starting = asyncio.ensure_future(self._add_started())
        backoff = Backoff(*RETRY_SECONDS)
        try:
            while True:
                if not self._worker_events and self._cursor >= self._log.last_seq:
                    self._empty.set()
                    if not await self._wake.wait(ALIVE_SECONDS):
                        self._add_worker_event("alive")
                    continue
                await self._pace()
                if await self._deliver():
                    backoff.worked()
                elif self._hurried:
                    await asyncio.sleep(PACE_SECONDS)
                else:
                    await self._hurry.wait(backoff.failed())
        finally:
            starting.cancel()

    def hurry(self) -> None:
        """The worker is stopping: from now on, no backoff, and short time limits."""
        self._hurried = True
        self._hurry.set()
        if self._call is not None:
            asyncio.get_running_loop().call_later(LAST_CALL_SECONDS, self._call.cancel)

    async def finish(self, seconds: float) -> None:
        """Deliver the rest, and `stopped`, within `seconds`. To be called while `run` runs."""
        self.hurry()
        self._add_worker_event("stopped")
        try:
            await aio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            left = "they stay in the log for the next start, and are lost if this machine is destroyed"
            log.warning(
                "sink_backlog_left",
                events=self.backlog,
                sink=self.shown,
                why=self.trouble,
                message=left if self.backlog else "only the message that the worker has stopped is lost",
            )

    async def close(self) -> None:
        """Close its connections."""
        if self._http is not None:
            await self._http.close()

    # -- one delivery ----------------------------------------------------------------------------------------------

    async def _deliver(self) -> bool:
        """Send a batch and act on the answer. False: try again, later."""
        try:
            items = self._compose()
        except sqlite3.Error as error:
            log.error("sink_not_read", error=str(error), message="the event log cannot be read; trying again")
            return False
        except Exception:  # the sink is optional and must not end the worker
            log.exception("sink_failed", after=self._cursor)
            return False
        if not items:  # all events were unsendable, and are set aside
            return True
        self._call = call = asyncio.ensure_future(self._post([item.body for item in items]))
        try:
            await asyncio.wait({call})  # not the call itself: its own cancellation would look like that of `run`
        finally:
            call.cancel()
            self._call = None
        if call.cancelled():
            self.trouble = "no answer before the end of the worker"
        outcome: Outcome = "unknown" if call.cancelled() else call.result()
        self._count("failed" if outcome == "unknown" else outcome, 1)
        return self._act(outcome, items)

    def _act(self, outcome: Outcome, items: list[_Item]) -> bool:
        worker_events = sum(item.seq is None for item in items)
        if outcome == "accepted":
            self.trouble = None
            self._warned = (None, 0.0)
            self._has_accepted = True
            self._size = min(self._size * 2, BATCH_EVENTS)
            del self._worker_events[:worker_events]
            self._move(items)
            return True
        if outcome == "unknown":
            del self._worker_events[:worker_events]  # at most once: it may have arrived
        if outcome == "refused":
            if len(items) > 1:
                self._size = len(items) // 2
                return True
            if items[0].seq is None:
                del self._worker_events[0]
                return True
            if self._has_accepted:
                return self._set_aside(items[0])
        self._warn()
        return False

    def _warn(self) -> None:
        now = asyncio.get_running_loop().time()
        said, again_at = self._warned
        if said == self.trouble and now < again_at:
            return
        self._warned = (self.trouble, now + WARN_SECONDS)
        log.warning("sink_not_reached", sink=self.shown, why=self.trouble, owed=self.backlog, message="trying again")

    def _compose(self) -> list[_Item]:
        """The next batch: the worker's `started`, the events of the log, and after all of them, `stopped`."""
        rows = self._log.conn.execute(
            "SELECT seq, at, reservation_id, kind, reason, data FROM events WHERE seq > ? ORDER BY seq LIMIT ?",
            (self._cursor, self._size),
        ).fetchall()
        first = [event for event in self._worker_events if event[0] == "started"]
        last = (
            []
            if rows and rows[-1][0] < self._log.last_seq
            else [event for event in self._worker_events if event[0] != "started"]
        )
        items = [self._worker_event(note) for note in first]
        size = sum(len(item.body) for item in items)
        for row in rows[: max(self._size - len(items), 0)]:
            try:
                event = cloudevents.reservation_event(
                    self._source,
                    row,
                    with_metadata=self._target.with_metadata,
                    with_results=self._target.with_results,
                )
                body = cloudevents.encode(event)
            except (ValueError, TypeError, AttributeError):
                if items:
                    break
                self.trouble = "the event cannot be encoded"
                self._set_aside(_Item(b"", row[0]))
                break
            if items and size + len(body) + 1 > BATCH_BYTES:
                break
            items.append(_Item(body, row[0]))
            size += len(body) + 1
        complete = not rows or (bool(items) and items[-1].seq == rows[-1][0])
        if complete and len(items) + len(last) <= max(self._size, 1):
            items += [self._worker_event(note) for note in last]
        return items

    def _worker_event(self, note: tuple[cloudevents.WorkerKind, float, dict[str, Any]]) -> _Item:
        kind, at, data = note
        event = cloudevents.worker_event(self._source, kind, at, {**data, "clock": self._now()})
        return _Item(cloudevents.encode(event), None)

    async def _post(self, events: list[bytes]) -> Outcome:
        body, content_type = cloudevents.batch(events, self._target.form)
        headers = {"Content-Type": content_type, cloudevents.KEY_HEADER: self._log.sink_key}
        if self._target.token:
            headers["Authorization"] = f"Bearer {self._target.token}"
        if self._http is None:
            self._http = http_session(trust_env=is_elsewhere(self._target.url))
        seconds = LAST_CALL_SECONDS if self._hurried else CALL_SECONDS
        try:
            async with self._http.post(
                self._target.url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=seconds),
                allow_redirects=False,
            ) as answer:
                if 200 <= answer.status < 300:
                    return "accepted"
                self.trouble = f"it answered {answer.status}"
                return "refused" if answer.status in REFUSALS else "failed"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            forget_frames(error)
            self.trouble = describe_failure(error)
            return "failed" if isinstance(error, aiohttp.ClientConnectorError) else "unknown"

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._hurried and (wait := self._next_post - loop.time()) > 0:
            await self._hurry.wait(wait)
        self._next_post = loop.time() + PACE_SECONDS

    # -- the log ---------------------------------------------------------------------------------------------------

    def _move(self, items: list[_Item]) -> None:
        seqs = [item.seq for item in items if item.seq is not None]
        if not seqs:
            return
        self._cursor = seqs[-1]
        self.backlog = max(self.backlog - len(seqs), 0)
        try:
            self._log.move_cursor(self._name, self._cursor)
        except LogUnavailable as error:
            log.warning("cursor_not_moved", error=str(error), message="delivered events are sent again after a restart")

    def _set_aside(self, item: _Item) -> bool:
        """Store that an event was refused for good, for people. False: not stored, so the event is sent again."""
        assert item.seq is not None
        try:
            self._log.settle(self._name, [item.seq], self._now(), "refused", self.trouble)
        except LogUnavailable:
            return False
        self._count("dead_lettered", 1)
        log.error(
            "event_dead_lettered",
            seq=item.seq,
            sink=self.shown,
            why=self.trouble,
            message="the sink accepts other events and refuses this one; it stays in the log and is skipped",
        )
        self._move([item])
        return True

    def _count_backlog(self) -> int:
        query = "SELECT count(*) FROM events WHERE seq > ?"
        unsent = int(self._log.conn.execute(query, (self._cursor,)).fetchone()[0])
        pruned = self._log.last_seq - self._cursor - unsent
        if self._cursor and pruned > 0:  # a new cursor begins at the first event in the log
            self._count("pruned", pruned)
            log.error("events_pruned_unsent", events=pruned, sink=self.shown, message="the sink will never get them")
        return unsent

    # -- events of the worker itself ---------------------------------------------------------------------------------

    def _add_worker_event(self, kind: cloudevents.WorkerKind, data: dict[str, Any] | None = None) -> None:
        self._worker_events.append((kind, self._now(), data or {}))
        self._empty.clear()
        self._wake.set()

    async def _add_started(self) -> None:
        data: dict[str, Any] = {"version": __version__, "url": self._own_url, "instance": self._instance}
        if gpus := await gpu_names():
            data["gpus"] = gpus
        self._add_worker_event("started", data)


def cursor_name(url: str, key: str) -> str:
    """The name of a sink's cursor: a MAC of its URL, which may contain a password, with the log's own key."""
    return f"sink:{hmac.new(key.encode(), url.encode(), hashlib.sha256).hexdigest()[:16]}"


async def gpu_names() -> list[str]:
    """The names of this machine's GPUs by nvidia-smi; empty if it is not installed or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "--query-gpu=name",
            "--format=csv,noheader",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return []
    try:
        out, _ = await aio.wait_for(process.communicate(), GPU_SECONDS)
    except asyncio.TimeoutError:
        return []
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    names = [line.strip()[:100] for line in out.decode(errors="replace").splitlines()]
    return [name for name in names if name] if process.returncode == 0 else []
