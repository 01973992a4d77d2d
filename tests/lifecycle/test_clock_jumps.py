"""The wall clock jumps by an hour while a reservation is held: it ends neither early nor late."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from harness import WorkerProcess, post
from programs import answered, caller

from nullworker.clock import from_iso

HOUR = 3600


class WallClock:
    """libfaketime's file: the worker's wall clock, set while it runs; its monotonic clock is left alone."""

    def __init__(self, folder: Path) -> None:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        assert libraries, "install libfaketime (Debian: apt install faketime)"
        self._file = folder / "faketime"
        self.set(0)
        self.env: dict[str, Any] = {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
        }

    def set(self, seconds: int) -> None:
        """So far from the true time."""
        self._file.write_text(f"{seconds:+d}s\n")


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_a_step_of_the_wall_clock_neither_ends_nor_prolongs_what_is_held(tmp_path: Path, step: int) -> None:
    clock = WallClock(tmp_path)
    async with WorkerProcess(tmp_path, **clock.env) as worker:
        held = asyncio.ensure_future(post(worker.url + "/reserve", {"duration": 2}))
        await worker.line("reservation_held")
        clock.set(step)
        # the step is seen: a line is stamped with the wall clock, an event with the worker's own time
        queued = asyncio.ensure_future(post(worker.url + "/reserve", {}))
        line = await worker.line("reservation_queued", nth=2)
        ((at,),) = worker.sql("SELECT at FROM events WHERE seq = 3")
        assert round((from_iso(line["timestamp"]) - at) / HOUR) == step / HOUR
        assert (await held).body == {"released": "duration_elapsed", "duration": 2}
        await worker.line("reservation_held", nth=2)
        assert await worker.release() == {"released": True}
        assert (await queued).status == 200
        times = [at for (at,) in worker.sql("SELECT at FROM events ORDER BY seq")]
        assert times == sorted(times)
        assert 2 <= times[3] - times[1] < 4


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_a_deadline_set_after_a_step_is_kept_whatever_was_set_before_it(tmp_path: Path, step: int) -> None:
    clock = WallClock(tmp_path)
    async with WorkerProcess(tmp_path, **clock.env) as worker:
        async with caller(worker, duration=3000) as asked:
            await worker.line("reservation_held")
            assert await worker.release() == {"released": True}
            await answered(asked)
        clock.set(step)
        assert (await post(worker.url + "/reserve", {"duration": 0.5})).body["released"] == "duration_elapsed"
        await worker.line("clock_moved")


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_a_step_while_the_worker_is_away_leaves_a_session_its_time(tmp_path: Path, step: int) -> None:
    clock = WallClock(tmp_path)
    async with WorkerProcess(tmp_path, **clock.env) as worker:
        await post(worker.url + "/session/create", {"lifetime": 60})
        ends_at = (await worker.get("/reservation"))["ends_at"]
        await worker.kill()
        clock.set(step)
        await worker.start()
        held = await worker.get("/reservation")
        assert (held["state"], held["ends_at"]) == ("held", ends_at)
        assert held["held_seconds"] < 60
        await worker.release()
        # nothing is held any more: the next one is timed by the clock as it now is
        await post(worker.url + "/session/create", {"lifetime": 60})
        moved = from_iso((await worker.get("/reservation"))["ends_at"]) - from_iso(ends_at)
        assert round(moved / HOUR) == step / HOUR
