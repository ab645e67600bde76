"""When requests arrive: Poisson, steps, evenly spaced, and recorded traces bent to another rate, speed or length.

Pure functions of their arguments and a seed. Times are float64 seconds from the start, ascending; the load generator and
the simulation use the same ones, so that equal settings mean the same requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from bitdial.errors import ConfigError

Times = NDArray[np.float64]

MOST_ARRIVALS = 20_000_000  # 160 MB of float64; a load test of a day at 200 requests/s
LONGEST_WAIT = 1e6  # seconds before the first request of a trace; nobody waits for 12 days on purpose
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_POISSON, _STEPS, _SCALE = 1, 2, 3  # a stream of random numbers each, so that equal seeds do not couple them


@dataclass(frozen=True)
class Schedule:
    """Arrivals and the span they belong to.

    times: seconds, ascending, all within 0..seconds. text: one line that says where they come from.
    """

    times: Times
    seconds: float
    text: str

    @property
    def rate(self) -> float:
        """Mean requests/s."""
        return len(self.times) / self.seconds


def poisson(rate: float, seconds: float, seed: int = 0) -> Times:
    """Arrivals of a Poisson process of `rate` per second over `seconds`. Raises ConfigError."""
    _check_rate(rate)
    _check_count(rate, seconds)
    random = np.random.default_rng([seed, _POISSON])
    # Given their number, the arrivals of a Poisson process are independent and uniform.
    return np.sort(random.random(random.poisson(rate * seconds)) * seconds)


def uniform(rate: float, seconds: float) -> Times:
    """Evenly spaced arrivals, the first at 0. Raises ConfigError."""
    _check_rate(rate)
    _check_count(rate, seconds)
    times = np.arange(math.ceil(rate * seconds), dtype=np.float64) / rate
    return times[times < seconds]


def parse_steps(text: str) -> tuple[tuple[float, float], ...]:
    """((requests/s, seconds), ...) of "20:10s,80:10s,20:1m"; a rate of 0 is a pause. Raises ConfigError."""
    found = []
    for part in text.split(","):
        rate, separator, seconds = part.partition(":")
        try:
            value = float(rate)
        except ValueError:
            value = math.nan
        if not separator or not math.isfinite(value) or value < 0:
            raise ConfigError(f"'{part.strip()}' is no step; write RATE:DURATION,... for example 20:10s,80:10s,20:10s")
        found.append((value, parse_duration(seconds)))
    if not any(rate for rate, _ in found):
        raise ConfigError(f"all steps of '{text}' have the rate 0: there would be no request")
    return tuple(found)


def steps(levels: str | Sequence[tuple[float, float]], seed: int = 0) -> Times:
    """Poisson arrivals whose rate changes at once: (requests/s, seconds) in turn, or the text of `parse_steps`.

    Raises ConfigError.
    """
    given = parse_steps(levels) if isinstance(levels, str) else tuple(levels)
    if any(not (math.isfinite(rate) and rate >= 0) for rate, _ in given):
        raise ConfigError("the rate of a step must be 0 or more requests/s")
    for _, seconds in given:
        _check_seconds(seconds)
    _check_count(sum(rate * seconds for rate, seconds in given), 1.0)
    random = np.random.default_rng([seed, _STEPS])
    parts, begin = [np.empty(0)], 0.0
    for rate, seconds in given:
        parts.append(begin + np.sort(random.random(random.poisson(rate * seconds)) * seconds))
        begin += seconds
    return np.concatenate(parts)


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "1.5m", "250ms" or "1h". Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(ms|s|min|m|h)?\s*", text)
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else math.nan
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"'{text.strip()}' is no duration; write for example 30s, 250ms, 5m or 1h")
    return seconds


def window(times: Times, begin: float, end: float) -> Times:
    """Arrivals with begin <= t < end, counted from `begin`. Raises ConfigError if the window is empty or holds none."""
    if not (math.isfinite(begin) and begin >= 0 and end > begin):
        raise ConfigError(
            f"the window {begin:g}..{end:g} s is empty; the end must come after the beginning, which is 0 or more"
        )
    kept = times[(times >= begin) & (times < end)] - begin
    if not len(kept):
        last = f"; the last arrival is at {times[-1]:.6g} s" if len(times) else ""
        raise ConfigError(f"no request arrives between {begin:g} and {end:g} s{last}")
    return kept


def speed_up(times: Times, factor: float) -> Times:
    """The same arrivals played `factor` times as fast: rate and fluctuations both. Raises ConfigError."""
    _check_rate(factor, "speed")
    return times / factor


def repeat(times: Times, period: float, seconds: float) -> Times:
    """The arrivals of one period over and over until `seconds`. Raises ConfigError."""
    _check_seconds(period)
    _check_count(len(times) / period, seconds)
    if len(times) and times[-1] >= period:
        raise ConfigError(f"an arrival at {times[-1]:.6g} s lies outside the period of {period:.6g} s")
    rounds = max(1, math.ceil(seconds / period))
    laid = (np.arange(rounds, dtype=np.float64)[:, None] * period + times[None, :]).ravel()
    return np.maximum.accumulate(laid[laid < seconds])  # rounding at a seam must not put one before its predecessor


def scale_rate(times: Times, seconds: float, rate: float, seed: int = 0, keep_peaks: bool = False) -> Times:
    """Arrivals at a mean of `rate` over `seconds`, on the same time axis: fewer or more requests, not faster ones.

    By default each arrival is kept by chance, or doubled by chance with the copy put at random before the next arrival:
    independent users leave or join. With `keep_peaks` the choice is stratified: over any stretch the number of requests is
    its old number times the factor, to within 2, so that the peaks, relative to the mean, neither grow nor vanish by chance.
    The short-term randomness between two requests is then a little smaller than that of independent users.

    Raises ConfigError.
    """
    _check_rate(rate)
    _check_count(rate, seconds)
    if not len(times):
        raise ConfigError("a trace without arrivals cannot be scaled to a rate")
    random = np.random.default_rng([seed, _SCALE])
    factor = rate * seconds / len(times)
    if keep_peaks:
        # One point in each of `count` equal strata of the cumulative count, mapped back to time.
        count = max(1, round(factor * len(times)))
        places = (np.arange(count) + random.random(count)) * (len(times) / count)
        found: Times = np.interp(places, np.arange(len(times) + 1), np.append(times, max(seconds, times[-1])))
        return found
    copies = np.full(len(times), math.floor(factor)) + (random.random(len(times)) < factor % 1.0)
    chosen = np.repeat(np.arange(len(times)), copies)
    gaps = np.diff(times, append=max(seconds, times[-1]))
    is_copy = np.diff(chosen, prepend=-1) == 0
    moved = times[chosen] + np.where(is_copy, random.random(len(chosen)) * gaps[chosen], 0.0)
    return np.sort(moved)


def rates(times: Times, seconds: float, width: float) -> NDArray[np.float64]:
    """Requests/s in consecutive windows of `width` seconds; a last, shorter window is counted at its own length."""
    _check_seconds(width)
    edges = np.append(np.arange(math.ceil(seconds / width - 1e-9)) * width, seconds)
    counted, _ = np.histogram(times, edges)
    found: NDArray[np.float64] = counted / np.diff(edges)
    return found


def fit_trace(
    times: Times,
    *,
    text: str = "trace",
    begin: float = 0.0,
    end: float | None = None,
    speed: float = 1.0,
    duration: float | None = None,
    again: bool = False,
    rate: float | None = None,
    keep_peaks: bool = False,
    seed: int = 0,
) -> Schedule:
    """A recorded trace made to fit, in this order: cut to begin..end, played at `speed`, cut to (or with `again` repeated up
    to) `duration`, scaled to a mean of `rate` requests/s over what is then played. Raises ConfigError; also for a trace whose
    first request would come days after the beginning, as with Unix times.
    """
    # Without a stated end the trace lasts one mean gap longer than its last arrival; never less than a microsecond.
    last = float(times[-1]) if len(times) else 0.0
    gap = (last - begin) / max(int((times >= begin).sum()) - 1, 1)
    natural = last + max(gap, 1e-6, float(np.spacing(last)))
    stop = natural if end is None else end
    kept = window(times, begin, stop)
    check_beginning(kept, begin)
    kept = speed_up(kept, speed)
    seconds = (min(stop, natural) - begin if end is None else end - begin) / speed
    told = [text]
    if begin or end is not None:
        told.append(f"{begin:g} to {stop:g} s")
    if speed != 1.0:
        told.append(f"{speed:g} times as fast")
    if duration is not None:
        _check_seconds(duration)
        if duration > seconds and again:
            kept = repeat(kept, seconds, duration)
            told.append("repeated")
        seconds = duration if again else min(duration, seconds)
        kept = kept[kept < seconds]
        if not len(kept):
            raise ConfigError(
                f"no request arrives in the first {duration:g} s of the trace; {_begin_later(float(times[times >= begin][0]))}"
            )
    if rate is not None:
        kept = scale_rate(kept, seconds, rate, seed, keep_peaks)
        told.append(f"scaled to {rate:g} requests/s" + (", peaks kept" if keep_peaks else ""))
    if not len(kept):
        raise ConfigError("scaled so far down, the trace has no request left; give a higher rate or a longer stretch")
    return Schedule(kept, seconds, ", ".join(told))


def check_beginning(times: Times, begin: float = 0.0) -> None:
    """Raises ConfigError, naming the remedy, for arrivals of which the first comes more than LONGEST_WAIT after the beginning.

    begin: what the times were counted from.
    """
    if not len(times) or times[0] <= LONGEST_WAIT:
        return
    first = begin + float(times[0])
    told = f"the first request of the trace comes {times[0]:.6g} s after the beginning"
    unit = next((u for u, k in (("", 1.0), ("milli", 1e3), ("micro", 1e6), ("nano", 1e9)) if 1e8 <= first / k < 1e10), None)
    if unit == "":
        date = datetime.fromtimestamp(first, timezone.utc)
        raise ConfigError(f"{told}: its times look like Unix time ({date:%Y-%m-%d %H:%M:%S} UTC); {_begin_later(first)}")
    if unit is not None:
        raise ConfigError(f"{told}: its times look like Unix time in {unit}seconds; make seconds of them, counted from the first")
    raise ConfigError(f"{told}; {_begin_later(first)}")


def _begin_later(first: float) -> str:
    return f"begin at the first with --from {math.floor(first)}, or subtract that from all times"


def _check_rate(rate: float, what: str = "rate") -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"the {what} must be a positive number, got {rate}")


def _check_seconds(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"a duration must be a positive number of seconds, got {seconds}")


def _check_count(rate: float, seconds: float) -> None:
    _check_seconds(seconds)
    if rate * seconds > MOST_ARRIVALS:
        raise ConfigError(
            f"{rate * seconds:.3g} requests are more than the {MOST_ARRIVALS:,} of one run; lower the rate or the duration"
        )
