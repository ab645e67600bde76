"""The controller that turns the dial, and the queue it looks at: no I/O, no clock of its own, no randomness.

Everything here is told the time, so a server drives it with a monotonic clock, a simulation with a virtual one, and a
recorded run can be replayed decision by decision.
"""

from flexiq.serving.control.policies import POLICIES, make_policy
from flexiq.serving.control.queue import Request, RequestQueue
from flexiq.serving.control.record import Recorder, replay
from flexiq.serving.control.scheduler import Batch, Refusal, Scheduler, Settings
from flexiq.serving.control.table import CorrectedTable, ServiceTable
from flexiq.serving.control.view import Policy, View

__all__ = [
    "POLICIES",
    "Batch",
    "CorrectedTable",
    "Policy",
    "Recorder",
    "Refusal",
    "Request",
    "RequestQueue",
    "Scheduler",
    "ServiceTable",
    "Settings",
    "View",
    "make_policy",
    "replay",
]
