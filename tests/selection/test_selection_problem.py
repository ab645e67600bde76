"""SelectionProblem, its validation and helpers; settings and requests; layer sensitivity."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest

from bitdial.errors import ConfigError, RatioError, SelectionError
from bitdial.quantization.config import QuantizeConfig
from bitdial.selection import (
    SelectionProblem,
    get_selector,
    layer_sensitivity,
    rescale_scores,
    select_groups,
    selector_names,
)


def test_helpers_agree_with_the_layers() -> None:
    problem = SelectionProblem(
        ("a", "b"), (np.array([1.0, 2.0]), np.array([3.0])), (np.array([10, 20]), np.array([70]))
    )
    assert (problem.n_layers, problem.n_groups, problem.total_macs) == (2, 3, 100)
    assert problem.layer_slices == (slice(0, 2), slice(2, 3))
    assert problem.layer_index.tolist() == [0, 0, 1]
    assert problem.flat_scores.tolist() == [1.0, 2.0, 3.0]
    assert problem.share(np.array([False, True, True])) == pytest.approx(0.9)
    assert [part.tolist() for part in problem.split(np.array([False, True, True]))] == [[False, True], [True]]


def test_arrays_are_copied_and_read_only() -> None:
    scores = np.array([1.0, 2.0])
    problem = SelectionProblem(("a",), (scores,), (np.array([1, 1]),))
    scores[0] = 9.0
    assert problem.flat_scores[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        problem.scores[0][0] = 5.0


def test_digest_tells_problems_apart(make_problem: Any) -> None:
    problem = make_problem()
    assert problem.digest == make_problem().digest
    scores = [s.copy() for s in problem.scores]
    scores[0][0] = np.nextafter(scores[0][0], np.inf)
    changed = SelectionProblem(problem.layer_names, tuple(scores), problem.macs)
    assert changed.digest != problem.digest
    one = SelectionProblem(("a", "b"), (np.ones(2), np.ones(1)), (np.ones(2, int), np.ones(1, int)))
    two = SelectionProblem(("a", "b"), (np.ones(1), np.ones(2)), (np.ones(1, int), np.ones(2, int)))
    assert one.digest != two.digest


@pytest.mark.parametrize(
    ("names", "scores", "macs", "message"),
    [
        ((), (), (), "no layer may run low"),
        (("a", "a"), ([1.0], [1.0]), ([1], [1]), "more than once: a"),
        (("a",), ([1.0], [1.0]), ([1],), "one array of each per layer"),
        (("a",), ([1.0, 2.0],), ([1],), "equal length"),
        (("a",), ([],), ([],), "at least one group"),
        (("a",), ([np.nan],), ([1],), "finite"),
        (("a",), ([-1.0],), ([1],), ">= 0"),
        (("a",), ([1.0],), ([0],), "integers >= 1"),
        (("a",), ([1.0],), ([1.5],), "integers >= 1"),
        (("a",), ([1.0],), ([2**53],), "2\\^53"),
    ],
)
def test_bad_problems_are_refused(names: Any, scores: Any, macs: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        SelectionProblem(names, tuple(np.array(s) for s in scores), tuple(np.array(m) for m in macs))


@pytest.mark.parametrize("mask", [np.zeros(3, dtype=bool), np.zeros(26, dtype=np.uint8), [True] * 26])
def test_bad_masks_are_refused(make_problem: Any, mask: Any) -> None:
    with pytest.raises(SelectionError, match=r"bool\[26\]"):
        make_problem().share(mask)


@pytest.mark.parametrize("name", ["random", "greedy", "evolutionary"])
@pytest.mark.parametrize(
    ("targets", "changes", "error"),
    [
        ([], {}, SelectionError),
        ([0.5, 0.5], {}, SelectionError),
        ([0.5, 0.25], {}, SelectionError),
        ([-0.1], {}, RatioError),
        ([1.1], {}, RatioError),
        ([float("nan")], {}, RatioError),
        ([0.5], {"seed": -1}, SelectionError),
        ([0.5], {"seed": 1.5}, SelectionError),
        ([0.5], {"n_images": 0}, SelectionError),
    ],
)
def test_bad_requests_are_refused(
    make_problem: Any, additive: Any, name: str, targets: list[float], changes: dict[str, Any], error: type[Exception]
) -> None:
    problem = make_problem()
    arguments: dict[str, Any] = {"seed": 0, "n_images": 4, **changes}
    with pytest.raises(error):
        select_groups(name, problem, targets, additive(problem), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "shape", "dtype"])
def test_bad_evaluations_are_refused(make_problem: Any, bad: Any) -> None:
    def evaluate(masks: Any, n_images: int) -> Any:
        if bad == "shape":
            return np.zeros((len(masks), 1))
        if bad == "dtype":
            return np.array(["low"] * len(masks))
        return np.full(len(masks), bad)

    with pytest.raises(SelectionError, match="the evaluation returned"):
        select_groups("greedy", make_problem(), [0.5], evaluate, n_images=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"population": 1},
        {"population": 50.0},
        {"generations": -1},
        {"survivors": 0},
        {"survivors": 50},
        {"tournament": 0},
        {"crossover_rate": 1.5},
        {"crossover_rate": float("nan")},
        {"swaps": -1.0},
        {"swaps": float("inf")},
        {"repair_noise": -0.1},
        {"initial_noise": ()},
        {"initial_noise": (0.0,)},
        {"random_share": 2.0},
        {"image_schedule": ()},
        {"image_schedule": ((0.5, 1.0),)},
        {"image_schedule": ((0.5, 1.0), (0.5, 0.5))},
        {"image_schedule": ((1.0, 0.0),)},
        {"final_candidates": 0},
        {"colour": "red"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        get_selector("evolutionary", **settings)


def test_registry() -> None:
    assert {get_selector(name).name for name in selector_names()} == {"random", "greedy", "evolutionary"}
    assert set(selector_names()) == set(get_args(QuantizeConfig.model_fields["selector"].annotation))
    with pytest.raises(ConfigError, match="choose one of random, greedy, evolutionary"):
        get_selector("best")
    with pytest.raises(ConfigError, match="swaps"):
        get_selector("greedy", swaps=1.0)


def test_summary_is_json(make_problem: Any) -> None:
    result = select_groups("greedy", make_problem(), [0.25, 1.0], seed=3)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["fitness"] == [None, None] and summary["seed"] == 3 and summary["shares"][1] == 1.0


def test_layer_sensitivity_lowers_each_layer_whole_and_alone(make_problem: Any, additive: Any) -> None:
    problem = make_problem()
    evaluate = additive(problem)
    distances = layer_sensitivity(problem, evaluate, 8)
    assert evaluate.calls == [(4, 8)]
    np.testing.assert_allclose(distances**2, [s.sum() for s in problem.scores])
    with pytest.raises(SelectionError, match="n_images"):
        layer_sensitivity(problem, evaluate, 0)


def test_rescaled_scores_add_up_to_the_squared_distance(make_problem: Any) -> None:
    problem = make_problem()
    scores = (np.zeros(4), *problem.scores[1:])
    problem = SelectionProblem(problem.layer_names, scores, problem.macs)
    distances = np.array([0.5, 3.0, 0.0, 1e-3])
    rescaled = rescale_scores(problem, distances)
    np.testing.assert_allclose([s.sum() for s in rescaled.scores], distances**2)
    np.testing.assert_array_equal(np.argsort(rescaled.scores[1]), np.argsort(problem.scores[1]))
    np.testing.assert_allclose(rescaled.scores[0] / rescaled.macs[0], 0.25 / problem.macs[0].sum())
    for bad in ([1.0], [1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, np.nan]):
        with pytest.raises(SelectionError, match="distances"):
            rescale_scores(problem, bad)


def test_rescaling_repairs_greedy_where_layer_scores_are_incomparable(make_problem: Any, additive: Any) -> None:
    true = make_problem(macs="equal")
    factors = (1e-3, 10.0, 1.0, 200.0)
    skewed = SelectionProblem(
        true.layer_names, tuple(s * f for s, f in zip(true.scores, factors, strict=True)), true.macs
    )
    evaluate = additive(true)
    repaired = rescale_scores(skewed, layer_sensitivity(skewed, evaluate, 1))
    best, bad, good = (
        select_groups("greedy", p, [0.5], evaluate, n_images=1).fitness[0] for p in (true, skewed, repaired)
    )
    assert bad > 1.1 * best
    assert good == pytest.approx(best)
