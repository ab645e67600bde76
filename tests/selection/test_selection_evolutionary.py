"""The evolutionary selector: never worse than greedy, better where errors interact, reproducible, resumable."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.errors import OutputError, SelectionError
from bitdial.selection import (
    EvolutionarySettings,
    SearchProgress,
    density_ranks,
    get_selector,
    greedy_completion,
    select_groups,
)
from bitdial.selection.scoring import pack, unpack

TARGETS = (0.25, 0.5, 0.75, 1.0)
SMALL: dict[str, Any] = {"population": 12, "generations": 10, "survivors": 4}


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.fitness, b.fitness)
    np.testing.assert_array_equal(a.greedy_fitness, b.greedy_fitness)
    assert a.history == b.history
    assert (a.evaluations, a.image_evaluations, a.cache_hits) == (b.evaluations, b.image_evaluations, b.cache_hits)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("toy", ["additive", "correlated"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_never_worse_than_the_greedy_completion(
    request: Any, make_problem: Any, toy: str, seed: int, nested: bool
) -> None:
    problem = make_problem(seed=seed)
    evaluate = request.getfixturevalue(toy)(problem)
    result = select_groups("evolutionary", problem, TARGETS, evaluate, seed=seed, nested=nested, n_images=16, **SMALL)
    assert (result.fitness <= result.greedy_fitness).all()
    fixed = np.zeros(problem.n_groups, dtype=bool)
    for index, target in enumerate(TARGETS):
        greedy = greedy_completion(problem, target, fixed, density_ranks(problem))
        assert result.greedy_fitness[index] == evaluate.fitness(greedy, 16)
        if nested:
            assert (result.masks[index] >= fixed).all()
            fixed = result.masks[index]


def test_keeps_greedy_where_greedy_is_optimal(make_problem: Any, additive: Any) -> None:
    problem = make_problem(macs="equal")
    evaluate = additive(problem)
    found = select_groups("evolutionary", problem, TARGETS, evaluate, seed=1, n_images=4, **SMALL)
    greedy = select_groups("greedy", problem, TARGETS, evaluate, n_images=4)
    np.testing.assert_array_equal(found.masks, greedy.masks)


def test_beats_greedy_and_random_where_errors_interact(make_problem: Any, correlated: Any) -> None:
    gains = []
    for seed in range(3):
        problem = make_problem(sizes=(6, 8, 8, 10, 12), seed=seed)
        evaluate = correlated(problem, seed=seed + 10)
        fitness = {
            name: select_groups(name, problem, [0.5], evaluate, seed=seed, n_images=16).fitness[0]
            for name in ("random", "greedy", "evolutionary")
        }
        assert fitness["evolutionary"] < fitness["greedy"]
        assert fitness["evolutionary"] < fitness["random"]
        gains.append(fitness["evolutionary"] / fitness["greedy"])
    assert np.mean(gains) < 0.9


def test_finds_the_optimum_of_a_small_problem(make_problem: Any, correlated: Any) -> None:
    problem = make_problem(sizes=(4, 4, 4), macs="equal")
    evaluate = correlated(problem)
    result = select_groups("evolutionary", problem, [0.5], evaluate, seed=0, n_images=8)
    masks = [np.array([bool(code >> bit & 1) for bit in range(12)]) for code in range(1 << 12)]
    best = min(evaluate.fitness(mask, 8) for mask in masks if mask.sum() == 6)
    assert result.fitness[0] == pytest.approx(best)


def test_same_seed_same_result_other_seed_other_search(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    runs = [
        select_groups("evolutionary", problem, TARGETS, correlated(problem), seed=seed, n_images=16, **SMALL)
        for seed in (7, 7, 8)
    ]
    assert_same(runs[0], runs[1])
    assert runs[0].history != runs[2].history


def test_independent_choice_does_not_depend_on_the_other_targets(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    settings: dict[str, Any] = {"seed": 5, "nested": False, "n_images": 16, **SMALL}
    many = select_groups("evolutionary", problem, TARGETS, correlated(problem), **settings)
    one = select_groups("evolutionary", problem, [0.5], correlated(problem), **settings)
    np.testing.assert_array_equal(many.masks[1], one.masks[0])


def test_needs_an_evaluation(make_problem: Any) -> None:
    with pytest.raises(SelectionError, match="needs an evaluation"):
        select_groups("evolutionary", make_problem(), TARGETS)


def test_evaluations_are_counted_and_nothing_is_scored_twice(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    evaluate = correlated(problem)
    result = select_groups("evolutionary", problem, [0.5], evaluate, seed=0, n_images=16, **SMALL)
    assert result.evaluations == sum(n for n, _ in evaluate.calls) == len(evaluate.scored)
    assert result.image_evaluations == sum(n * images for n, images in evaluate.calls)
    assert max(Counter(evaluate.scored).values()) == 1
    # Initial population; children only, on top of survivors scored again when the images change; the final choice.
    images = [row["n_images"] for row in result.history]
    assert images == [4] * 5 + [8] * 4 + [16] * 2
    scored = np.diff([0, *(row["evaluations"] for row in result.history)])
    assert scored[0] == 12
    for generation in range(1, 11):
        changed = images[generation] != images[generation - 1]
        assert scored[generation] == 8 + (4 if changed else 0)
    assert result.evaluations - result.history[-1]["evaluations"] <= 1  # greedy, unless it survived
    assert [row["generation"] for row in result.history] == list(range(11))


def test_best_never_rises_while_the_images_stay_the_same(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    history = select_groups("evolutionary", problem, [0.5], correlated(problem), seed=0, n_images=16, **SMALL).history
    for before, after in itertools.pairwise(history):
        if before["n_images"] == after["n_images"]:
            assert after["best"] <= before["best"]
        assert after["best"] <= after["mean"]


def test_small_problems_use_the_memory_instead_of_the_evaluation(make_problem: Any, correlated: Any) -> None:
    problem = make_problem(sizes=(2, 3), macs="equal")
    evaluate = correlated(problem)
    result = select_groups(
        "evolutionary", problem, [0.4], evaluate, seed=0, n_images=4, image_schedule=((1.0, 1.0),), **SMALL
    )
    assert result.evaluations <= 10  # two of five groups
    assert result.cache_hits > result.evaluations


def test_images_schedule() -> None:
    settings = EvolutionarySettings(generations=9)
    assert [settings.images(g, 100) for g in range(10)] == [25] * 4 + [50] * 4 + [100] * 2
    assert [settings.images(g, 1) for g in range(10)] == [1] * 10
    assert EvolutionarySettings(generations=0).images(0, 256) == 64


def test_final_choice_is_made_on_all_images(make_problem: Any, additive: Any) -> None:
    """On few images the fitness misleads; greedy, which is best on all, must come out."""
    problem = make_problem(macs="equal")
    right = additive(problem).fitness

    def evaluate(masks: Any, n_images: int) -> Any:
        return np.array([right(m, n_images) if n_images == 16 else -right(m, n_images) for m in masks])

    result = select_groups("evolutionary", problem, [0.5], evaluate, n_images=16, image_schedule=((1.0, 0.5),), **SMALL)
    greedy = select_groups("greedy", problem, [0.5])
    np.testing.assert_array_equal(result.masks, greedy.masks)


def test_targets_zero_and_one_cost_one_candidate_each(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    result = select_groups("evolutionary", problem, [0.0, 1.0], correlated(problem), n_images=4)
    assert result.evaluations == 2 and not result.masks[0].any() and result.masks[1].all()
    assert result.fitness[0] == 0.0 < result.fitness[1]


def test_progress_reports_every_generation(make_problem: Any, correlated: Any) -> None:
    problem = make_problem()
    seen: list[SearchProgress] = []
    result = select_groups(
        "evolutionary", problem, [0.0, 0.5, 1.0], correlated(problem), n_images=16, progress=seen.append, **SMALL
    )
    assert [(p.target, p.generation, p.best, p.n_images, p.evaluations) for p in seen] == [
        (row["target"], row["generation"], row["best"], row["n_images"], row["evaluations"]) for row in result.history
    ]
    assert {(p.n_targets, p.selector) for p in seen} == {(3, "evolutionary")}
    for name in ("random", "greedy"):
        seen.clear()
        select_groups(name, problem, [0.25, 0.5], progress=seen.append)
        assert [p.target_index for p in seen] == [0, 1] and np.isnan(seen[0].best)


def run(problem: Any, evaluate: Any, path: Path | None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"seed": 3, "n_images": 16, "checkpoint": path, **SMALL, **changes}
    targets = arguments.pop("targets", (0.0, *TARGETS))
    return select_groups("evolutionary", problem, targets, evaluate, **arguments)


def test_resumes_exactly_wherever_it_was_interrupted(make_problem: Any, correlated: Any, tmp_path: Path) -> None:
    problem = make_problem()
    whole = correlated(problem)
    expected = run(problem, whole, tmp_path / "whole.json")
    assert_same(expected, run(problem, correlated(problem), None))  # saving changes nothing
    for fail_at in range(0, len(whole.calls), 5):
        path = tmp_path / f"{fail_at}.json"
        first = correlated(problem, fail_at=fail_at)
        with pytest.raises(InterruptedError):
            run(problem, first, path)
        second = correlated(problem)
        assert_same(run(problem, second, path), expected)
        # Only the interrupted generation is repeated, and what it scored before is not counted twice. It makes two
        # calls where the number of images changes: survivors, then children.
        assert len(whole.calls) <= len(first.calls) + len(second.calls) <= len(whole.calls) + 1
        assert whole.calls[len(whole.calls) - len(second.calls) :] == second.calls
    assert not list(tmp_path.glob(".*"))  # no temporary files stay behind


@pytest.mark.parametrize(
    ("changes", "fail_at"),
    [
        ({}, 3),
        # Two targets met by the same sets, all scored on the same images: the memory must not outlive a target.
        ({"targets": (0.5, 0.501), "nested": False, "image_schedule": ((1.0, 1.0),)}, 1),
    ],
)
def test_resumes_again_and_again(
    make_problem: Any, correlated: Any, tmp_path: Path, changes: dict[str, Any], fail_at: int
) -> None:
    problem = make_problem(macs="equal")
    expected = run(problem, correlated(problem), None, **changes)
    path = tmp_path / "search.json"
    interruptions = 0
    while True:
        try:
            result = run(problem, correlated(problem, fail_at=fail_at), path, **changes)
            break
        except InterruptedError:
            interruptions += 1
            assert interruptions < 100
    assert interruptions >= 3
    assert_same(result, expected)


def test_interruption_by_the_progress_callable_resumes_too(make_problem: Any, correlated: Any, tmp_path: Path) -> None:
    problem = make_problem()
    expected = run(problem, correlated(problem), None)
    for stop_at in (0, 1, 12, 13, len(expected.history) - 1):
        path = tmp_path / f"{stop_at}.json"
        seen: list[SearchProgress] = []

        def stop(progress: SearchProgress, seen: list[SearchProgress] = seen, stop_at: int = stop_at) -> None:
            seen.append(progress)
            if len(seen) > stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(problem, correlated(problem), path, progress=stop)
        assert_same(run(problem, correlated(problem), path), expected)


def test_a_finished_search_answers_at_once(make_problem: Any, correlated: Any, tmp_path: Path) -> None:
    problem = make_problem()
    path = tmp_path / "search.json"
    expected = run(problem, correlated(problem), path)
    again = correlated(problem)
    assert_same(run(problem, again, path), expected)
    assert again.calls == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"n_images": 8}, "n_images"),
        ({"nested": False}, "nested"),
        ({"targets": (0.3,)}, "targets"),
        ({"swaps": 3.0}, "settings"),
        ({"context": "other"}, "settings"),
        ({"problem": 1}, "problem"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(
    make_problem: Any, correlated: Any, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    problem = make_problem()
    path = tmp_path / "search.json"
    with pytest.raises(InterruptedError):
        run(problem, correlated(problem, fail_at=4), path)
    before = path.read_bytes()
    other = make_problem(seed=changes.pop("problem", 0))
    with pytest.raises(SelectionError, match=f"another search: {named} differ.*delete it"):
        run(other, correlated(other), path, **changes)
    assert path.read_bytes() == before


def test_damaged_checkpoints_are_refused(make_problem: Any, correlated: Any, tmp_path: Path) -> None:
    problem = make_problem()
    path = tmp_path / "search.json"
    with pytest.raises(InterruptedError):
        run(problem, correlated(problem, fail_at=17), path)
    text = path.read_text()
    good = json.loads(text)

    def changed(**entries: Any) -> str:
        return json.dumps({**good, **entries})

    current = good["current"]
    broken = [
        text[: len(text) // 2],
        "",
        "[]",
        "\udcff",
        '{"format": "something else"}',
        changed(version=99),
        changed(masks=["!!!!"]),
        changed(masks=[]),
        changed(fitness=[float("nan")] * len(good["fitness"])),
        changed(evaluations=-1),
        changed(history=[{}]),
        changed(current={}),
        changed(current={**current, "population": current["population"][:-1]}),
        changed(current={**current, "population": ["AAAA"] * len(current["population"])}),
        changed(current={**current, "rng": {**current["rng"], "bit_generator": "MT19937"}}),
        changed(current={**current, "rng": {**current["rng"], "state": {}}}),
        changed(current={**current, "memory": {"AAAAAA==": "low"}}),
    ]
    for content in broken:
        path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
        with pytest.raises(SelectionError, match=r"(delete it|another path)"):
            run(problem, correlated(problem), path)
    path.write_text(text)
    assert_same(run(problem, correlated(problem), path), run(problem, correlated(problem), None))


def test_an_unwritable_checkpoint_is_reported_before_the_search(
    make_problem: Any, correlated: Any, tmp_path: Path
) -> None:
    problem = make_problem()
    evaluate = correlated(problem)
    with pytest.raises(OutputError, match="directory does not exist"):
        run(problem, evaluate, tmp_path / "missing" / "search.json")
    assert evaluate.calls == []
    with pytest.raises(SelectionError, match="cannot read"):
        run(problem, evaluate, tmp_path)  # a directory


def test_the_checkpoint_is_replaced_whole_or_not_at_all(
    make_problem: Any, correlated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem()
    path = tmp_path / "search.json"
    with pytest.raises(InterruptedError):
        run(problem, correlated(problem, fail_at=4), path)
    before = path.read_bytes()

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        run(problem, correlated(problem), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]


def test_packed_masks_come_back() -> None:
    rng = np.random.default_rng(0)
    for n_groups in (1, 7, 8, 9, 64, 101):
        mask = rng.random(n_groups) < 0.5
        np.testing.assert_array_equal(unpack(pack(mask), n_groups), mask)
    with pytest.raises(ValueError, match="padding"):
        unpack(b"\xff", 7)
    with pytest.raises(ValueError, match="hold"):
        unpack(b"\xff\x00", 8)


def test_selector_takes_path_as_text(make_problem: Any, correlated: Any, tmp_path: Path) -> None:
    problem = make_problem()
    path: Any = str(tmp_path / "search.json")
    get_selector("evolutionary", **SMALL).select(
        problem, [0.5], correlated(problem), seed=0, n_images=4, checkpoint=path
    )
    assert Path(path).is_file()
