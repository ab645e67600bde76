"""Budgets in average bits, and choosing whole layers that meet them. NumPy only.

The average width of a plan counts multiply-accumulates of the low-eligible layers: 8 bits where they run high, the low
width where they run low. With low layers at 4 bits, an average of B bits means a low share of (8 - B) / 4, which is
bitdial's ratio. Budgets are met from below: a plan's average is at most what was asked for; the layer that carries it beyond
can be lowered in part, so that all methods are compared at one average (to within half a group). That last step is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError, SelectionError
from bitdial.quantization.program import Program, QuantizedLayer

HIGH_BITS = 8
Fill = Literal["part", "whole"]
MAX_STATES = 1 << 20  # of the dynamic program; 60 layers of a usual network have some thousands

Masks = dict[str, npt.NDArray[np.bool_]]


def low_share(average_bits: float, low_bits: int = 4) -> float:
    """Share of the low-eligible multiply-accumulates that run low at an average width. Raises ConfigError outside the range."""
    if not low_bits < HIGH_BITS:
        raise ConfigError(f"low layers of {low_bits} bits are not below {HIGH_BITS}: choose 2 to 7")
    if not math.isfinite(average_bits) or not low_bits <= average_bits <= HIGH_BITS:
        raise ConfigError(
            f"an average of {average_bits} bits cannot be made of {low_bits} and {HIGH_BITS}: choose one between them"
        )
    return (HIGH_BITS - average_bits) / (HIGH_BITS - low_bits)


def average_bits(program: Program, index: int = 0) -> float:
    """Average width of the low-eligible multiply-accumulates of a program at a ratio index, from the widths of its layers."""
    total, weighted = 0, 0.0
    for layer in program.layers.values():
        if not layer.eligible or not layer.n_groups:
            continue
        macs = int(layer.group_macs.sum())
        low = int(layer.group_macs[layer.low[index]].sum())
        total += macs
        weighted += low * (layer.wmax.bit_length() + 1) + (macs - low) * HIGH_BITS
    return weighted / total if total else float(HIGH_BITS)


def eligible_layers(program: Program) -> dict[str, QuantizedLayer]:
    """The layers that may run low, in graph order. Raises SelectionError if there are none."""
    found = {n: layer for n, layer in program.layers.items() if layer.eligible and layer.n_groups}
    if not found:
        raise SelectionError("no layer may run low: nothing to assign widths to; see keep_8bit and lower_first_last")
    return found


def layer_macs(program: Program) -> dict[str, int]:
    """Multiply-accumulates per sample of every layer that may run low."""
    return {name: int(layer.group_macs.sum()) for name, layer in eligible_layers(program).items()}


def lower_in_order(order: Sequence[str], macs: Mapping[str, int], share: float) -> list[str]:
    """The shortest prefix of `order` that runs at least `share` of the multiply-accumulates low (phase 2 of van Baalen et
    al. 2023). Raises SelectionError unless `order` holds every layer once."""
    _check(macs, share)
    if sorted(order) != sorted(macs):
        raise SelectionError("the order must hold every low-eligible layer exactly once")
    goal, reached = share * sum(macs.values()), 0
    chosen: list[str] = []
    for name in order:
        if reached >= goal - 1e-9 * max(1.0, goal):
            break
        chosen.append(name)
        reached += macs[name]
    return chosen


def lower_at_least_cost(costs: Mapping[str, float], macs: Mapping[str, int], share: float) -> list[str]:
    """The set of layers with the least sum of costs that runs at least `share` of the multiply-accumulates low, in the order
    of `macs`. Exact: dynamic programming over the reachable sums, without those that another sum beats.

    costs: what lowering a layer costs, finite and >= 0 (the same units for all). Raises SelectionError.
    """
    _check(macs, share)
    names = list(macs)
    values = np.array([float(costs[n]) if n in costs else np.nan for n in names])
    if not np.isfinite(values).all() or (values < 0).any():
        raise SelectionError("the cost of lowering a layer must be a finite number >= 0 for every low-eligible layer")
    unit = math.gcd(*macs.values())
    goal = max(0, math.ceil(share * sum(macs.values()) / unit - 1e-9))
    # A state: (multiply-accumulates, at most `goal`) -> cost and the set as bits. Beaten: another has as many at no more cost.
    sums, totals, sets = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, object)
    for i, name in enumerate(names):
        sums = np.concatenate([sums, np.minimum(sums + macs[name] // unit, goal)])
        totals = np.concatenate([totals, totals + values[i]])
        sets = np.concatenate([sets, np.array([s | (1 << i) for s in sets], object)])
        order = np.lexsort((totals, -sums))  # most first; of equal sums the cheapest first
        best = np.minimum.accumulate(np.concatenate([[np.inf], totals[order][:-1]]))
        keep = order[totals[order] < best]
        sums, totals, sets = sums[keep], totals[keep], sets[keep]
        if len(sums) > MAX_STATES:
            raise SelectionError(f"{len(names)} layers have too many different sizes for an exact budget: keep some at 8 bits")
    chosen = int(sets[int(np.argmax(sums))])
    return [name for i, name in enumerate(names) if chosen >> i & 1]


def low_masks(
    program: Program,
    chosen: Sequence[str],
    share: float,
    costs: Mapping[str, float],
    fill: Fill = "part",
    group_costs: Mapping[str, npt.NDArray[np.float64]] | None = None,
) -> Masks:
    """bool [n_groups] per low-eligible layer: which groups run low when the layers `chosen` do.

    fill: "whole" leaves the set as it is; "part" raises groups of one chosen layer back to 8 bits until the share of low
    multiply-accumulates is as near to `share` as groups allow. That layer is the one of highest cost per multiply-accumulate
    that is large enough. group_costs: order within it (the costliest are raised first); without it, the last groups are.
    """
    layers = eligible_layers(program)
    masks = {n: np.full(layer.n_groups, n in set(chosen)) for n, layer in layers.items()}
    if fill == "whole" or not chosen:
        return masks
    macs = layer_macs(program)
    excess = sum(macs[n] for n in chosen) - share * sum(macs.values())
    fitting = [n for n in chosen if macs[n] >= excess]
    if excess <= 0 or not fitting:
        return masks
    name = max(fitting, key=lambda n: (costs[n] / macs[n], n == chosen[-1]))
    own = layers[name].group_macs
    order = np.arange(len(own))[::-1]
    if group_costs is not None and name in group_costs:
        order = np.argsort(-group_costs[name] / own, kind="stable")
    for g in order:
        if own[g] / 2 > excess:  # raising it would miss the share by more than leaving it
            continue
        masks[name][g] = False
        excess -= int(own[g])
        if excess <= 0:
            break
    return masks


def _check(macs: Mapping[str, int], share: float) -> None:
    if not macs or any(m < 1 for m in macs.values()):
        raise SelectionError("every low-eligible layer needs at least one multiply-accumulate, and there must be one")
    if not 0.0 <= share <= 1.0:
        raise SelectionError(f"a share of {share} is not in 0..1")


__all__ = [
    "Fill", "Masks", "average_bits", "eligible_layers", "layer_macs", "low_masks", "low_share", "lower_at_least_cost",
    "lower_in_order",
]  # fmt: skip
