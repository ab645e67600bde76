"""Discrete-event simulation of a fleet from measured service times: the server's own scheduler under a virtual clock.

No clock of the machine, no global randomness: the same arguments and seed give the same result.
"""

from flexiq.simulation.capacity import FleetSize, Sizing, machines_saved, smallest_fleet
from flexiq.simulation.comparison import POLICIES_COMPARED, ComparisonRow, compare, run_policy
from flexiq.simulation.fleet import Fleet, Load, Noise, simulate
from flexiq.simulation.oracle import Schedule, best_schedule
from flexiq.simulation.outcome import Outcome, Second, Summary, summarize, time_series

__all__ = [
    "POLICIES_COMPARED",
    "ComparisonRow",
    "Fleet",
    "FleetSize",
    "Load",
    "Noise",
    "Outcome",
    "Schedule",
    "Second",
    "Sizing",
    "Summary",
    "best_schedule",
    "compare",
    "machines_saved",
    "run_policy",
    "simulate",
    "smallest_fleet",
    "summarize",
    "time_series",
]
