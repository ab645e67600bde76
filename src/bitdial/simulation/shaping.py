"""Traces bent so that they overload a server for a given share of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitdial.errors import ConfigError
from bitdial.loadtest.arrivals import Times, rates, speed_up

_SCANNED = 400  # speeds looked at between a tenth and a hundred times the one at which the mean rate is the capacity


@dataclass(frozen=True)
class Overload:
    """A trace at `speed` times its own: `share` of windows bring more than the capacity, the fullest brings `peak` times it."""

    times: Times
    speed: float
    share: float
    peak: float


def overload(times: Times, capacity: float, share: float, window: float) -> Overload:
    """Play a trace at the lowest speed at which at least `share` of all windows of `window` seconds (of the played trace) bring
    more than `capacity` requests/s. Raises ConfigError if no speed does."""
    if times.size < 2 or not (capacity > 0 and window > 0 and 0 < share < 1):
        raise ConfigError("an overload needs a trace, a positive capacity and window, and a share in 0..1")
    times = times - times[0]
    middle = capacity * float(times[-1]) / times.size
    if middle <= 0:
        raise ConfigError("all requests of the trace come at once; it has no speed")
    for speed in middle * np.geomspace(0.1, 100.0, _SCANNED):
        played = speed_up(times, float(speed))
        seconds = math.nextafter(float(played[-1]), math.inf)
        if seconds < 2 * window:
            break
        found = rates(played, seconds, window)
        over = float((found > capacity).mean())
        if over >= share:
            return Overload(played, float(speed), over, float(found.max()) / capacity)
    raise ConfigError(f"no speed makes {100 * share:g} % of the windows of {window:g} s exceed {capacity:g} requests/s")
