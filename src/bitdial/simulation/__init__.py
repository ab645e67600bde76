"""Discrete-event simulation of a fleet from measured service times: the server's own scheduler under a virtual clock.

No clock of the machine, no global randomness: the same arguments and seed give the same result.
"""

from bitdial.simulation.capacity import FleetSize, Sizing, machines_saved, smallest_fleet
from bitdial.simulation.comparison import POLICIES_COMPARED, ComparisonRow, compare, run_policy
from bitdial.simulation.fleet import Fleet, Load, Noise, simulate
from bitdial.simulation.oracle import Schedule, best_schedule
from bitdial.simulation.outcome import Outcome, Second, Summary, summarize, time_series

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
