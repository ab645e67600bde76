"""Selectors that search nothing: random and greedy. NumPy only. Source: design notes, section 2."""

from __future__ import annotations

import time
from abc import abstractmethod

import numpy as np

from bitdial.selection.latency import LatencyModel, latency_completion
from bitdial.selection.problem import BoolArray, FloatArray, Request, SearchProgress, SelectionResult, Selector
from bitdial.selection.scoring import Scorer
from bitdial.selection.targets import density_ranks, meet_target
from bitdial.selection.variation import SearchSpace


def target_seed(seed: int, target: float) -> np.random.SeedSequence:
    """The source of randomness of one target.

    It depends on the target's value, not on its place among the others, so that an independent choice at 50 % is the
    same whichever other targets are asked for.
    """
    return np.random.SeedSequence(int(seed), spawn_key=(round(target * 1e9),))


class _DirectSelector(Selector):
    """Completes the nested set in an order of keys, target by target."""

    @abstractmethod
    def _keys(self, ranks: FloatArray, rng: np.random.Generator) -> FloatArray:
        """float64 [n_groups]: groups are extracted by ascending key."""

    def _complete(self, space: SearchSpace, model: LatencyModel | None, rng: np.random.Generator) -> BoolArray:
        """bool [n_groups]: the set of one target."""
        keys = self._keys(space.ranks, rng)
        return meet_target(space.problem, space.fixed, space.target, fixed=space.fixed, keys=keys)

    def choose(self, request: Request) -> SelectionResult:
        """`evaluate` only reports; of the rest but `latency` nothing is used: this takes milliseconds."""
        start = time.perf_counter()
        problem, targets, n_images = request.problem, request.targets, request.n_images
        ranks = density_ranks(problem)
        masks: list[BoolArray] = []
        greedy: list[BoolArray] = []
        nothing = np.zeros(problem.n_groups, dtype=np.bool_)
        model = LatencyModel(problem, request.latency) if request.latency is not None else None
        for target in targets:
            fixed = masks[-1] if request.nested and masks else nothing
            rng = np.random.default_rng(target_seed(request.seed, target))
            space = SearchSpace(problem, target, fixed, ranks)
            masks.append(self._complete(space, model, rng))
            greedy.append(space.greedy if model is None else latency_completion(space, model))
        fitness = np.full(len(targets), np.nan)
        greedy_fitness = fitness.copy()
        scorer = Scorer(request.evaluate)
        history = []
        for index, target in enumerate(targets):
            if request.evaluate is not None:
                fitness[index] = scorer.score(masks[index][None], n_images)[0]
                if (masks[index] == greedy[index]).all():
                    greedy_fitness[index] = fitness[index]
                history.append(scorer.row(target, 0, fitness[index : index + 1], n_images))
            if request.progress is not None:
                done, elapsed, best = scorer.evaluations, time.perf_counter() - start, float(fitness[index])
                request.progress(
                    SearchProgress(self.name, target, index, len(targets), 0, 0, best, n_images, done, elapsed)
                )
        return SelectionResult(
            selector=self.name,
            seed=request.seed,
            targets=targets,
            masks=np.stack(masks),
            shares=np.array([problem.share(mask) for mask in masks]),
            fitness=fitness,
            greedy_fitness=greedy_fitness,
            history=history,
            **scorer.counts(),
            seconds=time.perf_counter() - start,
            nested=request.nested,
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
