"""How the evolutionary search makes candidates: initial population, crossover, swaps, repair. NumPy only.

Every candidate contains the fixed (nested) groups and meets its target as nearly as `meet_target` promises.
Source: design notes, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitdial.selection.problem import BoolArray, FloatArray, SelectionProblem
from bitdial.selection.targets import greedy_completion, meet_target


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All masks of one target.

    fixed  bool [n_groups]: groups that are low already at a lower target
    ranks  float64 [n_groups]: see `density_ranks`
    """

    problem: SelectionProblem
    target: float
    fixed: BoolArray
    ranks: FloatArray

    @cached_property
    def greedy(self) -> BoolArray:
        """bool [n_groups]: the greedy completion of the fixed groups."""
        return greedy_completion(self.problem, self.target, self.fixed, self.ranks)

    def repair(self, mask: BoolArray, noise: float, rng: np.random.Generator) -> BoolArray:
        """The mask brought to the target, cheap groups by noisy score extracted first and dear ones raised first.

        noise: standard deviation of what is added to the ranks (0..1). Without it, repair would make every child the
        same at its margin; with much of it, the scores would not count.
        """
        keys = self.ranks + noise * rng.standard_normal(len(self.ranks))
        return meet_target(self.problem, mask, self.target, fixed=self.fixed, keys=keys)


def perturbed_greedy(space: SearchSpace, noise: float, rng: np.random.Generator) -> BoolArray:
    """bool [n_groups]: a greedy completion by noisy scores; half of the noise is shared by all groups of a layer.

    The shared half matters because scores are less comparable between layers than within one: it makes candidates that
    spread the low share differently over the layers.
    """
    problem = space.problem
    of_layer = rng.standard_normal(problem.n_layers)[problem.layer_index]
    keys = space.ranks + noise * (of_layer + rng.standard_normal(problem.n_groups)) / np.sqrt(2.0)
    return meet_target(problem, space.fixed, space.target, fixed=space.fixed, keys=keys)


def random_completion(space: SearchSpace, rng: np.random.Generator) -> BoolArray:
    """bool [n_groups]: the fixed groups and uniformly random others."""
    keys = rng.permutation(space.problem.n_groups).astype(np.float64)
    return meet_target(space.problem, space.fixed, space.target, fixed=space.fixed, keys=keys)


def initial_population(
    space: SearchSpace, size: int, noises: tuple[float, ...], random_share: float, rng: np.random.Generator
) -> BoolArray:
    """bool [up to size, n_groups], no two rows equal, the greedy completion first.

    The rest are perturbed greedy completions, of the strengths `noises` in turn, and a share of random completions.
    Fewer than `size` come back where the problem has too few different candidates.
    """
    rows = [space.greedy]
    known = {space.greedy.tobytes()}
    n_random = round(random_share * size)
    for attempt in range(4 * size):
        if len(rows) >= size:
            break
        if len(rows) >= size - n_random:
            mask = random_completion(space, rng)
        else:
            mask = perturbed_greedy(space, noises[attempt % len(noises)], rng)
        if mask.tobytes() not in known:
            known.add(mask.tobytes())
            rows.append(mask)
    return np.stack(rows)


def crossover(space: SearchSpace, first: BoolArray, second: BoolArray, rng: np.random.Generator) -> BoolArray:
    """bool [n_groups]: each layer whole from one parent or the other, by a fair coin. Not yet repaired."""
    from_first = rng.random(space.problem.n_layers) < 0.5
    child: BoolArray = np.where(from_first[space.problem.layer_index], first, second)
    return child


def swap_within_layers(space: SearchSpace, mask: BoolArray, n_swaps: int, rng: np.random.Generator) -> BoolArray:
    """bool [n_groups]: n_swaps times, one low and one high group of the same layer trade places; fixed groups stay low.

    A layer is drawn in proportion to its free groups, the two groups uniformly. Fewer swaps where no layer has both a
    free low and a high group. Not yet repaired: groups of one layer may differ in MACs.
    """
    problem = space.problem
    result: BoolArray = mask.copy()
    for _ in range(n_swaps):
        low = np.bincount(problem.layer_index[result & ~space.fixed], minlength=problem.n_layers)
        high = np.bincount(problem.layer_index[~result], minlength=problem.n_layers)
        weights = np.where((low > 0) & (high > 0), low + high, 0).astype(np.float64)
        if not weights.any():
            break
        part = problem.layer_slices[int(rng.choice(problem.n_layers, p=weights / weights.sum()))]
        raised = rng.choice(np.flatnonzero(result[part] & ~space.fixed[part]))
        extracted = rng.choice(np.flatnonzero(~result[part]))
        result[part.start + raised] = False
        result[part.start + extracted] = True
    return result
