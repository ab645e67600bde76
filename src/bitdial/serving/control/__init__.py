"""The controller that turns the dial, and the queue it looks at: no I/O, no clock of its own, no randomness.

Everything here is told the time, so a server drives it with a monotonic clock, a simulation with a virtual one, and a
recorded run can be replayed decision by decision.
"""

from bitdial.serving.control.policies import POLICIES, make_policy
from bitdial.serving.control.queue import Request, RequestQueue
from bitdial.serving.control.record import Recorder, replay
from bitdial.serving.control.scheduler import Batch, Refusal, Scheduler
from bitdial.serving.control.settings import Settings
from bitdial.serving.control.table import CorrectedTable, ServiceTable
from bitdial.serving.control.view import Policy, View

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
