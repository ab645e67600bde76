"""Methods that give every layer a width: from a sensitivity per layer to programs at the budgets asked for.

The order or set of layers is the method's; what a low layer is, is a setting (`ground.Settings.numbers`):

  uniform     uniform integers of 4 bits with ranges of their own, as published. A program per average; switching between
              averages means having both copies of the weights of every layer that changes its width.
  effective   bitdial's low numbers. One program with a ratio per average, switched like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitdial.errors import CalibrationError
from bitdial.pipeline import restore_means
from bitdial.quantization.program import Program
from bitdial.quantization.weights import read_back_weights
from comparison.budget import (
    Masks,
    eligible_layers,
    layer_macs,
    low_masks,
    low_share,
    lower_at_least_cost,
    lower_in_order,
)
from comparison.ground import Ground, Settings
from comparison.hessian import layer_traces
from comparison.separability import layer_separability
from comparison.sqnr import layer_sqnr
from comparison.uniform import least_squares_weight_scale, uniform_program

LOW_BITS = 4
Choose = Callable[[Mapping[str, int], float], list[str]]  # (multiply-accumulates per layer, low share) -> layers


@dataclass(frozen=True)
class LayerPlan:
    """What a layer-wise method found.

    scores   per layer, as the method reports them (dB, trace times squared change, TF-IDF); JSON-able
    costs    per layer, >= 0: what lowering it costs in the method's own terms; decides which layer runs low in part
    choose   the layers that run low at a share
    """

    scores: dict[str, float]
    costs: dict[str, float]
    choose: Choose
    seconds: float


def sqnr_plan(ground: Ground, settings: Settings) -> LayerPlan:
    """Practical mixed-precision PTQ (see `sqnr`)."""
    started = time.perf_counter()
    batches = ground.batches(settings.images)
    scores = layer_sqnr(
        ground.prepared.graph, ground.layers, lambda name: one_layer_low(ground, settings, name), batches,
        lambda share: ground.progress("sensitivity", share),
    )  # fmt: skip
    order = sorted(scores, key=lambda n: -scores[n])  # stable: equal ratios in graph order
    costs = {n: 10.0 ** (-scores[n] / 10.0) for n in scores}  # noise energy in units of the signal's

    def choose(macs: Mapping[str, int], share: float) -> list[str]:
        return lower_in_order(order, macs, share)

    finite = {n: float(s) if np.isfinite(s) else 999.0 for n, s in scores.items()}
    return LayerPlan(finite, costs, choose, time.perf_counter() - started)


def hawq_plan(ground: Ground, settings: Settings) -> LayerPlan:
    """HAWQ-style (see `hessian`): least sum of trace / weights * |Q4(W) - W|^2 within the budget."""
    started = time.perf_counter()
    traces = layer_traces(
        ground.prepared.graph, ground.layers, ground.batches(settings.images), ground.label_batches(settings.images),
        settings.probes, ground.config.seed, lambda share: ground.progress("traces", share),
    )  # fmt: skip
    change = weight_change(ground, settings)
    costs = {n: max(0.0, traces[n].average) * change[n] for n in traces}

    def choose(macs: Mapping[str, int], share: float) -> list[str]:
        return lower_at_least_cost(costs, macs, share)

    return LayerPlan(dict(costs), costs, choose, time.perf_counter() - started)


def separability_plan(ground: Ground, settings: Settings) -> LayerPlan:
    """CSMPQ (see `separability`): most bits, weighted by the score, within the budget."""
    started = time.perf_counter()
    batches = ground.batches(settings.images)
    n = sum(batch[0].shape[0] for batch in batches)
    labels = None if ground.labels is None else ground.labels[:n]
    scores = layer_separability(ground.prepared.graph, ground.layers, batches, labels, settings.documents)

    def choose(macs: Mapping[str, int], share: float) -> list[str]:
        return lower_at_least_cost(scores, macs, share)

    return LayerPlan(dict(scores), scores, choose, time.perf_counter() - started)


def weight_change(ground: Ground, settings: Settings) -> dict[str, float]:
    """Squared L2 norm of what low precision changes in each layer's float weights."""
    result = {}
    effective = ground.effective if settings.numbers == "effective" else None
    for name, layer in eligible_layers(ground.eight).items():
        source = ground.prepared.graph.node(name).weight
        assert source is not None
        weight = ground.prepared.graph.constants[source]
        shape = (-1, *[1] * (weight.ndim - 1))
        if effective is None:
            limit = (1 << (LOW_BITS - 1)) - 1
            scale = least_squares_weight_scale(weight, limit).reshape(shape)
            low = np.clip(np.rint(weight / scale), -limit, limit) * scale
        else:
            layer = effective.layers[name]
            assert layer.weight is not None
            integers = read_back_weights(layer).astype(np.float64)
            low = integers * layer.weight_scale.astype(np.float64).reshape(shape)
        result[name] = float(np.square(low - weight.astype(np.float64)).sum())
    return result


def one_layer_low(ground: Ground, settings: Settings, name: str) -> Program:
    """A program with one ratio at which that layer alone is low, biases corrected."""
    return program_of(ground, settings, {name: ground.full_masks()[name]})


def program_of(ground: Ground, settings: Settings, masks: Masks) -> Program:
    """A program with one ratio at which just these groups run low."""
    if settings.numbers == "uniform":
        return uniform_program(ground.prepared, ground.config, masks, LOW_BITS, settings.rounding)
    program = ground.effective
    for name, mask in masks.items():
        program.layers[name].low = mask[None].copy()
    restore_means(ground.prepared, program, ground.config, [0])
    program.ratios = [program.eligible_share(0)]
    return program


def masks_at(ground: Ground, settings: Settings, plan: LayerPlan, bits: float) -> Masks:
    """The groups that run low at an average width. Raises ConfigError for one that 4 and 8 bits cannot make."""
    share = low_share(bits, LOW_BITS)
    if share == 0.0:
        return {}
    chosen = plan.choose(layer_macs(ground.eight), share)
    groups = ground.group_scores if settings.numbers == "effective" else None
    return low_masks(ground.eight, chosen, share, plan.costs, settings.fill, groups)


def dial_of(ground: Ground, masks: Sequence[Masks], ratios: Sequence[float]) -> Program:
    """One program with bitdial's numbers and a ratio per set of masks (ascending); its first ratio is 0."""
    if list(ratios) != sorted(set(ratios)) or len(masks) != len(ratios) or 0.0 in ratios:
        raise CalibrationError("a dial needs one set of groups per ratio, ascending, above 0")
    program = ground.effective
    program.ratios = [0.0, *ratios]
    for name, layer in program.layers.items():
        layer.bias = np.repeat(layer.bias[:1], len(program.ratios), axis=0)
        layer.low = np.zeros((len(program.ratios), layer.n_groups), np.bool_)
        for i, own in enumerate(masks):
            if name in own:
                layer.low[i + 1] = own[name]
    program.nested = all(bool((x.low[:-1] <= x.low[1:]).all()) for x in program.layers.values() if x.n_groups)
    restore_means(ground.prepared, program, ground.config, range(1, len(program.ratios)))
    return program
