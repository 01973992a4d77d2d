"""Being the consumer of the worker on this machine, in asyncio: one reservation after another.

async for reservation in reservations():
    async with reservation:
        job = await queue.get()
        reservation.result = await work(job)
        await job.acknowledge()
"""

from nullworker.consumer.reservations import Reservation, ResultRefused, health_endpoint, reservations, run

__all__ = ["Reservation", "ResultRefused", "health_endpoint", "reservations", "run"]
