"""Selection with a latency goal: what is predicted, greedy and evolutionary plans that meet it, resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.errors import SelectionError
from bitdial.selection import (
    LatencyGoal,
    LatencyModel,
    density_ranks,
    greedy_completion,
    latency_completion,
    select_groups,
)
from bitdial.selection.latency import concentrated_repair, move_layers
from bitdial.selection.targets import meet_target
from bitdial.selection.variation import SearchSpace

TARGETS = (0.25, 0.5, 0.75, 1.0)
SMALL: dict[str, Any] = {"population": 12, "generations": 8, "survivors": 4}


def late_gain(problem: Any, layer_gains: Any, gain: float = 0.8, bend: float = 0.9, name: str = "late") -> LatencyGoal:
    """Each layer takes 1 second per million MACs and saves its share `layer_gains` of that, nearly all of it past `bend`."""
    layer_gains = np.asarray(layer_gains, dtype=np.float64)
    base = np.array([m.sum() for m in problem.macs]) * 1e-6

    def seconds(shares: Any) -> Any:
        done = np.where(shares < bend, 0.1 * shares / bend, 0.1 + 0.9 * (shares - bend) / (1 - bend))
        return base * (1.0 - layer_gains * done)

    return LatencyGoal(seconds, gain, name)


@pytest.fixture
def problem(make_problem: Callable[..., Any]) -> Any:
    return make_problem(sizes=(6, 8, 8, 10, 12, 6), seed=3)


@pytest.fixture
def goal(problem: Any) -> LatencyGoal:
    return late_gain(problem, [0.5, 0.1, 0.6, 0.0, 0.4, 0.5])


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.fitness, b.fitness)
    np.testing.assert_array_equal(a.latency, b.latency)
    assert a.history == b.history and a.evaluations == b.evaluations


def gain_shares(model: LatencyModel, result: Any) -> Any:
    return (model.base - result.latency) / model.whole_gain


def test_predicted_seconds_are_the_sum_over_layers(problem: Any, goal: LatencyGoal) -> None:
    model = LatencyModel(problem, goal)
    rng = np.random.default_rng(0)
    masks = rng.random((5, problem.n_groups)) < 0.5
    for mask, seconds, gain in zip(masks, model.seconds(masks), model.gains(masks), strict=True):
        shares = [part @ macs / macs.sum() for part, macs in zip(problem.split(mask), problem.macs, strict=True)]
        assert seconds == pytest.approx(goal.layer_seconds(np.array([shares])).sum())
        assert gain == pytest.approx(model.base - seconds)
    assert model.whole_gain == pytest.approx(
        sum(m.sum() * g for m, g in zip(problem.macs, [0.5, 0.1, 0.6, 0.0, 0.4, 0.5], strict=True)) * 1e-6
    )


@pytest.mark.parametrize("selector", ["greedy", "evolutionary"])
@pytest.mark.parametrize("toy", ["additive", "correlated"])
def test_every_ratio_meets_the_goal(request: Any, make_problem: Any, selector: str, toy: str) -> None:
    settings = SMALL if selector == "evolutionary" else {}
    for seed, nested in itertools.product(range(2), (True, False)):
        problem = make_problem(sizes=(6, 8, 8, 10, 12, 6), seed=seed)
        rng = np.random.default_rng(seed)
        goal = late_gain(problem, rng.uniform(0, 0.6, 6))
        model = LatencyModel(problem, goal)
        evaluate = request.getfixturevalue(toy)(problem)
        arguments: dict[str, Any] = {"seed": seed, "n_images": 8, "nested": nested, **settings}
        result = select_groups(selector, problem, (0.0, *TARGETS), evaluate, latency=goal, **arguments)
        plain = select_groups(selector, problem, (0.0, *TARGETS), evaluate, **arguments)
        assert plain.latency is None and "latency" not in plain.summary()
        assert result.summary()["latency"] == result.latency.tolist()
        np.testing.assert_allclose(result.latency, model.seconds(result.masks))
        found = gain_shares(model, result)
        assert (found >= 0.8 * np.array(result.targets) - 1e-6).all(), found
        assert (found >= 0).all() and found[-1] == pytest.approx(1.0)
        # Without the goal the gain comes late: the test would see a goal that does nothing.
        assert (model.base - model.seconds(plain.masks[2:3])[0]) / model.whole_gain < 0.3
        assert (result.fitness <= result.greedy_fitness).all()
        half = max(int(m.max()) for m in problem.macs) / 2 / problem.total_macs
        for index, target in enumerate(result.targets):
            assert abs(result.shares[index] - target) <= half + 1e-12
            if nested and index:
                assert (result.masks[index] >= result.masks[index - 1]).all()


def test_the_search_improves_on_the_greedy_plan_within_the_goal(make_problem: Any, correlated: Any) -> None:
    ratios = []
    for seed in range(3):
        problem = make_problem(sizes=(6, 8, 8, 10, 12, 8, 8), seed=seed)
        goal = late_gain(problem, np.random.default_rng(seed).uniform(0.1, 0.6, 7), gain=0.6, bend=0.6)
        evaluate = correlated(problem, seed=seed + 10)
        result = select_groups(
            "evolutionary", problem, [0.5], evaluate, seed=seed, n_images=8, latency=goal, generations=20
        )
        assert LatencyModel(problem, goal).gains(result.masks)[0] >= 0.3 * LatencyModel(problem, goal).whole_gain - 1e-9
        ratios.append(result.fitness[0] / result.greedy_fitness[0])
    assert np.mean(ratios) < 0.95


def test_greedy_is_near_the_optimum_of_a_small_problem(make_problem: Any) -> None:
    """All masks of three layers tried: the relaxation's plan is feasible and costs little more than the best one."""
    for seed in range(4):
        problem = make_problem(sizes=(4, 4, 4), seed=seed, macs="equal")
        goal = late_gain(problem, np.random.default_rng(seed).uniform(0.1, 0.6, 3), gain=0.7)
        model = LatencyModel(problem, goal)
        masks = np.array(list(itertools.product((False, True), repeat=12)))
        masks = masks[masks.sum(axis=1) == 6]
        wanted = 0.7 * 0.5 * model.whole_gain
        feasible = masks[model.gains(masks) >= wanted]
        space = SearchSpace(problem, 0.5, np.zeros(12, dtype=bool), density_ranks(problem))
        found = latency_completion(space, model)
        if not len(feasible):
            assert model.gains(found[None])[0] >= 0.9 * model.gains(masks).max()
            continue
        assert model.gains(found[None])[0] >= wanted - 1e-9
        best = min(problem.flat_scores[mask].sum() for mask in feasible)
        assert problem.flat_scores[found].sum() <= 1.3 * best


@pytest.mark.parametrize("selector", ["greedy", "evolutionary"])
def test_an_impossible_goal_gets_the_most_that_can_be_had(make_problem: Any, additive: Any, selector: str) -> None:
    """One layer holds all the gain and three quarters of the work: a quarter of it buys next to nothing."""
    problem = make_problem(sizes=(2, 12, 2), seed=0, macs="equal")
    goal = late_gain(problem, [0.0, 0.5, 0.0], gain=1.0, bend=0.95)
    model = LatencyModel(problem, goal)
    settings = SMALL if selector == "evolutionary" else {}
    result = select_groups(selector, problem, [0.25], additive(problem), n_images=4, latency=goal, **settings)
    all_in_layer = np.zeros(16, dtype=bool)
    all_in_layer[2:6] = True
    assert model.gains(result.masks)[0] == pytest.approx(model.gains(all_in_layer[None])[0])
    assert result.masks[0, [0, 1, 14, 15]].sum() == 0


def test_a_goal_that_is_met_anyway_changes_nothing_in_greedy_plans(problem: Any, additive: Any) -> None:
    plain = select_groups("greedy", problem, TARGETS, additive(problem), n_images=4)
    for goal in (
        late_gain(problem, np.full(6, 0.5), gain=0.0),  # nothing asked
        late_gain(problem, np.full(6, 0.0)),  # nothing to gain
        late_gain(problem, np.full(6, -0.2)),  # low is slower
        LatencyGoal(lambda s: 1.0 - 0.5 * s, 0.5, "linear"),
    ):
        found = select_groups("greedy", problem, TARGETS, additive(problem), n_images=4, latency=goal)
        np.testing.assert_array_equal(found.masks, plain.masks)


def test_random_plans_ignore_the_goal_but_report(problem: Any, goal: LatencyGoal) -> None:
    plain = select_groups("random", problem, TARGETS, seed=1)
    found = select_groups("random", problem, TARGETS, seed=1, latency=goal)
    np.testing.assert_array_equal(found.masks, plain.masks)
    np.testing.assert_allclose(found.latency, LatencyModel(problem, goal).seconds(plain.masks))


def test_same_seed_same_plan_other_seed_other_search(problem: Any, goal: LatencyGoal, correlated: Any) -> None:
    runs = [
        select_groups("evolutionary", problem, TARGETS, correlated(problem), seed=s, n_images=8, latency=goal, **SMALL)
        for s in (1, 1, 2)
    ]
    assert_same(runs[0], runs[1])
    assert runs[0].history != runs[2].history


def test_no_candidate_that_misses_the_goal_is_evaluated(problem: Any, goal: LatencyGoal, correlated: Any) -> None:
    model = LatencyModel(problem, goal)
    evaluate = correlated(problem)
    select_groups("evolutionary", problem, [0.5], evaluate, seed=0, n_images=8, latency=goal, **SMALL)
    masks = np.array([np.frombuffer(mask, dtype=bool) for mask, _ in evaluate.scored])
    assert len(masks) > 30
    assert (model.gains(masks) >= 0.4 * model.whole_gain - 1e-6).all()


def test_resumes_exactly_wherever_it_was_interrupted(
    problem: Any, goal: LatencyGoal, correlated: Any, tmp_path: Path
) -> None:
    def run(evaluate: Any, path: Path | None, latency: LatencyGoal | None = goal) -> Any:
        return select_groups(
            "evolutionary", problem, TARGETS, evaluate, seed=3, n_images=16, checkpoint=path, latency=latency, **SMALL
        )

    whole = correlated(problem)
    expected = run(whole, None)
    for fail_at in range(1, len(whole.calls), 13):
        path = tmp_path / f"{fail_at}.json"
        with pytest.raises(InterruptedError):
            run(correlated(problem, fail_at=fail_at), path)
        assert_same(run(correlated(problem), path), expected)
    path = tmp_path / "1.json"
    for other in (
        None,
        LatencyGoal(goal.layer_seconds, 0.7, goal.fingerprint),
        LatencyGoal(goal.layer_seconds, goal.gain, "another table"),
    ):
        with pytest.raises(SelectionError, match="another search: latency differ"):
            run(correlated(problem), path, other)


def test_moves_keep_the_fixed_groups_and_change_whole_layers(problem: Any, goal: LatencyGoal) -> None:
    rng = np.random.default_rng(0)
    ranks = density_ranks(problem)
    fixed = greedy_completion(problem, 0.2, np.zeros(problem.n_groups, dtype=bool), ranks)
    space = SearchSpace(problem, 0.5, fixed, ranks)
    mask = meet_target(problem, fixed, 0.5, fixed=fixed, keys=rng.random(problem.n_groups))
    partial = []
    for _ in range(50):
        moved = move_layers(space, mask, rng)
        assert (moved >= fixed).all()
        changed = {int(i) for i in problem.layer_index[moved != mask]}
        for layer in changed:
            part = problem.layer_slices[layer]
            assert moved[part].all() or (moved[part] == fixed[part]).all()
        assert 1 <= len(changed) <= 2
        repaired = concentrated_repair(space, moved, 0.1, rng)
        assert (repaired >= fixed).all()
        assert abs(problem.share(repaired) - 0.5) <= max(int(m.max()) for m in problem.macs) / 2 / problem.total_macs
        free = [repaired[part][~fixed[part]] for part in problem.layer_slices]
        partial.append(sum(0 < part.sum() < len(part) for part in free))
    assert np.mean(partial) < sum(0 < p.sum() < len(p) for p in [mask[s][~fixed[s]] for s in problem.layer_slices])


def test_malformed_goals_are_refused(problem: Any) -> None:
    with pytest.raises(SelectionError, match=r"0\.\.1"):
        LatencyGoal(lambda shares: shares, 1.5, "")
    for wrong in (lambda s: s.sum(axis=1), lambda s: s * np.nan):
        with pytest.raises(SelectionError, match="layer_seconds returned"):
            select_groups("greedy", problem, [0.5], latency=LatencyGoal(wrong, 0.8, ""))
