"""What befalls the simulated worker: kills, stops, reboots, disks and networks that fail, and people."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from random import Random
from typing import NamedTuple

from nullworker.errors import LogUnavailable
from nullworker.service import PATIENCE_SECONDS
from stress.simulated_process import Incarnation, Life


class World(NamedTuple):
    """Which faults a seed has, and who comes."""

    sync: str
    power_cuts: bool
    disk_trouble: bool
    network_trouble: bool
    harm: bool  # to the -wal, by somebody
    pace: float  # mean seconds between two claims
    sessions: float  # their share
    hanging: float  # the share of owners who never answer

    @classmethod
    def of(cls, random: Random) -> World:
        return cls(
            random.choice(("normal", "full", "full")),
            power_cuts=random.random() < 0.5,
            disk_trouble=random.random() < 0.5,
            network_trouble=random.random() < 0.8,
            harm=random.random() < 0.2,
            pace=random.choice((0.3, 0.3, 1.0, 5.0)),
            sessions=random.choice((0.1, 0.2, 0.8)),
            hanging=random.choice((0.0, 0.0, 0.7)),
        )


class Troubles(Life):
    """One trouble after the other."""

    world: World

    async def chaos(self) -> None:
        """Until the history is over."""
        troubles: list[Callable[[], Awaitable[None]]] = [self.kill, self.kill, self.stop, self.consumer_dies]
        troubles += [self.step_wall_clock, self.network, self.lock, self.shell]
        if self.world.disk_trouble:
            troubles += [self.disk_breaks, self.disk_breaks, self.disk_is_full_while_others_wait]
        if self.world.power_cuts:
            troubles += [self.power_cut, self.power_cut]
        if self.world.harm:
            troubles += [self.harm, self.wal_is_removed]
        while True:
            await asyncio.sleep(self.random.uniform(1.0, 60.0) * min(self.world.pace, 2.0))
            if self.over:
                return
            await self.random.choice(troubles)()

    async def kill(self, *, power_cut: bool = False, harm: bool = False) -> None:
        """kill -9, and a start some time later."""
        if self.random.random() < 0.6:
            await self.until_a_session_is_held()
        assert self.up is not None
        if self.world.disk_trouble and self.random.random() < 0.4:
            self.sync_fails(self.up)
        down, self.up = self.up, None
        self.figures["power_cuts" if power_cut else "kills"] += 1
        self.excuse({each.reservation.id for each in down.service.unwritten})
        unsure, held = down.service.log_is_down, down.service.book.held
        await down.end()
        rows = self.rows() if power_cut or harm else []
        lost = self.disk.crash(power_cut=power_cut)
        assert not lost or self.disk.sync_mode == "normal", "what was synced is not lost"
        self.figures["events_lost_with_the_power"] += lost
        if lost:
            self.excuse({name for _, name, *_ in rows[-lost:]})
            if any((name, reason) == (self.attached, "attached") for _, name, _, reason, _ in rows[-lost:]):
                self.attached = None  # nobody can know any more that a consumer was there
        if power_cut and unsure:  # stress/power_cut.py says why nothing can be said of what was refused
            self.excuse({name for _, name, *_ in self.rows()[-10:]})
        if power_cut:
            self.machine.boot()
            self.machine.step_wall(self.random.choice((0.0, 0.0, -28_800.0, 7_200.0)))
        await asyncio.sleep(self.random.choice((0.1, 1.0, 30.0)))
        harmed = harm and self.disk.harm()
        if held is not None and not (lost or harmed or (power_cut and unsure) or down.service.unwritten):
            self.before = held.id, held.ends_at
        self.start()
        if self.disk.set_aside():
            assert harmed, "nothing is set aside that is whole"
            self.figures["logs_set_aside"] += 1
            self.excuse({name for _, name, *_ in rows})
        elif harmed:
            assert len(self.rows()) >= len(rows), "a loss is said"

    async def until_a_session_is_held(self) -> None:
        """What goes on over a restart, with a consumer or without."""
        attaches = self.random.random() < 0.7
        for _ in range(100):
            assert self.up is not None
            service = self.up.service
            held = service.book.held
            if held is not None and held.terms.kind == "session":
                if attaches and self.attached != held.id:
                    self.consumer_attaches(service, held.id)
                return
            await asyncio.sleep(0.2)

    def sync_fails(self, up: Incarnation) -> None:
        """The last that the worker does before it goes is refused, and whole in the -wal."""
        self.disk.breaks("deaf", 1.0)
        held = up.service.book.held
        if held is not None:
            with contextlib.suppress(LogUnavailable):
                up.service.extend(held.id, self.random.uniform(50.0, 100.0))
            self.figures["refused_at_the_end"] += up.service.log_is_down

    async def disk_is_full_while_others_wait(self) -> None:
        """The held one ends, and nobody is held until there is space again."""
        assert self.up is not None
        self.disk.breaks("full", 1.0)
        held = self.up.service.book.held
        if held is not None and self.up.service.book.queue:
            self.up.service.release(held.id)
            self.figures["waited_for_space"] += 1
        await asyncio.sleep(self.random.uniform(0.5, 5.0))
        self.disk.mends()

    async def harm(self) -> None:
        """Somebody removes or damages the -wal of a worker that was killed."""
        await self.kill(harm=True)

    async def wal_is_removed(self) -> None:
        """Somebody removes the -wal of a worker that runs: what is in it is saved with the next write."""
        if self.disk.whole_since is None:
            return
        self.disk.loses_its_wal()
        self.figures["wals_removed"] += 1
        await asyncio.sleep(11.0)  # an idle worker writes every 10 s

    async def power_cut(self) -> None:
        """Everything that was not synced is gone."""
        await self.kill(power_cut=True)

    async def stop(self) -> None:
        """SIGTERM, as worker.py does it."""
        assert self.up is not None
        stopping = self.up
        self.figures["stops"] += 1
        stopping.service.drain("told to")
        held = stopping.service.book.held
        if held is not None and held.terms.kind == "request":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.service.ended(held), 5.0)
        stopping.service.end_drain()
        self.up = None
        began = self.loop.time()
        with contextlib.suppress(sqlite3.Error):
            await stopping.reporter.flush(2.0)
        self.all_is_told(stopping, began)
        self.excuse({each.reservation.id for each in stopping.service.unwritten})
        await stopping.end()
        self.disk.mends()
        stopping.log.close()
        await asyncio.sleep(1.0)
        self.start()

    async def step_wall_clock(self) -> None:
        """By NTP, or by hand."""
        self.machine.step_wall(self.random.choice((-3600.0, -30.0, 30.0, 3600.0)))

    async def consumer_dies(self) -> None:
        """Its health endpoint does not answer for a while."""
        assert self.up is not None
        service = self.up.service
        service.consumer_unhealthy("it does not answer", cancel_held=self.random.random() < 0.5)
        await asyncio.sleep(self.random.uniform(0.0, 20.0))
        service.readiness.consumer_is_healthy()

    async def network(self) -> None:
        """The addresses of the autoscaler are up or not, and so are owners."""
        if not self.world.network_trouble:
            return
        first = self.random.choice(("up", "up", "down", "hangs", "refuses"))
        second = "up"
        if self.random.random() < (0.6 if first == "refuses" else 0.3):
            second = self.random.choice(("down", "hangs"))
        self.autoscaler.weather(self.random.choice((0.0, 0.0, 0.0, 0.3, 1.0)), a=first, b=second)
        self.owners.trouble_rate = self.random.choice((0.0, 0.5, 1.0))

    async def disk_breaks(self) -> None:
        """Writes or syncs fail, for a while or until the machine has gone."""
        self.disk.breaks()
        self.figures["disk_failures"] += 1
        self.loop.call_later(self.random.uniform(1.0, 60.0), self.disk.mends)

    async def lock(self) -> None:
        """Another program has the lock of the log for a moment, as a shell that writes to it."""
        if self.disk.whole_since is not None:
            self.figures["locks"] += 1
            with self.disk.locked():
                await asyncio.sleep(self.random.uniform(0.1, PATIENCE_SECONDS - 0.5))

    async def shell(self) -> None:
        """Somebody tries what the log must refuse."""
        assert self.up is not None
        book = self.up.service.book
        if book.held is not None and book.queue and self.disk.whole_since is not None:
            self.figures["shells"] += 1
            self.disk.shell(hold=next(iter(book.queue)))
