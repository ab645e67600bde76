"""Timing several things against each other: interleaved, so that drift of the machine hits all alike. Needs no torch.

A processor's clock, its neighbours and its memory drift over seconds, often by more than what is to be told apart. So one
repetition of every case is run in turn, in an order drawn anew for each round, and cases are compared round by round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitdial.errors import ConfigError

PERCENTILES = (50, 90, 99)
MAX_CALLS = 1000  # in one repetition


@dataclass(frozen=True)
class Case:
    """One thing to time. `calls(n)` runs it n times in a row and returns the seconds of each call."""

    name: str
    calls: Callable[[int], Sequence[float]]


def timed(function: Callable[[], Any]) -> Callable[[int], list[float]]:
    """The `calls` of a case whose one call is `function()`."""

    def calls(n: int) -> list[float]:
        seconds = []
        for _ in range(n):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return seconds

    return calls


@dataclass(frozen=True)
class Plan:
    """How to measure.

    repeats         rounds; in each, every case gets one repetition
    warmup_calls    untimed calls per case before the first round (one where a call takes a second or more)
    settle_calls    untimed calls before each repetition, which bring the case's weights back into the caches that the
                    cases before it used; left out where a call takes longer than `settle_below` seconds, since a call
                    that long fills the caches itself
    repetition      least seconds of one repetition: short calls are repeated until it is filled
    budget          seconds after which no new round begins (None: none); `least_repeats` rounds are run all the same
    slow            a case whose call takes longer than this many seconds takes part in `slow_repeats` rounds only
    seed            of the order within each round
    pause           seconds of rest between repetitions, in which spinning threads of the last case go to sleep
    """

    repeats: int = 15
    warmup_calls: int = 2
    settle_calls: int = 1
    settle_below: float = 0.25
    repetition: float = 0.02
    budget: float | None = None
    least_repeats: int = 3
    slow: float = math.inf
    slow_repeats: int = 3
    seed: int = 0
    pause: float = 0.0

    def __post_init__(self) -> None:
        for name in ("repeats", "least_repeats", "slow_repeats", "warmup_calls"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.budget is not None and not self.budget > 0:
            raise ConfigError(f"budget is {self.budget} seconds: it must be above 0")


@dataclass
class Samples:
    """Seconds measured for one case: `rounds` maps the number of a round to the calls of the repetition in it."""

    name: str
    rounds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        return len(self.rounds)

    @property
    def calls(self) -> list[float]:
        """All timed calls."""
        return [seconds for calls in self.rounds.values() for seconds in calls]

    def per_round(self) -> dict[int, float]:
        """Median of the calls of each round."""
        return {number: float(np.median(calls)) for number, calls in self.rounds.items()}

    @property
    def median(self) -> float:
        """Median over rounds of the median within the round: a round counts once, however many calls it holds."""
        return float(np.median(list(self.per_round().values())))

    def summary(self) -> dict[str, Any]:
        """JSON-able figures in milliseconds: median (over rounds), p50, p90 and p99 (over calls), mean, min, max."""
        calls = 1e3 * np.asarray(self.calls)
        points = np.percentile(calls, PERCENTILES)
        return {
            "median_ms": 1e3 * self.median,
            **{f"p{p}_ms": float(v) for p, v in zip(PERCENTILES, points, strict=True)},
            "mean_ms": float(calls.mean()),
            "min_ms": float(calls.min()),
            "max_ms": float(calls.max()),
            "repeats": self.repeats,
            "calls": len(calls),
            "rounds_ms": [round(1e3 * seconds, 6) for seconds in self.per_round().values()],
        }


def time_ratio(case: Samples, reference: Samples) -> float:
    """Median over common rounds of case time / reference time; NaN where they share no round."""
    a, b = case.per_round(), reference.per_round()
    common = [a[number] / b[number] for number in a.keys() & b.keys()]
    return float(np.median(common)) if common else math.nan


def measure_interleaved(
    cases: Sequence[Case], plan: Plan, progress: Callable[[float], None] | None = None
) -> dict[str, Samples]:
    """Time all cases by the plan; {case name: samples} in the order given.

    progress gets the share done (of rounds, or of the time budget if that runs out first). Raises ConfigError for two
    cases of one name, and whatever a case raises.
    """
    samples = {case.name: Samples(case.name) for case in cases}
    if len(samples) != len(cases):
        raise ConfigError("two cases to time have the same name")
    started = time.perf_counter()
    call_seconds: dict[str, float] = {}
    for case in cases:
        seconds = case.calls(1)
        if plan.warmup_calls > 1 and seconds[-1] < plan.slow and seconds[-1] < 1.0:
            seconds = case.calls(plan.warmup_calls - 1)
        # The last warm-up call is taken as typical: the first ones may allocate or tune.
        call_seconds[case.name] = max(float(seconds[-1]), 1e-9)
    order = np.random.default_rng(plan.seed)
    for number in range(plan.repeats):
        elapsed = time.perf_counter() - started
        if plan.budget is not None and elapsed > plan.budget and number >= min(plan.least_repeats, plan.repeats):
            break
        taking_part = [case for case in cases if call_seconds[case.name] <= plan.slow or number < plan.slow_repeats]
        for done, index in enumerate(order.permutation(len(taking_part))):
            case = taking_part[index]
            if plan.pause:
                time.sleep(plan.pause)
            one = call_seconds[case.name]
            if plan.settle_calls and one < plan.settle_below:
                case.calls(plan.settle_calls)
            n = min(MAX_CALLS, max(1, math.ceil(plan.repetition / one)))
            samples[case.name].rounds[number] = [float(seconds) for seconds in case.calls(n)]
            if progress is not None:
                share = (number + (done + 1) / len(taking_part)) / plan.repeats
                if plan.budget is not None and number >= plan.least_repeats:
                    share = max(share, (time.perf_counter() - started) / plan.budget)
                progress(min(1.0, share))
    if progress is not None:
        progress(1.0)
    return samples


def comparisons(samples: Mapping[str, Samples], reference: str) -> dict[str, float]:
    """{name: time relative to the reference case}, round by round."""
    return {name: time_ratio(own, samples[reference]) for name, own in samples.items()}
