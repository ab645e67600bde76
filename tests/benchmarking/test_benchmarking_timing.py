"""Interleaved timing on a made-up clock: every case once a round, drift cancels, slow cases and budgets are kept."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.benchmarking.timing import Case, Plan, Samples, comparisons, measure_interleaved, time_ratio, timed
from bitdial.errors import ConfigError


class Recorder:
    """Cases of given call times; notes who was called how often, in order."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.log: list[tuple[str, int]] = []

    def cases(self) -> list[Case]:
        def make(name: str) -> Case:
            def calls(n: int) -> list[float]:
                self.log.append((name, n))
                return [self.seconds[name]] * n

            return Case(name, calls)

        return [make(name) for name in self.seconds]


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_every_case_runs_once_in_every_round(n_cases: int, repeats: int, seed: int) -> None:
    recorder = Recorder({f"c{i}": 0.5 for i in range(n_cases)})
    samples = measure_interleaved(recorder.cases(), Plan(repeats=repeats, warmup_calls=1, settle_calls=0, seed=seed))
    timed_calls = [name for name, _ in recorder.log[n_cases:]]
    for start in range(0, len(timed_calls), n_cases):
        assert sorted(timed_calls[start : start + n_cases]) == sorted(recorder.seconds)
    assert len(timed_calls) == n_cases * repeats
    assert all(own.repeats == repeats for own in samples.values()) and list(samples) == list(recorder.seconds)


def test_the_order_is_drawn_anew_and_fixed_by_the_seed() -> None:
    def order(seed: int) -> list[str]:
        recorder = Recorder({f"c{i}": 0.5 for i in range(5)})
        measure_interleaved(recorder.cases(), Plan(repeats=6, settle_calls=0, seed=seed))
        return [name for name, _ in recorder.log]

    assert order(1) == order(1) != order(2)
    rounds = [tuple(order(1)[i : i + 5]) for i in range(10, 40, 5)]
    assert len(set(rounds)) > 1


def test_short_calls_fill_a_repetition_and_long_ones_settle_nothing() -> None:
    recorder = Recorder({"short": 0.001, "long": 1.0})
    samples = measure_interleaved(recorder.cases(), Plan(repeats=2, repetition=0.02, settle_calls=1))
    short = [n for name, n in recorder.log if name == "short"]
    assert short == [1, 1, 1, 20, 1, 20]  # two to warm up, then settling and 20 calls twice
    assert [n for name, n in recorder.log if name == "long"] == [1, 1, 1]  # one to warm up
    assert len(samples["short"].calls) == 40 and samples["short"].repeats == 2


def test_slow_cases_take_part_in_fewer_rounds() -> None:
    recorder = Recorder({"slow": 9.0, "fast": 0.5})
    samples = measure_interleaved(recorder.cases(), Plan(repeats=7, slow=4.0, slow_repeats=2))
    assert samples["slow"].repeats == 2 and samples["fast"].repeats == 7
    assert time_ratio(samples["slow"], samples["fast"]) == pytest.approx(18.0)


def test_the_budget_ends_rounds_but_not_before_the_least() -> None:
    case = Case("a", timed(lambda: time.sleep(0.002)))
    samples = measure_interleaved(
        [case], Plan(repeats=10_000, budget=0.05, least_repeats=2, repetition=0.0, settle_calls=0)
    )
    assert 2 <= samples["a"].repeats < 200
    samples = measure_interleaved([case], Plan(repeats=5, budget=1e-9, least_repeats=3, repetition=0.0))
    assert samples["a"].repeats == 3


@given(st.floats(0.1, 10.0), st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9))
def test_ratios_by_round_do_not_see_drift(factor: float, drift: list[float]) -> None:
    a = Samples("a", {i: [factor * d] for i, d in enumerate(drift)})
    b = Samples("b", {i: [d] for i, d in enumerate(drift)})
    assert time_ratio(a, b) == pytest.approx(factor)
    assert comparisons({"a": a, "b": b}, "b") == {"a": pytest.approx(factor), "b": 1.0}
    assert math.isnan(time_ratio(a, Samples("none", {99: [1.0]})))


@given(st.lists(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=5), min_size=1, max_size=6))
def test_summary(rounds: list[list[float]]) -> None:
    samples = Samples("x", dict(enumerate(rounds)))
    found = samples.summary()
    flat = np.array([s for r in rounds for s in r]) * 1e3
    assert found["median_ms"] == pytest.approx(1e3 * np.median([np.median(r) for r in rounds]))
    for p in (50, 90, 99):
        assert found[f"p{p}_ms"] == pytest.approx(np.percentile(flat, p))
    assert found["min_ms"] <= found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["repeats"] == len(rounds) == len(found["rounds_ms"]) and found["calls"] == len(flat)


def test_progress_rises_to_one() -> None:
    seen: list[float] = []
    measure_interleaved(Recorder({"a": 0.3, "b": 0.3}).cases(), Plan(repeats=4), seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) == 9


def test_wrong_plans_and_equal_names() -> None:
    for wrong in ({"repeats": 0}, {"budget": 0.0}, {"warmup_calls": 0}, {"least_repeats": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Plan(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="same name"):
        measure_interleaved([Case("a", lambda n: [1.0] * n)] * 2, Plan())


def test_timed_measures_the_call() -> None:
    seconds = timed(lambda: time.sleep(0.003))(3)
    assert len(seconds) == 3 and all(s >= 0.003 for s in seconds)
