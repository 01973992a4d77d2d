"""What nullworker is tested with, shipped so that you can test your own template the same way: no account, no GPU.

Here: the stand-in autoscaler, as a class and as a process (`python -m nullworker.testing`). Not here: a fake worker;
start the real one. One rule: nothing in the worker imports from here.
"""

from nullworker.testing.faults import Fault
from nullworker.testing.inbox import Seen, Totals
from nullworker.testing.routing import Parameters
from nullworker.testing.standin import StandIn

__all__ = ["Fault", "Parameters", "Seen", "StandIn", "Totals"]
