"""Targets are met, sets are nested, greedy is optimal where errors add: properties over ragged problems."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import RatioError, SelectionError
from bitdial.selection import SelectionProblem, density_ranks, greedy_completion, meet_target, select_groups
from bitdial.selection.variation import (
    SearchSpace,
    crossover,
    initial_population,
    perturbed_greedy,
    random_completion,
    swap_within_layers,
)


@st.composite
def problems(draw: st.DrawFn) -> SelectionProblem:
    macs = draw(st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=6), min_size=1, max_size=5))
    scores = [draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=len(m), max_size=len(m))) for m in macs]
    names = tuple(f"layer{i}" for i in range(len(macs)))
    return SelectionProblem(names, tuple(map(np.array, scores)), tuple(map(np.array, macs)))


shares = st.floats(0.0, 1.0)
seeds = st.integers(0, 2**32)


def assert_met(problem: SelectionProblem, mask: Any, target: float, fixed: Any) -> None:
    """No toggle of one free group brings the share nearer to the target: half of the smallest fitting group at most."""
    assert (mask >= fixed).all()
    missing = target * problem.total_macs - int(problem.flat_macs[mask].sum())
    free = ~mask if missing > 0 else mask & ~fixed
    if free.any():
        assert abs(missing) <= problem.flat_macs[free].min() / 2
    elif missing > 0:
        assert missing <= 1e-6  # everything is low already
    else:
        assert (mask == fixed).all()  # only what must be low is


@settings(max_examples=150, deadline=None)
@given(problems(), shares, shares, st.floats(0, 1), seeds)
def test_meet_target_from_any_start(
    problem: SelectionProblem, target: float, fixed_share: float, start_share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    nothing = np.zeros(problem.n_groups, dtype=bool)
    fixed = meet_target(problem, nothing, min(fixed_share, target), fixed=nothing, keys=rng.random(problem.n_groups))
    start = fixed | (rng.random(problem.n_groups) < start_share)
    before = start.copy()
    mask = meet_target(problem, start, target, fixed=fixed, keys=rng.random(problem.n_groups))
    assert_met(problem, mask, target, fixed)
    assert (start == before).all()
    if target == 1.0:
        assert mask.all()
    # The promise of the design: half a group, the largest one, whatever was fixed before.
    assert abs(problem.share(mask) - target) * problem.total_macs <= problem.flat_macs.max() / 2 + 1e-6


def test_keys_decide_which_groups_are_lowered_and_raised() -> None:
    problem = SelectionProblem(("a", "b"), (np.ones(3), np.ones(3)), (np.full(3, 10), np.full(3, 10)))
    keys = np.array([3.0, 1.0, 2.0, 6.0, 0.0, 5.0])
    nothing = np.zeros(6, dtype=bool)
    assert np.flatnonzero(meet_target(problem, nothing, 0.5, fixed=nothing, keys=keys)).tolist() == [1, 2, 4]
    fixed = np.arange(6) == 3
    assert np.flatnonzero(meet_target(problem, ~nothing, 0.5, fixed=fixed, keys=keys)).tolist() == [1, 3, 4]


def test_small_groups_fill_what_large_ones_leave() -> None:
    problem = SelectionProblem(("a",), (np.array([1.0, 2.0, 3.0, 4.0]),), (np.array([40, 40, 15, 5]),))
    nothing = np.zeros(4, dtype=bool)
    mask = meet_target(problem, nothing, 0.6, fixed=nothing, keys=np.arange(4.0))
    assert problem.share(mask) == 0.6


def test_meet_target_refuses_nonsense(make_problem: Any) -> None:
    problem = make_problem()
    nothing = np.zeros(problem.n_groups, dtype=bool)
    keys = np.zeros(problem.n_groups)
    with pytest.raises(RatioError, match=r"1\.5"):
        meet_target(problem, nothing, 1.5, fixed=nothing, keys=keys)
    with pytest.raises(SelectionError, match="keys"):
        meet_target(problem, nothing, 0.5, fixed=nothing, keys=keys[1:])
    with pytest.raises(SelectionError, match="keys"):
        meet_target(problem, nothing, 0.5, fixed=nothing, keys=keys * np.nan)
    with pytest.raises(SelectionError, match="mask"):
        meet_target(problem, nothing[1:], 0.5, fixed=nothing, keys=keys)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_density_ranks(problem: SelectionProblem) -> None:
    ranks = density_ranks(problem)
    density = problem.flat_scores / problem.flat_macs
    assert ranks.min() >= 0 and ranks.max() <= 1
    for i, j in combinations(range(problem.n_groups), 2):
        assert np.sign(ranks[i] - ranks[j]) == np.sign(density[i] - density[j])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=10), st.integers(1, 9))
def test_greedy_is_optimal_where_errors_add_and_macs_are_equal(scores: list[float], count: int) -> None:
    count = min(count, len(scores))
    problem = SelectionProblem(("a",), (np.array(scores),), (np.full(len(scores), 100),))
    result = select_groups("greedy", problem, [count / len(scores)])
    assert result.masks[0].sum() == count
    best = min(sum(chosen) for chosen in combinations(scores, count))
    assert problem.flat_scores[result.masks[0]].sum() == pytest.approx(best)


def test_greedy_goes_by_score_per_mac() -> None:
    problem = SelectionProblem(("a", "b"), (np.array([3.0]), np.full(4, 1.0)), (np.array([400]), np.full(4, 100)))
    assert select_groups("greedy", problem, [0.5]).masks[0].tolist() == [True, False, False, False, False]


@settings(max_examples=60, deadline=None)
@given(
    problems(),
    st.lists(shares, min_size=1, max_size=4, unique=True),
    st.booleans(),
    seeds,
    st.sampled_from(["random", "greedy", "evolutionary"]),
)
def test_every_selector_meets_and_nests(
    problem: SelectionProblem, targets: list[float], nested: bool, seed: int, name: str
) -> None:
    targets = sorted(targets)

    def evaluate(masks: Any, n_images: int) -> Any:
        return np.abs(np.sin(masks @ np.arange(1.0, problem.n_groups + 1)))

    small = {"population": 8, "generations": 3, "survivors": 3} if name == "evolutionary" else {}
    result = select_groups(name, problem, targets, evaluate, seed=seed, nested=nested, n_images=4, **small)
    assert result.masks.shape == (len(targets), problem.n_groups)
    fixed = np.zeros(problem.n_groups, dtype=bool)
    for index, (target, mask) in enumerate(zip(targets, result.masks, strict=True)):
        assert_met(problem, mask, target, fixed)
        assert result.shares[index] == problem.share(mask)
        assert result.fitness[index] == evaluate(mask[None], 4)[0]
        if target == 0.0:
            assert not mask.any()
        if target == 1.0:
            assert mask.all()
        if nested:
            fixed = mask


@settings(max_examples=80, deadline=None)
@given(problems(), shares, shares, seeds)
def test_variation_stays_in_the_search_space(
    problem: SelectionProblem, target: float, fixed_share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ranks = density_ranks(problem)
    nothing = np.zeros(problem.n_groups, dtype=bool)
    fixed = greedy_completion(problem, min(target, fixed_share), nothing, ranks)
    space = SearchSpace(problem, target, fixed, ranks)
    first, second = perturbed_greedy(space, 0.3, rng), random_completion(space, rng)
    population = initial_population(space, 10, (0.1, 0.5), 0.2, rng)
    assert (population[0] == space.greedy).all()
    assert len({row.tobytes() for row in population}) == len(population) <= 10
    for row in (first, second, *population):
        assert_met(problem, row, target, fixed)

    child = crossover(space, first, second, rng)
    for part in problem.layer_slices:
        assert (child[part] == first[part]).all() or (child[part] == second[part]).all()

    swapped = swap_within_layers(space, child, 3, rng)
    assert (swapped >= fixed).all()
    for part in problem.layer_slices:
        assert swapped[part].sum() == child[part].sum()
        assert (swapped[part] != child[part]).sum() <= 6
    assert_met(problem, space.repair(swapped, 0.2, rng), target, fixed)


def test_one_swap_changes_two_groups_of_one_layer(make_problem: Any) -> None:
    problem = make_problem(macs="equal")
    rng = np.random.default_rng(0)
    nothing = np.zeros(problem.n_groups, dtype=bool)
    space = SearchSpace(problem, 0.5, nothing, density_ranks(problem))
    for _ in range(20):
        changed = np.flatnonzero(swap_within_layers(space, space.greedy, 1, rng) != space.greedy)
        assert len(changed) == 2 and len(set(problem.layer_index[changed])) == 1
    # With equal MACs a swap keeps the target, so repair leaves it alone.
    swapped = swap_within_layers(space, space.greedy, 2, rng)
    assert (space.repair(swapped, 1.0, rng) == swapped).all()


def test_repair_is_stochastic_but_prefers_cheap_groups(make_problem: Any) -> None:
    problem = make_problem(sizes=(20, 20), macs="equal")
    ranks = density_ranks(problem)
    nothing = np.zeros(problem.n_groups, dtype=bool)
    space = SearchSpace(problem, 0.25, nothing, ranks)
    rng = np.random.default_rng(0)
    repaired = np.stack([space.repair(nothing, 0.2, rng) for _ in range(100)])
    assert len({row.tobytes() for row in repaired}) > 50
    frequency = repaired.mean(axis=0)
    assert frequency[ranks < 0.2].min() > 0.4 > 0.1 > frequency[ranks > 0.7].max()


def test_random_is_uniform_and_ignores_scores(make_problem: Any) -> None:
    problem = make_problem(sizes=(10, 10), macs="equal")
    masks = np.stack([select_groups("random", problem, [0.5], seed=seed).masks[0] for seed in range(400)])
    # 400 draws of one half: standard deviation 0.025, 20 groups.
    assert np.abs(masks.mean(axis=0) - 0.5).max() < 0.1
