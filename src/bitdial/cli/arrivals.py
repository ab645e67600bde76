"""What arrives when, for `bitdial loadtest` and `bitdial simulate`: the options, and the schedules that they describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from bitdial.errors import ConfigError
from bitdial.settings import BaseConfig, setting

if TYPE_CHECKING:
    from bitdial.loadtest.arrivals import Schedule

DEFAULT_SECONDS = 30.0
_ARRIVALS, _TRACE, _LOAD = "Arrivals", "Trace", "Load"


class Arrivals(BaseConfig):
    """When a load test sends: one of trace, poisson, step and uniform, and how the trace is played."""

    trace: Path | None = setting(
        None, "Arrival times: CSV with a column arrival_s, or one number of seconds a line.", "FILE", _ARRIVALS
    )
    poisson: float | None = setting(None, "Requests/s, at random.", "RATE", _ARRIVALS)
    step: str | None = setting(
        None, "Poisson arrivals in steps, for example 20:10s,80:10s,20:10s.", "R:TIME,...", _ARRIVALS
    )
    uniform: float | None = setting(None, "Requests/s, evenly spaced.", "RATE", _ARRIVALS)
    duration: str | None = setting(
        None,
        "Stop sending after so long, for example 90s or 5m. Default: 30s; all of a trace or of the steps.",
        "TIME", _ARRIVALS,
    )  # fmt: skip
    scale_rate: float | None = setting(
        None, "Leave requests out or double them, so that the mean over what is played is RATE requests/s.", "RATE", _TRACE
    )
    keep_peaks: bool = setting(
        False,
        "With --scale-rate: the same factor everywhere, so that peaks neither grow nor vanish by chance.",
        "", _TRACE,
    )  # fmt: skip
    speed: float = setting(1.0, "Play the trace X times as fast.", "X", _TRACE)
    begin: str | None = setting(None, "Begin there in the trace.", "TIME", _TRACE, option="--from")
    end: str | None = setting(None, "End there in the trace.", "TIME", _TRACE, option="--to")
    again: bool = setting(False, "Repeat the trace until --duration.", "", _TRACE, option="--repeat")


class SimulatedArrivals(BaseConfig):
    """When simulated requests come: one of trace, poisson and step, and how the trace is bent."""

    trace: Path | None = setting(None, "Arrival times in seconds, column arrival_s.", "FILE.csv", _LOAD)
    poisson: float | None = setting(None, "Random arrivals, so many requests/s.", "RATE", _LOAD)
    step: str | None = setting(None, "Random arrivals in steps, e.g. 20:10s,80:10s,20:10s.", "RATE:TIME,...", _LOAD)
    duration: str | None = setting(None, "Of --poisson (default: 60s), or of the trace as played.", "TIME", _LOAD)
    speed: float = setting(1.0, "Play the trace so much faster.", "FACTOR", _LOAD)
    rate: float | None = setting(None, "Scale the trace to so many requests/s, at its own speed.", "RATE", _LOAD)
    overload: float | None = setting(
        None,
        "Play the trace so fast that the fleet at the smallest ratio is overloaded in this share of the windows, e.g. 20%.",
        "SHARE", _LOAD, read="share",
    )  # fmt: skip


def make_schedule(given: Arrivals, seed: int) -> Schedule:
    """The schedule that the options of a load test (or of a simulation) describe. Raises ConfigError, DataError."""
    from bitdial import loadtest as load

    trace, poisson, step, uniform = given.trace, given.poisson, given.step, given.uniform
    choices = {"--trace": trace, "--poisson": poisson, "--step": step, "--uniform": uniform}
    named = [name for name, value in choices.items() if value is not None]
    if len(named) != 1:
        told = " and ".join(named) + " are both given" if named else "no arrivals are given"
        raise ConfigError(f"{told}; give one of --trace FILE, --poisson RATE, --step R:TIME,... or --uniform RATE")
    seconds = None if given.duration is None else load.parse_duration(given.duration)
    about_trace = given.model_dump(include={"scale_rate", "keep_peaks", "speed", "begin", "end", "again"}, exclude_defaults=True)
    if trace is None and about_trace:
        raise ConfigError("--scale-rate, --keep-peaks, --speed, --from, --to and --repeat are about a --trace")
    if given.keep_peaks and given.scale_rate is None:
        raise ConfigError("--keep-peaks says how --scale-rate is done: give it too")
    if given.again and seconds is None:
        raise ConfigError("--repeat needs --duration: how long should the trace be repeated?")
    if trace is not None:
        times = load.read_trace(trace)
        first = 0.0 if given.begin is None or given.begin.strip() in ("0", "0s") else load.parse_duration(given.begin)
        return load.fit_trace(
            times, text=trace.stem, begin=first, end=None if given.end is None else load.parse_duration(given.end),
            speed=given.speed, duration=seconds, again=given.again, rate=given.scale_rate, keep_peaks=given.keep_peaks, seed=seed,
        )  # fmt: skip
    if step is not None:
        levels = load.parse_steps(step)
        length = sum(s for _, s in levels)
        times, text = load.steps(levels, seed), f"steps {step}"
        seconds = min(seconds or length, length)
        times = times[times < seconds]
    else:
        seconds = seconds or DEFAULT_SECONDS
        if poisson is not None:
            times, text = load.poisson(poisson, seconds, seed), f"Poisson, {poisson:g} requests/s"
        else:
            assert uniform is not None
            times, text = load.uniform(uniform, seconds), f"evenly spaced, {uniform:g} requests/s"
    if not len(times):
        raise ConfigError("not one request falls due; raise the rate or the duration")
    return load.Schedule(times, seconds, text)


def make_load(given: SimulatedArrivals, window: float, capacity: float, automatic: bool, seed: int) -> Schedule:
    """The arrivals that the options ask for. Raises ConfigError, DataError."""
    from bitdial.loadtest import arrivals
    from bitdial.loadtest.trace import read_trace

    trace, poisson, step = given.trace, given.poisson, given.step
    if sum(choice is not None for choice in (trace, poisson, step)) != 1:
        raise ConfigError("say what comes: one of --trace FILE, --poisson RATE or --step RATE:TIME,...")
    seconds = None if given.duration is None else arrivals.parse_duration(given.duration)
    if trace is None and (given.speed != 1.0 or given.rate is not None or given.overload is not None):
        raise ConfigError("--speed, --rate and --overload bend a trace; give --trace FILE")
    if poisson is not None:
        lasts = seconds or 60.0
        return arrivals.Schedule(arrivals.poisson(poisson, lasts, seed), lasts, f"Poisson, {poisson:g} requests/s")
    if step is not None:
        if seconds is not None:
            raise ConfigError("--step holds its own durations; leave --duration out")
        levels = arrivals.parse_steps(step)
        return arrivals.Schedule(arrivals.steps(levels, seed), sum(s for _, s in levels), f"steps {step}")
    assert trace is not None
    times = read_trace(trace)
    arrivals.check_beginning(times)
    if given.overload is not None:
        if given.speed != 1.0 or given.rate is not None or automatic:
            raise ConfigError(
                "--overload finds the speed for a fleet of given size; leave --speed, --rate and auto out"
            )
        from bitdial.simulation.shaping import overload

        found = overload(times, capacity, given.overload, window)
        told = (
            f"{trace.name}, {found.speed:.3g} times as fast: {100 * found.share:.0f} % of windows of {window:g} s above the "
            f"capacity at the smallest ratio, at most {found.peak:.2f} times it"
        )
        kept = found.times if seconds is None else found.times[found.times < seconds]
        return arrivals.Schedule(kept, min(float(found.times[-1]), seconds or math.inf), told)
    return arrivals.fit_trace(times, text=trace.name, speed=given.speed, duration=seconds, rate=given.rate, seed=seed)
