"""Choosing groups so that low channels lie where they buy time: a goal for the predicted gain, and moves that meet it.

A prefix of a few low groups often costs a layer as much time as none: transforms and second passes do not shrink with it
(design notes, section 4). At an equal share of multiplies it is then the choice of LAYERS that decides what is gained. The
goal is a constraint: at ratio r a plan has at least `gain` * r of the predicted gain of ratio 1. Among the plans that meet
it, selectors still look for the least distance of soft labels, so there are no units to weigh against each other.
Candidates that miss the goal are not scored. Where a ratio cannot meet it, the most that was found takes its place.

The selectors know no engine: predicted seconds come from a callable. NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitdial.errors import SelectionError
from bitdial.selection.problem import BoolArray, FloatArray, LatencyGoal, SelectionProblem
from bitdial.selection.targets import meet_target
from bitdial.selection.variation import SearchSpace

PRICES = tuple(2.0**e for e in range(-10, 13))  # of the goal in units of the problem's scores, cheapest first
BISECTIONS = 28
REORDERINGS, REORDERED = 10, 12  # rounds of hill climbing over orders of layers, and how many layers a round moves
NOISE_OF_SCORES = 3.0  # standard deviation of log scores per unit of noise on ranks (0..1); believed, not tuned
SLACK = 1e-9  # of the whole gain; for sums in another order


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """A goal applied to a problem."""

    problem: SelectionProblem
    goal: LatencyGoal

    @cached_property
    def _layer_macs(self) -> FloatArray:
        return np.array([int(m.sum()) for m in self.problem.macs], dtype=np.float64)

    def shares(self, masks: BoolArray) -> FloatArray:
        """float64 [n, n_layers]: share of each layer's MACs that masks bool [n, n_groups] run low."""
        starts = [part.start for part in self.problem.layer_slices]
        low = np.add.reduceat(masks * self.problem.flat_macs, starts, axis=1)
        result: FloatArray = low / self._layer_macs
        return result

    def seconds(self, masks: BoolArray) -> FloatArray:
        """float64 [n]: predicted seconds per sample of the problem's layers."""
        result: FloatArray = self.layer_times(self.shares(masks)).sum(axis=1)
        return result

    def layer_times(self, shares: FloatArray) -> FloatArray:
        """float64 [n, n_layers]: `layer_seconds`, checked. Raises SelectionError for another shape or non-finite times."""
        found = np.asarray(self.goal.layer_seconds(shares), dtype=np.float64)
        if found.shape != shares.shape or not np.isfinite(found).all():
            raise SelectionError(
                f"layer_seconds returned {list(found.shape)} for shares {list(shares.shape)}: it must return one finite "
                "number each"
            )
        return found

    @cached_property
    def base(self) -> float:
        """Seconds with nothing low."""
        return float(self.layer_times(np.zeros((1, self.problem.n_layers))).sum())

    @cached_property
    def whole_gain(self) -> float:
        """Seconds that ratio 1 saves."""
        return self.base - float(self.layer_times(np.ones((1, self.problem.n_layers))).sum())

    def gains(self, masks: BoolArray) -> FloatArray:
        """float64 [n]: seconds that masks save."""
        return self.base - self.seconds(masks)

    def wanted(self, target: float) -> float:
        """Seconds to save at a target; minus infinity where even ratio 1 saves nothing, so that all plans meet it."""
        if self.whole_gain <= 0.0 or self.goal.gain == 0.0:
            return -np.inf
        return self.goal.gain * target * self.whole_gain - SLACK * self.whole_gain


def latency_completion(space: SearchSpace, model: LatencyModel, scores: FloatArray | None = None) -> BoolArray:
    """bool [n_groups]: the greedy completion that meets the goal at little total score.

    The plain greedy completion, if it meets the goal. Else every layer takes the number of its cheapest groups that is
    best at a price per second and a price per MAC (the multiplier relaxation of a knapsack with two constraints); the
    price per MAC is bisected for the target. Of all prices per second, and of two ways to fill what a layer taken whole
    leaves open, the least total score that meets the goal wins, or, if none does, the largest gain.

    scores: float64 [n_groups], in place of the problem's.
    """
    problem = space.problem
    costs = problem.flat_scores if scores is None else scores
    density = costs / problem.flat_macs
    plain = space.greedy if scores is None else _fill(space, space.fixed, density)
    wanted = model.wanted(space.target)
    if model.gains(plain[None])[0] >= wanted:
        return plain
    relaxation = _Relaxation(space, model, costs, density)
    found: list[tuple[float, BoolArray]] = []
    best_gain, best_mask = float(model.gains(plain[None])[0]), plain
    first = None
    for index, price in enumerate(PRICES):
        if first is not None and index > first + 2:  # dearer time only costs more score
            break
        below, above = relaxation.solve(price)
        preferred = np.where(above, density - 2.0 * (density.max() + 1.0), density)
        masks = np.stack([_fill(space, below, preferred), _fill(space, below, density)])
        for mask, gain in zip(masks, model.gains(masks), strict=True):
            if gain >= wanted:
                found.append((float(costs[mask].sum()), mask))
                first = index if first is None else first
            elif gain > best_gain:
                best_gain, best_mask = float(gain), mask
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    if scores is not None:  # one of many candidates: not worth the climb
        return best_mask
    return _reorder_layers(space, model, best_mask, wanted)


def _reorder_layers(space: SearchSpace, model: LatencyModel, mask: BoolArray, wanted: float) -> BoolArray:
    """bool [n_groups]: layers filled whole in an order that gains more than `mask`, if hill climbing finds one.

    For the few layers of a small network, where the relaxation leaves a gap as large as a layer. Moves: any layer to any
    place of the order; stops at the goal.
    """
    order = [int(layer) for layer in np.argsort(-model.shares(mask[None])[0], kind="stable")]
    best_gain = float(model.gains(mask[None])[0])
    for _ in range(REORDERINGS):
        orders = []
        for layer in order[:REORDERED]:
            rest = [other for other in order if other != layer]
            orders += [[*rest[:place], layer, *rest[place:]] for place in range(min(len(order), REORDERED))]
        masks = np.stack([_fill(space, space.fixed, _layer_keys(space, own)) for own in orders])
        gains = model.gains(masks)
        enough = np.flatnonzero(gains >= wanted)
        winner = int(enough[0]) if len(enough) else int(np.argmax(gains))
        if gains[winner] <= best_gain:
            break
        mask, order, best_gain = masks[winner], orders[winner], float(gains[winner])
        if len(enough):
            break
    return mask


def _layer_keys(space: SearchSpace, order: list[int]) -> FloatArray:
    """Keys that extract whole layers in an order (layer numbers), cheap groups of each first."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    keys: FloatArray = place[space.problem.layer_index] + 0.5 * space.ranks
    return keys


def _fill(space: SearchSpace, mask: BoolArray, keys: FloatArray) -> BoolArray:
    return meet_target(space.problem, mask, space.target, fixed=space.fixed, keys=keys)


class _Relaxation:
    """How many groups each layer extracts at given prices. Costs, gains and MACs are shares of their totals.

    Arrays [n_layers, 1 + groups of the largest layer]: entry k of a layer is the option "its k cheapest groups, fixed ones
    first"; options that do not exist, or would raise fixed groups, cost infinity.
    """

    def __init__(self, space: SearchSpace, model: LatencyModel, costs: FloatArray, density: FloatArray) -> None:
        problem = space.problem
        self.problem, self.target = problem, space.target
        order = np.lexsort((density, ~space.fixed, problem.layer_index))
        sizes = np.array([len(m) for m in problem.macs])
        starts = np.array([part.start for part in problem.layer_slices])
        place = np.arange(problem.n_groups) - starts[problem.layer_index]
        self.positions = np.empty(problem.n_groups, dtype=np.int64)
        self.positions[order] = place
        shape = (problem.n_layers, int(sizes.max()) + 1)
        step_costs, step_macs = np.zeros(shape), np.zeros(shape)
        step_costs[problem.layer_index, place + 1] = costs[order]
        step_macs[problem.layer_index, place + 1] = problem.flat_macs[order]
        total = float(costs.sum())
        self.costs = np.cumsum(step_costs, axis=1) / (total if total > 0.0 else 1.0)
        options = np.arange(shape[1])[None, :]
        least = np.add.reduceat(space.fixed.astype(np.int64), starts)
        self.costs[(options < least[:, None]) | (options > sizes[:, None])] = np.inf
        low = np.cumsum(step_macs, axis=1)
        self.macs = low / problem.total_macs
        shares = np.minimum(low / low[:, -1:], 1.0)
        seconds = model.layer_times(shares.T).T
        self.gains = (seconds[:, :1] - seconds) / model.whole_gain
        smallest = float(problem.flat_macs.min()) / problem.total_macs
        steps = step_costs / (total if total > 0.0 else 1.0)
        self.dearest = float(steps.max()) / smallest + 1.0  # no price per MAC above these two changes a choice
        self.steepest = float(np.abs(np.diff(self.gains, axis=1)).max()) / smallest

    def _take(self, price: float, per_mac: float) -> tuple[BoolArray, float]:
        counts = np.argmin(self.costs - price * self.gains - per_mac * self.macs, axis=1)
        macs = float(self.macs[np.arange(len(counts)), counts].sum())
        return self.positions < counts[self.problem.layer_index], macs

    def solve(self, price: float) -> tuple[BoolArray, BoolArray]:
        """Masks at most and at least at the target; the second extracts what the first does and (ties aside) a layer more."""
        bound = self.dearest + price * self.steepest
        low, high = -bound, bound
        below, above = self._take(price, low)[0], self._take(price, high)[0]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            mask, macs = self._take(price, middle)
            if macs <= self.target:
                low, below = middle, mask
            else:
                high, above = middle, mask
        return below, above


def latency_population(
    space: SearchSpace,
    model: LatencyModel,
    start: BoolArray,
    wanted: float,
    size: int,
    noises: tuple[float, ...],
    random_share: float,
    rng: np.random.Generator,
) -> BoolArray:
    """bool [up to size, n_groups]: distinct masks that gain at least `wanted` seconds, `start` first.

    The rest are completions by noisy scores (half of the noise shared by all groups of a layer), and a share of layers
    filled in random order. noises: standard deviations as for `initial_population`, times NOISE_OF_SCORES in the log.
    """
    problem = space.problem
    rows, known = [start], {start.tobytes()}
    n_random = round(random_share * size)
    for attempt in range(4 * size):
        if len(rows) >= size:
            break
        of_layer = rng.standard_normal(problem.n_layers)[problem.layer_index]
        of_group = rng.standard_normal(problem.n_groups)
        if len(rows) >= size - n_random:
            mask = _fill(space, space.fixed, of_layer + 1e-6 * of_group)
        else:
            noise = NOISE_OF_SCORES * noises[attempt % len(noises)] * (of_layer + of_group) / np.sqrt(2.0)
            mask = latency_completion(space, model, problem.flat_scores * np.exp(noise))
        if mask.tobytes() not in known and model.gains(mask[None])[0] >= wanted:
            known.add(mask.tobytes())
            rows.append(mask)
    return np.stack(rows)


def move_layers(space: SearchSpace, mask: BoolArray, rng: np.random.Generator) -> BoolArray:
    """bool [n_groups]: one layer that has high groups filled, one with free low groups emptied. Not yet repaired."""
    problem = space.problem
    result: BoolArray = mask.copy()
    raisable = result & ~space.fixed
    to_fill = np.unique(problem.layer_index[~result])
    to_empty = np.unique(problem.layer_index[raisable])
    if len(to_fill):
        filled = int(rng.choice(to_fill))
        result[problem.layer_slices[filled]] = True
        to_empty = to_empty[to_empty != filled]
    if len(to_empty):
        part = problem.layer_slices[int(rng.choice(to_empty))]
        result[part] = space.fixed[part]
    return result


def concentrated_repair(space: SearchSpace, mask: BoolArray, noise: float, rng: np.random.Generator) -> BoolArray:
    """The mask brought to the target so that layers become full or empty: the fullest are filled, the emptiest emptied.

    noise: standard deviation of what is added to each layer's share of low groups (0..1); within a layer the cheap groups
    go low first.
    """
    problem = space.problem
    starts = [part.start for part in problem.layer_slices]
    sizes = np.array([len(m) for m in problem.macs])
    full = np.add.reduceat(mask.astype(np.float64), starts) / sizes
    keys = (noise * rng.standard_normal(problem.n_layers) - full)[problem.layer_index] + 1e-3 * space.ranks
    return _fill(space, mask, keys)
