"""Selectors that search nothing: random and greedy. NumPy only. Source: design notes, section 2."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bitdial.selection.latency import LatencyModel, latency_completion
from bitdial.selection.problem import (
    BoolArray,
    Costs,
    Evaluate,
    FloatArray,
    LatencyGoal,
    SearchProgress,
    SelectionProblem,
    SelectionResult,
    check_request,
)
from bitdial.selection.scoring import Scorer
from bitdial.selection.targets import density_ranks, meet_target
from bitdial.selection.variation import SearchSpace


def target_seed(seed: int, target: float) -> np.random.SeedSequence:
    """The source of randomness of one target.

    It depends on the target's value, not on its place among the others, so that an independent choice at 50 % is the
    same whichever other targets are asked for.
    """
    return np.random.SeedSequence(int(seed), spawn_key=(round(target * 1e9),))


class _DirectSelector(ABC):
    """Completes the nested set in an order of keys, target by target."""

    name: str = ""

    @abstractmethod
    def _keys(self, ranks: FloatArray, rng: np.random.Generator) -> FloatArray:
        """float64 [n_groups]: groups are extracted by ascending key."""

    def _complete(self, space: SearchSpace, model: LatencyModel | None, rng: np.random.Generator) -> BoolArray:
        """bool [n_groups]: the set of one target."""
        keys = self._keys(space.ranks, rng)
        return meet_target(space.problem, space.fixed, space.target, fixed=space.fixed, keys=keys)

    def select(
        self,
        problem: SelectionProblem,
        targets: Sequence[float],
        evaluate: Evaluate | None = None,
        *,
        seed: int = 0,
        nested: bool = True,
        n_images: int = 0,
        progress: Callable[[SearchProgress], None] | None = None,
        checkpoint: Path | None = None,
        latency: LatencyGoal | None = None,
        costs: Costs | None = None,
    ) -> SelectionResult:
        """See `Selector.select`. `evaluate` only reports; of the rest but `latency` nothing is used: this takes milliseconds."""
        checked = check_request(targets, evaluate, seed=seed, n_images=n_images)
        start = time.perf_counter()
        ranks = density_ranks(problem)
        masks: list[BoolArray] = []
        greedy: list[BoolArray] = []
        nothing = np.zeros(problem.n_groups, dtype=np.bool_)
        model = LatencyModel(problem, latency) if latency is not None else None
        for target in checked:
            fixed = masks[-1] if nested and masks else nothing
            rng = np.random.default_rng(target_seed(seed, target))
            space = SearchSpace(problem, target, fixed, ranks)
            masks.append(self._complete(space, model, rng))
            greedy.append(space.greedy if model is None else latency_completion(space, model))
        fitness = np.full(len(checked), np.nan)
        greedy_fitness = fitness.copy()
        scorer = Scorer(evaluate) if evaluate is not None else None
        history = []
        for index, target in enumerate(checked):
            if scorer is not None:
                fitness[index] = scorer.score(masks[index][None], n_images)[0]
                if (masks[index] == greedy[index]).all():
                    greedy_fitness[index] = fitness[index]
                history.append(
                    {
                        "target": target,
                        "generation": 0,
                        "best": float(fitness[index]),
                        "mean": float(fitness[index]),
                        "n_images": n_images,
                        "evaluations": scorer.evaluations,
                    }
                )
            if progress is not None:
                done = scorer.evaluations if scorer is not None else 0
                elapsed = time.perf_counter() - start
                best = float(fitness[index])
                progress(SearchProgress(self.name, target, index, len(checked), 0, 0, best, n_images, done, elapsed))
        return SelectionResult(
            selector=self.name,
            seed=int(seed),
            targets=checked,
            masks=np.stack(masks),
            shares=np.array([problem.share(mask) for mask in masks]),
            fitness=fitness,
            greedy_fitness=greedy_fitness,
            history=history,
            evaluations=scorer.evaluations if scorer is not None else 0,
            image_evaluations=scorer.image_evaluations if scorer is not None else 0,
            cache_hits=scorer.cache_hits if scorer is not None else 0,
            seconds=time.perf_counter() - start,
            nested=nested,
            latency=model.seconds(np.stack(masks)) if model is not None else None,
        )


class RandomSelector(_DirectSelector):
    """Extracts groups in a uniformly random order, whatever their scores: the baseline that a score has to beat."""

    name: str = "random"

    def _keys(self, ranks: FloatArray, rng: np.random.Generator) -> FloatArray:
        return rng.permutation(len(ranks)).astype(np.float64)


class GreedySelector(_DirectSelector):
    """Extracts groups by ascending score per MAC (why per MAC: see `density_ranks`). Uses no randomness.

    With a latency goal that this misses: the completion of `latency_completion`.
    """

    name: str = "greedy"

    def _complete(self, space: SearchSpace, model: LatencyModel | None, rng: np.random.Generator) -> BoolArray:
        return super()._complete(space, model, rng) if model is None else latency_completion(space, model)

    def _keys(self, ranks: FloatArray, rng: np.random.Generator) -> FloatArray:
        return ranks
