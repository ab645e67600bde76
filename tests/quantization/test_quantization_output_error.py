"""Shifts by output error against brute force over every shift, with the sums written out."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.output_error import LayerSamples, activation_shifts, weight_shifts
from bitdial.quantization.program import BLOCK_ROWS, QuantizedLayer

SEEDS = st.integers(0, 2**32 - 1)


def samples_of(
    rng: np.random.Generator, signed: bool, centred: bool, conv_groups: int = 1, rows: int = 6
) -> LayerSamples:
    local, taps, size = int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    channels = local * conv_groups
    bounds = np.array([g * local + s for g in range(conv_groups) for s in range(0, local, size)] + [channels], np.int32)
    n = len(bounds) - 1
    weight = np.clip(np.rint(rng.normal(size=(rows, local, taps)) * 40), -127, 127).astype(np.int8)
    layer = QuantizedLayer(
        "l", "conv", weight, rng.uniform(0.5, 2, rows).astype(np.float32), np.ones(rows, np.float32), 0.0, True, "",
        7 if signed else 15, 7, bounds, np.zeros(n, np.uint8), np.zeros((rows, n // conv_groups), np.uint8), "output",
        np.ones(n, np.int64), np.zeros((2, n), np.bool_), np.zeros((2, rows), np.int32), conv_groups,
    )  # fmt: skip
    top = 127 if signed else 255
    reach = rng.choice([10, 40, top], (1, channels, 1))
    patches = np.clip(np.abs(rng.normal(size=(30, channels, taps))) * reach / 2, 0, top).astype(np.int16)
    if signed:
        patches *= rng.choice([-1, 1], patches.shape).astype(np.int16)
    return LayerSamples(layer, patches, signed, centred)


def error(own: LayerSamples, difference: np.ndarray) -> np.ndarray:
    """[n, O] errors of the outputs in real units from their integer differences."""
    difference = difference.astype(np.float64)
    if own.centred:
        difference = difference - difference.mean(axis=0)
    return difference * own.layer.weight_scale


def rows_of(layer: QuantizedLayer, group: int) -> slice:
    n_local, size = layer.weight_shift.shape[1], len(layer.weight) // layer.conv_groups  # type: ignore[arg-type]
    return slice(group // n_local * size, (group // n_local + 1) * size)


def group_weights(layer: QuantizedLayer, group: int) -> np.ndarray:
    """int64 [O, channels * taps]; rows of other convolution groups are zero."""
    assert layer.weight is not None
    local = layer.weight.shape[1]
    offset = group // layer.weight_shift.shape[1] * local
    a, b = (int(v) - offset for v in layer.group_bounds[group : group + 2])
    result = np.zeros((len(layer.weight), (b - a) * layer.weight.shape[2]), np.int64)
    own = rows_of(layer, group)
    result[own] = layer.weight[own, a:b].reshape(own.stop - own.start, -1)
    return result


@settings(max_examples=40)
@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([1, 2]))
def test_activation_shifts(oracle: ModuleType, seed: int, signed: bool, centred: bool, conv_groups: int) -> None:
    """The first group gets the shift of least squared output error over all readers of the tensor, so never a worse one
    than the plain one; later groups may also make up for what the earlier ones have left."""
    rng = np.random.default_rng(seed)
    first = samples_of(rng, signed, centred, conv_groups)
    other: Any = replace(first.layer, weight=rng.integers(-127, 128, first.layer.weight.shape).astype(np.int8))  # type: ignore
    readers = [first, replace(first, layer=other)]
    chosen = activation_shifts(readers)
    assert chosen.shape == (first.layer.n_groups,) and chosen.dtype == np.uint8
    assert chosen.max() <= naive_shift(signed, first.layer.amax)
    for g in range(0, first.layer.n_groups, first.layer.weight_shift.shape[1]):
        x = first.group(g).astype(np.int64)
        costs = []
        for s in range(naive_shift(signed, first.layer.amax) + 1):
            low = oracle.low_array(x, s, first.layer.amax, signed) << s
            costs.append(sum((error(r, (low - x) @ group_weights(r.layer, g).T) ** 2).sum() for r in readers))
        assert costs[int(chosen[g])] <= min(costs) * (1 + 1e-4) + 1e-6


@settings(max_examples=40)
@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.sampled_from(["output", "block", "group"]))
def test_weight_shifts(
    oracle: ModuleType,
    seed: int,
    signed: bool,
    centred: bool,
    conv_groups: int,
    granularity: Literal["output", "block", "group"],
) -> None:
    """Group by group the shift of least error given the groups before it, tied as the granularity says; and the scores."""
    rng = np.random.default_rng(seed)
    own = samples_of(rng, signed, centred, conv_groups, rows=20)
    layer = own.layer
    layer.activation_shift = rng.integers(0, naive_shift(signed, layer.amax) + 1, layer.n_groups).astype(np.uint8)
    shifts, scores = weight_shifts(own, granularity)
    n_local = layer.weight_shift.shape[1]
    assert shifts.shape == layer.weight_shift.shape and shifts.dtype == np.uint8
    size = {"output": 1, "block": BLOCK_ROWS, "group": 20}[granularity]
    left = np.zeros((len(own.patches), 20))
    for g in range(layer.n_groups):
        part = rows_of(layer, g)
        if g % n_local == 0:
            left[:] = 0.0
        x, sa = own.group(g).astype(np.int64), int(layer.activation_shift[g])
        low = oracle.low_array(x, sa, layer.amax, signed) << sa
        w = group_weights(layer, g)
        errors = [
            error(own, x @ w.T - low @ (oracle.low_array(w, s, layer.wmax, True) << s).T)
            for s in range(naive_shift(True, layer.wmax) + 1)
        ]
        sums = np.stack([((left + e) ** 2).sum(axis=0) for e in errors])  # [shifts, O]
        for start in range(part.start, part.stop, size):
            tie = slice(start, min(start + size, part.stop))
            assert len(set(shifts[tie, g % n_local].tolist())) == 1
            total = sums[:, tie].sum(axis=1)
            assert total[shifts[start, g % n_local]] <= total.min() * (1 + 1e-3) + 1e-3
        chosen = shifts[:, g % n_local]
        taken = np.stack([errors[chosen[o]][:, o] for o in range(20)], axis=1)
        assert scores[g] == pytest.approx((taken[:, part] ** 2).sum() / len(x), rel=1e-3, abs=1e-3)
        left[:, part] += taken[:, part]


def linear_samples(rng: np.random.Generator, patches: np.ndarray, rows: int, size: int, scale: float) -> LayerSamples:
    """A linear layer with groups of `size` channels and random weights."""
    channels = patches.shape[1]
    n = channels // size
    layer = QuantizedLayer(
        "l", "linear", rng.integers(-127, 128, (rows, channels)).astype(np.int8), np.full(rows, scale, np.float32),
        np.ones(rows, np.float32), 0.0, True, "", 15, 7, np.arange(0, channels + 1, size, dtype=np.int32),
        np.zeros(n, np.uint8), np.zeros((rows, n), np.uint8), "group", np.ones(n, np.int64), np.zeros((2, n), np.bool_),
        np.zeros((2, rows), np.int32), 1,
    )  # fmt: skip
    return LayerSamples(layer, patches.astype(np.int16)[:, :, None], False, True)


@pytest.mark.parametrize("n", [30, 392, 4096])
def test_of_shifts_that_lose_the_same_the_smallest_is_taken(n: int) -> None:
    """120 and 121 become one value at every shift: whatever it is, the bias restores it, and the loss is the same."""
    rng = np.random.default_rng(n)
    own = linear_samples(rng, 120 + (rng.random((n, 48)) < 0.3), 40, 16, 0.0123)
    assert activation_shifts([own, own]).tolist() == [0, 0, 0]


class Large(TorchDispatchMode):
    """Counts operations whose result has at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, torch.Tensor) and result.numel() >= self.elements
        return result


def test_errors_of_outputs_are_made_once_per_group_not_once_per_shift() -> None:
    """They are samples times outputs many numbers: what choosing shifts costs."""
    rng = np.random.default_rng(0)
    own = linear_samples(rng, rng.integers(0, 256, (128, 12)), 600, 4, 1.0)
    groups = own.layer.n_groups
    with Large(128 * 600) as made:
        activation_shifts([own])
    assert 0 < made.count <= groups + 1  # added to a residual that is made once
    with Large(128 * 600) as made:
        weight_shifts(own, "group")
    assert 0 < made.count <= 2 * groups + 1  # of activations, of weights


def test_thinned_samples_are_evenly_spaced() -> None:
    own = samples_of(np.random.default_rng(0), False, True)
    few = own.thinned(7)
    assert few.layer is own.layer and few.signed == own.signed and few.centred
    assert (few.patches == own.patches[::5]).all() and len(few.patches) == 6
    assert (own.thinned(30).patches == own.patches).all() and (own.thinned(99).patches == own.patches).all()
