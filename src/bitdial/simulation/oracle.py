"""The best that can be done by one who knows the whole trace: a bound for every policy.

One worker, one request per batch, first come first served. Before request i the worker is free x seconds after its arrival (0: it
is idle). Run at ratio r it is done after x + s_r; if that is within the SLO it costs the accuracy lost at r, and the next request
finds x' = max(0, x + s_r - gap). A request that cannot be in time at any ratio is dropped, every other is run, as the scheduler
has it. Wanted is the schedule with the fewest late requests, and among those the one with the least accuracy lost.

For the number of late requests, dropping only what cannot be in time is as good as choosing freely: with one service time at the
top ratio and deadlines in order of arrival, a request dropped early can be exchanged for the first one dropped later.

Two backward passes. The number of late requests from state (i, x) on is a step function of x with few steps (each is one service
time wide), which is carried along exactly. The accuracy lost is kept on a grid of x, restricted to ratios that make no request
late; there every ratio moves all states by the same number of cells, so a request costs a few shifted slices. x' is rounded to
the nearest cell that has the same number of late requests, and only in this second pass: the schedule is read off with exact
times and has exactly the fewest late requests.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError

DROPPED = -1
_MOST_BYTES = 2 << 30
_EXACT = 1e-12  # seconds; a deadline met to the last digit is met

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """index: int [n], ratio index per request, DROPPED where it cannot be in time. finish: seconds [n], NaN where dropped.
    late: requests dropped, the fewest possible. lost: accuracy lost, summed over the others."""

    index: npt.NDArray[np.int16]
    finish: Floats
    late: int
    lost: float

    def script(self, top: int) -> list[int]:
        """For `control.policies.Scripted`: dropped requests are given the top ratio, should a scheduler run them after all."""
        return [top if index == DROPPED else int(index) for index in self.index]


def best_schedule(
    arrivals: Floats, seconds: Sequence[float], losses: Sequence[float], slo: float, cells: int = 1000
) -> Schedule:
    """The schedule with fewest late requests, then least accuracy lost.

    arrivals: seconds [n], ascending. seconds, losses: of one request per ratio; losses not negative. slo: seconds in which a
    request must be done (less whatever the server needs itself). cells: of the grid over one SLO.

    Raises ConfigError for empty or inconsistent arguments, or a grid that needs too much memory.
    """
    arrivals = np.asarray(arrivals, dtype=np.float64)
    n = arrivals.size
    if n == 0 or not len(seconds) or len(seconds) != len(losses):
        raise ConfigError("an oracle needs requests, and one time and one loss per ratio")
    if not (math.isfinite(slo) and slo > 0 and cells >= 1):
        raise ConfigError(f"an oracle needs a positive SLO and grid, got {slo} s and {cells} cells")
    if min(seconds) <= 0 or min(losses) < 0 or (np.diff(arrivals) < 0).any():
        raise ConfigError("an oracle needs positive times, losses that are not negative, and ascending arrivals")
    if 8 * n * (cells + 1) > _MOST_BYTES:
        raise ConfigError(
            f"{n} requests on {cells} cells need too much memory; take at most {_MOST_BYTES // (8 * n) - 1} cells"
        )
    gaps = np.append(np.diff(arrivals), 0.0).tolist()
    steps = _late_steps(gaps, min(seconds), slo)
    values = _values(gaps, seconds, losses, slo, cells, steps)
    index, finish = _follow(arrivals, seconds, losses, slo, slo / cells, values, steps)
    kept = index != DROPPED
    return Schedule(index, finish, int(n - kept.sum()), float(np.array(losses)[index[kept]].sum()))


_Steps = list[tuple[int, list[float]]]


def _late_steps(gaps: Sequence[float], quickest: float, slo: float) -> _Steps:
    """Per request i (and one beyond the last) a number and ascending places: from state x on at least number + #{places < x}
    requests are late."""
    latest = slo - quickest + _EXACT  # the last state from which a request can be in time
    base: int = 0
    places: list[float] = []
    found: _Steps = [(base, places)]
    for gap in reversed(gaps):
        # Beyond `latest` the request is dropped, and only the gap passes.
        dropped = [p + gap for p in places if max(latest, 0.0) < p + gap <= slo]
        if latest < 0:
            base, places = base + 1 + sum(p + gap < 0 for p in places), dropped
        else:
            moved = [p + gap - quickest for p in places]
            kept = [p for p in moved if 0 <= p < latest]
            below = sum(p < latest for p in moved)  # late beside `base`, just before `latest`
            beyond = 1 + sum(p + gap <= latest for p in places)  # and just after it
            base += sum(p < 0 for p in moved)
            places = kept + ([latest] if beyond > below else []) + dropped
        found.append((base, places))
    found.reverse()
    return found


def _values(
    gaps: Sequence[float], seconds: Sequence[float], losses: Sequence[float], slo: float, cells: int, steps: _Steps
) -> Floats:
    """[n + 1, cells + 1]: the least accuracy lost by requests i.. when the worker is free k cells after the arrival of request i
    and as few requests as possible are late."""
    n, step = len(gaps), slo / cells
    grid = step * np.arange(cells + 1)
    # The last state from which ratio r is in time: k * step + s <= slo.
    limits = [math.floor(cells - s / step + 1e-6) if s <= slo + _EXACT else -1 for s in seconds]
    widest = max(limits)
    values = np.zeros((n + 1, cells + 1))
    shifted = np.empty(cells + 1)
    for i in range(n - 1, -1, -1):
        gap, after, now = gaps[i], values[i + 1], values[i]
        _shift(after, round(-gap / step), now)
        now[: widest + 1] = math.inf  # nothing is dropped that can be in time
        base, places = steps[i]
        base_after, places_after = steps[i + 1]
        fewest = base - base_after + np.searchsorted(places, grid[: widest + 1]) if places_after else None
        for limit, duration, loss in zip(limits, seconds, losses, strict=True):
            if limit < 0:
                continue
            part, best = shifted[: limit + 1], now[: limit + 1]
            by = round((duration - gap) / step)
            _shift(after, by, part)
            # Rounding must not carry a state across a place where one more request is late: values jump there.
            for place in places_after:
                exact, rounded = (place + gap - duration) / step, place / step - by
                k = math.floor(max(exact, rounded))
                if min(exact, rounded) < k <= limit and k >= 0:
                    part[k] = after[min(max(k + by + (1 if exact < rounded else -1), 0), cells)]
            part += loss
            if fewest is not None:
                late = np.searchsorted(places_after, grid[: limit + 1] + (duration - gap - _EXACT))
                part[late > fewest[: limit + 1]] = math.inf
            np.minimum(best, part, out=best)
    return values


def _shift(source: Floats, by: int, out: Floats) -> None:
    """out[k] = source[k + by], with k + by held within the grid."""
    last, size = source.size - 1, out.size
    low = min(max(-by, 0), size)  # first k with k + by >= 0
    high = min(max(last - by + 1, low), size)  # first k beyond the end
    out[:low] = source[0]
    out[low:high] = source[low + by : high + by]
    out[high:] = source[last]


def _follow(
    arrivals: Floats,
    seconds: Sequence[float],
    losses: Sequence[float],
    slo: float,
    step: float,
    values: Floats,
    steps: _Steps,
) -> tuple[npt.NDArray[np.int16], Floats]:
    """Ratio indices and finish times, with exact times and the values of the grid."""
    n, last = arrivals.size, values.shape[1] - 1
    index = np.full(n, DROPPED, dtype=np.int16)
    finish = np.full(n, math.nan)
    times = arrivals.tolist()
    options = sorted(zip(losses, seconds, range(len(seconds)), strict=True))
    free = 0.0
    for i, arrival in enumerate(times):
        begin = max(free, arrival)
        following = times[i + 1] if i + 1 < n else math.inf
        base_after, places_after = steps[i + 1]
        row = values[i + 1]
        best, choice, done = (math.inf, math.inf), DROPPED, free
        for loss, duration, r in options:
            end = begin + duration
            if end - arrival > slo + _EXACT:
                continue
            ahead = max(0.0, end - following)
            late = base_after + bisect.bisect_left(places_after, ahead - _EXACT)
            cell = min(round(ahead / step), last)
            on_grid = base_after + bisect.bisect_left(places_after, cell * step)
            cell = min(max(cell + (on_grid < late) - (on_grid > late), 0), last)
            cost = (late, loss + row[cell])
            if cost < best:
                best, choice, done = cost, r, end
        if choice != DROPPED:
            index[i], finish[i], free = choice, done, done
    return index, finish
