"""A fake autoscaler, and fakes for the worker's own parts, to test your template or client without an account or a GPU.

The fake autoscaler is a class and a process (`python -m nullworker.testing`). There is no fake worker: start a real
one.
"""

from nullworker.testing.fake_autoscaler import FakeAutoscaler
from nullworker.testing.faults import Fault
from nullworker.testing.recorder import Seen, Totals
from nullworker.testing.routing import Parameters

__all__ = ["FakeAutoscaler", "Fault", "Parameters", "Seen", "Totals"]
