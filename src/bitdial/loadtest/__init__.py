"""An open-loop load generator that measures without coordinated omission, and what it measured.

`run_load` sends the requests of a `Schedule` to any server of the Open Inference Protocol v2 and returns a `Result`; `arrivals`
makes schedules (Poisson, steps, traces) and is shared with the simulation. Needs httptools to send; NumPy for the rest.
"""

from bitdial.loadtest.arrivals import (
    Schedule,
    fit_trace,
    parse_duration,
    parse_steps,
    poisson,
    rates,
    repeat,
    scale_rate,
    speed_up,
    steps,
    uniform,
    window,
)
from bitdial.loadtest.client import Target, parse_url
from bitdial.loadtest.errors import ServerError
from bitdial.loadtest.generator import LoadPlan, Snapshot, load, run_load
from bitdial.loadtest.payload import LabelledImages, read_labelled
from bitdial.loadtest.result import (
    Result,
    Status,
    read_result,
    result_from_json,
    result_json,
    summarize,
    warnings_of,
    write_result,
)
from bitdial.loadtest.trace import read_trace

__all__ = [
    "LabelledImages",
    "LoadPlan",
    "Result",
    "Schedule",
    "ServerError",
    "Snapshot",
    "Status",
    "Target",
    "fit_trace",
    "load",
    "parse_duration",
    "parse_steps",
    "parse_url",
    "poisson",
    "rates",
    "read_labelled",
    "read_result",
    "read_trace",
    "repeat",
    "result_from_json",
    "result_json",
    "run_load",
    "scale_rate",
    "speed_up",
    "steps",
    "summarize",
    "uniform",
    "warnings_of",
    "window",
    "write_result",
]
