"""Synthetic problems whose fitness is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitdial.selection import SelectionProblem


class CountingEvaluate:
    """Wraps a fitness of one mask; counts candidates, remembers calls, may fail on the n-th call."""

    def __init__(self, fitness: Callable[[Any, int], float], fail_at: int | None = None) -> None:
        self.fitness = fitness
        self.fail_at = fail_at
        self.calls: list[tuple[int, int]] = []
        self.scored: list[tuple[bytes, int]] = []

    def __call__(self, masks: Any, n_images: int) -> Any:
        assert masks.dtype == np.bool_ and masks.ndim == 2
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise InterruptedError("stopped on purpose")
        self.calls.append((len(masks), n_images))
        self.scored += [(mask.tobytes(), n_images) for mask in masks]
        return np.array([self.fitness(mask, n_images) for mask in masks])


def _problem(sizes: tuple[int, ...], seed: int, macs: str) -> SelectionProblem:
    rng = np.random.default_rng(seed)
    per_layer = []
    for size in sizes:
        if macs == "equal":
            layer_macs = np.full(size, 1000)
        else:  # layers of different weight, and a short last group in each
            layer_macs = np.full(size, int(rng.integers(500, 4000)))
            layer_macs[-1] = int(rng.integers(100, layer_macs[0] + 1))
        per_layer.append(layer_macs)
    scores = tuple(rng.exponential(size=size) for size in sizes)
    return SelectionProblem(tuple(f"layer{i}" for i in range(len(sizes))), scores, tuple(per_layer))


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., SelectionProblem]:
    def make(sizes: tuple[int, ...] = (4, 6, 8, 8), seed: int = 0, macs: str = "ragged") -> SelectionProblem:
        return _problem(sizes, seed, macs)

    return make


@pytest.fixture(scope="session")
def additive() -> Callable[..., CountingEvaluate]:
    """Squared errors add: the scores tell everything."""

    def make(problem: SelectionProblem, fail_at: int | None = None) -> CountingEvaluate:
        def fitness(mask: Any, n_images: int) -> float:
            return float(np.sqrt(problem.flat_scores[mask].sum()))

        return CountingEvaluate(fitness, fail_at)

    return make


@pytest.fixture(scope="session")
def correlated() -> Callable[..., CountingEvaluate]:
    """Each group adds a vector to the error, of squared length = score: vectors of different groups help or cancel.

    The fitness depends on the number of images, so that forgetting to score again would be seen.
    """

    def make(problem: SelectionProblem, fail_at: int | None = None, seed: int = 1) -> CountingEvaluate:
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((problem.n_groups, 12)) + 0.5
        vectors *= np.sqrt(problem.flat_scores / (vectors**2).sum(axis=1))[:, None]

        def fitness(mask: Any, n_images: int) -> float:
            weights = 1.0 + 0.1 * np.sin(np.arange(12) * n_images)
            total = np.zeros(12)
            for vector in vectors[mask]:  # one order of additions, whatever the batch
                total = total + vector
            return float(np.sqrt((weights * total**2).sum()))

        return CountingEvaluate(fitness, fail_at)

    return make
