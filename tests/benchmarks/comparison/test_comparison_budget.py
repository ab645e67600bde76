"""Budgets: every set against brute force over all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError, SelectionError
from comparison.budget import low_share, lower_at_least_cost, lower_in_order

MACS = st.lists(st.integers(1, 40).map(lambda m: 12 * m), min_size=1, max_size=8)


@settings(max_examples=60)
@given(MACS, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_least_cost_is_the_least_of_all_sets(sizes: list[int], share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    macs = {f"l{i}": m for i, m in enumerate(sizes)}
    costs = {n: float(rng.choice([0.0, 1.0, 2.5, 7.0, rng.random()])) for n in macs}
    chosen = lower_at_least_cost(costs, macs, share)
    goal = share * sum(sizes) - 1e-6
    assert sum(macs[n] for n in chosen) >= goal
    every = [s for k in range(len(macs) + 1) for s in combinations(macs, k) if sum(macs[n] for n in s) >= goal]
    assert sum(costs[n] for n in chosen) == pytest.approx(min(sum(costs[n] for n in s) for s in every), abs=1e-9)


@settings(max_examples=40)
@given(MACS, st.floats(0, 1), st.randoms(use_true_random=False))
def test_an_order_is_followed_just_far_enough(sizes: list[int], share: float, random) -> None:  # type: ignore[no-untyped-def]
    macs = {f"l{i}": m for i, m in enumerate(sizes)}
    order = list(macs)
    random.shuffle(order)
    chosen = lower_in_order(order, macs, share)
    goal = share * sum(sizes)
    assert chosen == order[: len(chosen)]
    assert sum(macs[n] for n in chosen) >= goal - 1e-6
    assert sum(macs[n] for n in chosen[:-1]) < goal or not chosen


def test_shares_of_average_widths() -> None:
    assert [low_share(b) for b in (4, 5, 6, 7, 8)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert low_share(6, low_bits=5) == pytest.approx(2 / 3)


@pytest.mark.parametrize("bits", [3.9, 8.1, float("nan"), float("inf")])
def test_averages_that_4_and_8_bits_cannot_make(bits: float) -> None:
    with pytest.raises(ConfigError, match="cannot be made of 4 and 8"):
        low_share(bits)


def test_bad_costs_and_orders_are_refused() -> None:
    macs = {"a": 10, "b": 20}
    for costs in ({"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 1.0, "b": float("nan")}):
        with pytest.raises(SelectionError, match="finite number >= 0"):
            lower_at_least_cost(costs, macs, 0.5)
    with pytest.raises(SelectionError, match="every low-eligible layer exactly once"):
        lower_in_order(["a"], macs, 0.5)
    with pytest.raises(SelectionError, match=r"not in 0\.\.1"):
        lower_in_order(["a", "b"], macs, 1.5)
    with pytest.raises(SelectionError, match="at least one multiply"):
        lower_at_least_cost({}, {}, 0.5)
