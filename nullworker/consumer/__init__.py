"""The consumer's side, in asyncio: take one reservation of the worker on this machine after another.

async for reservation in reservations():
    async with reservation:
        job = await queue.get()
        reservation.result = await work(job)
        await job.acknowledge()
"""

from nullworker.consumer.reservations import Reservation, ResultRefused, health_endpoint, reservations, run

__all__ = ["Reservation", "ResultRefused", "health_endpoint", "reservations", "run"]
