"""Reconstruction of rounding: cells, slack, and less output error at low precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.quantization import rounding
from bitdial.quantization.effective_bits import extract, read_back
from bitdial.quantization.output_error import LayerSamples, weight_shifts
from bitdial.quantization.program import QuantizedLayer
from bitdial.quantization.rounding import _nearest_in_cell, reconstruct


def make_layer(weight: np.ndarray, bounds: list[int], conv_groups: int = 1) -> QuantizedLayer:
    outputs, n_groups = len(weight), len(bounds) - 1
    return QuantizedLayer(
        name="layer",
        kind="conv" if weight.ndim == 4 else "linear",
        weight=weight,
        weight_scale=np.full(outputs, 0.01, np.float32),
        multiplier=np.ones(outputs, np.float32),
        residual_factor=0.0,
        eligible=True,
        reason="",
        amax=15,
        wmax=7,
        group_bounds=np.array(bounds, np.int32),
        activation_shift=np.full(n_groups, 3, np.uint8),
        weight_shift=np.zeros((outputs, n_groups // conv_groups), np.uint8),
        weight_granularity="group",
        group_macs=np.diff(bounds).astype(np.int64),
        low=np.zeros((2, n_groups), np.bool_),
        bias=np.zeros((2, outputs), np.int32),
        conv_groups=conv_groups,
    )


def make_samples(seed: int, shape: tuple[int, ...], bounds: list[int], conv_groups: int = 1) -> LayerSamples:
    rng = np.random.default_rng(seed)
    weight = np.clip(np.rint(rng.normal(0, 22, shape)), -127, 127).astype(np.int8)
    layer = make_layer(weight, bounds, conv_groups)
    channels, taps = bounds[-1], int(np.prod(shape[2:], dtype=int))
    mixed = rng.normal(size=(600, channels * taps)) @ rng.normal(size=(channels * taps, channels * taps)) / 4
    patches = np.clip(np.rint(np.abs(mixed) * 30), 0, 255).astype(np.int16).reshape(600, channels, taps)
    samples = LayerSamples(layer, patches, signed=False, centred=True)
    layer.weight_shift, _ = weight_shifts(samples, "group")
    return samples


def group_error(samples: LayerSamples, g: int, target: np.ndarray, weight: np.ndarray) -> float:
    """Variance, over samples, of what lowering the weights of one group changes in the outputs."""
    layer = samples.layer
    low = read_back(samples.group(g), layer.activation_shift[g], layer.amax, False).astype(np.float64)
    n_local = layer.weight_shift.shape[1]
    rows = samples.rows(g)
    a, b = layer.group_bounds[g : g + 2] - (g // n_local) * weight.shape[1]
    shift = layer.weight_shift[rows, g % n_local][:, None]
    before = target[rows, a:b].reshape(shift.shape[0], -1).astype(np.float64)
    after = read_back(weight[rows, a:b].reshape(shift.shape[0], -1), shift, layer.wmax).astype(np.float64)
    return float((low @ (before - after).T).var(axis=0).sum())


@given(st.integers(-127, 127), st.integers(0, 4), st.integers(-7, 7))
def test_the_nearest_weight_of_a_cell_lowers_to_it_and_none_is_nearer(value: int, shift: int, wanted: int) -> None:
    found = int(_nearest_in_cell(np.array([value]), np.array([wanted]), np.array([1 << shift]), 7)[0])
    assert -127 <= found <= 127
    assert int(extract(found, shift, 7)) == wanted
    every = np.arange(-127, 128)
    cell = every[extract(every, shift, 7) == wanted]
    assert abs(found - value) == np.abs(cell - value).min()


@pytest.mark.parametrize(
    ("shape", "bounds", "conv_groups"),
    [((12, 20, 3, 3), [0, 16, 20], 1), ((10, 48), [0, 16, 32, 48], 1), ((8, 6, 3, 3), [0, 4, 6, 10, 12], 2)],
)
def test_output_error_falls_in_every_group_and_weights_move_within_the_slack(
    shape: tuple[int, ...], bounds: list[int], conv_groups: int
) -> None:
    samples = make_samples(3, shape, bounds, conv_groups)
    layer = samples.layer
    assert layer.weight is not None
    original = layer.weight.copy()
    moved = reconstruct(samples, 0.3)
    assert moved.dtype == np.int8 and moved.shape == original.shape and int(moved.min()) >= -127
    assert (moved != original).any()
    before = [group_error(samples, g, original, original) for g in range(layer.n_groups)]
    after = [group_error(samples, g, original, moved) for g in range(layer.n_groups)]
    assert all(a <= b * 1.0001 for a, b in zip(after, before, strict=True))  # damping allows a hair
    assert sum(after) < 0.97 * sum(before)
    for g in range(layer.n_groups):
        n_local = layer.weight_shift.shape[1]
        rows = samples.rows(g)
        a, b = layer.group_bounds[g : g + 2] - (g // n_local) * original.shape[1]
        change = np.abs(moved[rows, a:b].astype(int) - original[rows, a:b]).reshape(original[rows].shape[0], -1)
        step = 1 << layer.weight_shift[rows, g % n_local].astype(int)
        assert (change <= 0.3 * step[:, None]).all()


@pytest.mark.parametrize(("bounds", "conv_groups"), [([0, 4, 8, 12, 14], 1), ([0, 4, 6, 10, 12], 2)])
def test_groups_are_rounded_together_as_they_are_alone(
    bounds: list[int], conv_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(4, (8, bounds[-1] // conv_groups, 3, 3), bounds, conv_groups)
    together = reconstruct(samples, 0.3)
    monkeypatch.setattr(rounding, "BATCH_BYTES", 0)
    np.testing.assert_array_equal(reconstruct(samples, 0.3), together)


def test_no_slack_changes_nothing() -> None:
    samples = make_samples(5, (6, 16, 3, 3), [0, 16])
    assert samples.layer.weight is not None
    np.testing.assert_array_equal(reconstruct(samples, 0.0), samples.layer.weight)
