"""Meeting a target share of low MACs, extracting and restoring groups in an order of the caller's choice. NumPy only."""

from __future__ import annotations

import numpy as np

from bitdial.errors import RatioError, SelectionError
from bitdial.selection.problem import BoolArray, FloatArray, SelectionProblem


def density_ranks(problem: SelectionProblem) -> FloatArray:
    """float64 [n_groups] in 0..1: rank of each group by score per MAC, 0 = extracted first; equal densities share a rank.

    Score per MAC, not score: a target is a share of MACs, so the least total error for it is a knapsack problem, and
    taking items by density is its optimum up to the last item (exact where all groups have equal MACs). Ranks, not the
    densities themselves, because noise added to ranks means the same for every network, however its scores are spread.
    """
    density = problem.flat_scores / problem.flat_macs
    _, inverse, counts = np.unique(density, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle = ends - (counts + 1) / 2  # mean position of each run of equal values
    ranks: FloatArray = middle[inverse.reshape(-1)] / max(1, problem.n_groups - 1)
    return ranks


def meet_target(
    problem: SelectionProblem, mask: BoolArray, target: float, *, fixed: BoolArray, keys: FloatArray
) -> BoolArray:
    """Extract or restore groups until the share of low MACs is as near `target` as single toggles bring it.

    mask    bool [n_groups]: where to start
    target  share of low MACs, in 0..1
    fixed   bool [n_groups]: groups that stay low (the nested set of a lower target)
    keys    float64 [n_groups]: groups are extracted by ascending key and restored by descending key; ties by position

    Returns a new bool [n_groups] that contains `fixed`. No single further toggle would bring it nearer to the target,
    so it misses the target by at most half the MACs of the smallest group that could still be toggled in the direction
    needed; it overshoots by more only where `fixed` alone does, and is then `fixed` itself.
    Raises RatioError for a target outside 0..1, SelectionError for malformed masks or keys.
    """
    problem.check_mask(mask)
    problem.check_mask(fixed)
    if keys.shape != (problem.n_groups,) or np.isnan(keys).any():
        raise SelectionError(f"keys must be numbers [{problem.n_groups}], one per group, got shape {list(keys.shape)}")
    if not 0.0 <= target <= 1.0:
        raise RatioError(f"target {target} is not a share: give a number in 0..1")
    macs = problem.flat_macs
    goal = target * problem.total_macs
    result = mask | fixed
    low = int(macs[result].sum())
    bulk = True
    while low != goal:
        missing = goal - low
        if missing > 0:
            candidates = np.flatnonzero(~result)
            order = candidates[np.argsort(keys[candidates], kind="stable")]
        else:
            candidates = np.flatnonzero(result & ~fixed)
            order = candidates[np.argsort(-keys[candidates], kind="stable")]
        gap = abs(missing)
        if bulk:
            # The bulk in one step: everything that fits before the first group that does not.
            chosen = order[: int(np.searchsorted(np.cumsum(macs[order]), gap, side="right"))]
            bulk = False
        else:
            # Then one by one: the first group whose toggle lessens the gap. The gap falls strictly, so this ends.
            fitting = np.flatnonzero(macs[order] < 2 * gap)
            if len(fitting) == 0:
                break
            chosen = order[fitting[:1]]
        result[chosen] = missing > 0
        low += int(macs[chosen].sum()) * (1 if missing > 0 else -1)
    return result


def greedy_completion(problem: SelectionProblem, target: float, fixed: BoolArray, ranks: FloatArray) -> BoolArray:
    """bool [n_groups]: `fixed` plus the cheapest groups by score per MAC (ranks: see `density_ranks`)."""
    return meet_target(problem, fixed, target, fixed=fixed, keys=ranks)
