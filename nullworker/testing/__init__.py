"""What nullworker is tested with, for tests of your own template or client: no account, no GPU.

The fake autoscaler is a class and a process (`python -m nullworker.testing`). There is no fake worker: start the real
one.
"""

from nullworker.testing.fake_autoscaler import FakeAutoscaler
from nullworker.testing.faults import Fault
from nullworker.testing.recorder import Seen, Totals
from nullworker.testing.routing import Parameters

__all__ = ["FakeAutoscaler", "Fault", "Parameters", "Seen", "Totals"]
