"""8-bit weights, biases and weight shifts against plain definitions."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.program import BLOCK_ROWS, QParams, QuantizedLayer
from bitdial.quantization.weights import (
    accumulator_bound,
    check_accumulators,
    low_integers,
    multipliers,
    plain_weight_shifts,
    quantize_bias,
    quantize_weight,
    read_back_weights,
    weight_scales,
)

Granularity = Literal["output", "block", "group"]
SEEDS = st.integers(0, 2**32 - 1)


def random_weight(rng: np.random.Generator, rows: int, columns: int, kernel: tuple[int, ...] = ()) -> np.ndarray:
    spread = np.exp2(rng.uniform(0, 7, (rows, columns, *[1] * len(kernel))))
    return np.clip(np.rint(rng.normal(size=(rows, columns, *kernel)) * spread), -127, 127).astype(np.int8)


def ties(rows: int, granularity: str) -> list[slice]:
    """The output channels that share a shift."""
    size = {"output": 1, "block": BLOCK_ROWS, "group": rows}[granularity]
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


@given(SEEDS)
def test_scales_and_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(6, 5, 3, 3)) * 10.0 ** rng.uniform(-6, 3, (6, 1, 1, 1))).astype(np.float32)
    weight[0] = 0.0  # a dead filter
    bias = (rng.normal(size=6) * 10.0 ** rng.uniform(-6, 6, 6)).astype(np.float32)
    activation_scale = float(np.float32(10.0 ** rng.uniform(-4, 1)))
    scale = weight_scales(weight, bias, activation_scale)
    for o in range(6):
        definition = max(
            float(np.abs(weight[o]).max()) / 127, abs(float(bias[o])) / (activation_scale * 2**30), 2.0**-40
        )
        assert scale[o] == np.float32(definition)
    w8 = quantize_weight(weight, scale)
    assert w8.dtype == np.int8 and np.abs(w8.astype(int)).max() <= 127
    flat, q = weight.reshape(6, -1), w8.reshape(6, -1)
    for o in range(6):
        expected = [max(-127, min(127, round(float(v) / float(scale[o])))) for v in flat[o]]
        assert q[o].tolist() == expected
    b = quantize_bias(bias, scale, activation_scale)
    assert b.dtype == np.int32 and np.abs(b.astype(np.int64)).max() <= 2**30
    real = b.astype(np.float64) * scale.astype(np.float64) * activation_scale
    assert np.allclose(real, bias, rtol=1e-6, atol=float((scale * activation_scale).max()))


def test_dead_filters_have_a_scale_and_zero_weights() -> None:
    scale = weight_scales(np.zeros((2, 3), np.float32), None, 0.1)
    assert scale.tolist() == [2.0**-40, 2.0**-40]
    assert not quantize_weight(np.zeros((2, 3), np.float32), scale).any()


def test_multipliers_are_rounded_once() -> None:
    scale = np.array([0.1, 3e-5], np.float32)
    out = QParams(float(np.float32(0.037)), True)
    activation = float(np.float32(0.11))
    expected = [np.float32(float(s) * activation / out.scale) for s in scale]
    assert multipliers(scale, activation, out).tolist() == [float(v) for v in expected]
    assert multipliers(scale, activation, None).tolist() == [float(np.float32(float(s) * activation)) for s in scale]


@given(SEEDS)
def test_accumulator_bound_is_reached_and_never_passed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, 4, 9)
    for signed in (False, True):
        q = QParams(1.0, signed)
        bound = accumulator_bound(weight, q)
        w = weight.astype(np.int64)
        if signed:
            best = max(int((np.sign(row) * 127 * row).sum()) for row in w)
            assert best == bound
        x = rng.integers(q.qmin, q.qmax + 1, (50, 9))
        assert np.abs(x @ w.T).max() <= bound


def test_accumulators_beyond_int32_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 'head'.*ignored=\('head',\)"):
        check_accumulators("head", 2**31 - 10, np.array([20], np.int32))
    check_accumulators("head", 2**31 - 21, np.array([-20], np.int32))


@pytest.mark.parametrize("granularity", ["output", "block", "group"])
@settings(max_examples=30)
@given(seed=SEEDS, limit=st.sampled_from([1, 3, 7, 10, 14, 15, 31, 63]))
def test_plain_weight_shifts(granularity: Granularity, seed: int, limit: int) -> None:
    """Tied as documented; per tie the shift of its largest magnitude."""
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 37)), int(rng.integers(1, 8))
    weight = random_weight(rng, rows, columns, (2,) if seed % 2 else ())
    bounds = np.unique([0, *rng.integers(0, columns + 1, 2), columns]).astype(np.int32)
    shifts = plain_weight_shifts(weight, bounds, limit, granularity)
    assert shifts.dtype == np.uint8 and shifts.shape == (rows, len(bounds) - 1)
    w = weight.reshape(rows, columns, -1).astype(np.int64)
    for tie in ties(rows, granularity):
        for j, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            largest = int(np.abs(w[tie, a:b]).max())
            assert set(shifts[tie, j].tolist()) == {max(0, largest.bit_length() - limit.bit_length())}


@settings(max_examples=40)
@given(SEEDS, st.sampled_from([1, 3, 7, 10, 14, 15, 31, 63]), st.booleans())
def test_weights_read_back(oracle: ModuleType, seed: int, limit: int, stored: bool) -> None:
    """Derived from the 8-bit weights, or integers of their own."""
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, 5, 7, (3,))
    bounds = np.array([0, 3, 6, 7], np.int32)
    shift = rng.integers(0, naive_shift(True, limit) + 1, (5, 3)).astype(np.uint8)
    own = rng.integers(-limit, limit + 1, weight.shape).astype(np.int8) if stored else None
    zeros = np.zeros(3)
    layer = QuantizedLayer(
        "layer", "conv", weight, zeros, zeros, 0.0, True, "", 15, limit, bounds, zeros.astype(np.uint8), shift, "output",
        zeros.astype(np.int64), np.zeros((1, 3), np.bool_), np.zeros((1, 5), np.int32), low_weight=own,
    )  # fmt: skip
    per_channel = np.repeat(shift, np.diff(bounds), axis=1)[:, :, None].astype(np.int64)
    low = oracle.low_array(weight.astype(np.int64), per_channel, limit, True) if own is None else own.astype(np.int64)
    for got, expected in ((low_integers(layer), low), (read_back_weights(layer), low << per_channel)):
        assert got.dtype == np.int8 and got.shape == weight.shape
        assert (got == expected).all()
