"""The consumer's side, in asyncio: takes the reservations of the worker on this machine, one after another.

async for reservation in reservations():
    async with reservation:
        job = await queue.get()
        reservation.result = await work(job)
        await job.acknowledge()
"""

from nullworker.consumer.blocking import ChildDied
from nullworker.consumer.health import health_endpoint
from nullworker.consumer.jobs import Job, Lost, drain
from nullworker.consumer.reservations import Reservation, ResultRefused, reservations
from nullworker.consumer.stopping import run

__all__ = [
    "ChildDied",
    "Job",
    "Lost",
    "Reservation",
    "ResultRefused",
    "drain",
    "health_endpoint",
    "reservations",
    "run",
]
