"""Exactness rules against a simulation of each mechanism's bytes: wrapped adds, 8-bit products, int32 sums."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.exactness import (
    INPUT_TRANSFORM,
    INT32,
    MECHANISMS,
    WEIGHT_TRANSFORM,
    exact_mechanisms,
    layer_mechanisms,
    low_accumulator_bound,
    transform_weights,
)
from bitdial.quantization.program import QuantizedLayer
from bitdial.quantization.weights import low_integers

OUTPUT_TRANSFORM = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
CONV3, LINEAR = ((3, 3), (1, 1)), ((), ())
NAMES = {"direct", "fip", "narrow"}


def fast_inner_product(x: Any, w: Any, offset: int, signed_side: int) -> Any:
    """sum x*w over the last axis as a kernel does it: bytes that wrap, u8 * s8 products, corrections of one side each.

    x [..., n], w [..., n], n even. The left factor is stored as x + offset, the right one as x - signed_side.
    """
    x1, x2, w1, w2 = x[..., 0::2], x[..., 1::2], w[..., 0::2], w[..., 1::2]
    left = (x1 + offset + w2).astype(np.uint8).astype(np.int64)
    right = (x2 - signed_side + w1).astype(np.int8).astype(np.int64)
    # (x1 + c + w2)(x2 - d + w1) = x1 w1 + x2 w2 + (x1 + c)(x2 - d) + (c + w2) w1 - d w2
    correction = (x1 + offset) * (x2 - signed_side) + (offset + w2) * w1 - signed_side * w2
    return (left * right - correction).sum(axis=-1)


def pairs_of_extremes(low: int, high: int, w: int) -> tuple[Any, Any]:
    """Every combination of extreme operands in one pair: x [64, 2], w [64, 2]."""
    grid = np.array(list(itertools.product((low, 0, high), (low, 0, high), (-w, w), (-w, w))))
    return grid[:, :2], grid[:, 2:]


def bytes_are_exact(low: int, high: int, w: int, free_signed_side: bool) -> bool:
    """Is there any pair of offsets with which all extreme pairs come out right?"""
    xs, ws = pairs_of_extremes(low, high, w)
    expected = (xs * ws).sum(axis=1)
    sides = range(low, high + 1) if free_signed_side else (0,)
    for side in sides:
        # The right factor first, on its own: without it most offsets need not be tried.
        right = xs[:, 1] - side + ws[:, 0]
        if not (right.astype(np.int8) == right).all():
            continue
        if any((fast_inner_product(xs, ws, c, side) == expected).all() for c in range(256 - low)):
            return True
    return False


@pytest.mark.parametrize("signed", [False, True])
def test_fast_inner_product_is_exact_iff_the_rule_says_so(signed: bool) -> None:
    amaxes = (7, 15, 31, 63, 64, 65, 100, 120, 126, 127) if signed else (7, 15, 31, 63, 64, 65, 120, 127, 128, 200)
    for amax, wmax in itertools.product(amaxes, (1, 7, 14, 62, 63, 64, 120)):
        names = exact_mechanisms(amax, wmax, signed, *LINEAR)
        assert names <= NAMES and "direct" in names
        assert ("fip" in names) == bytes_are_exact(-amax if signed else 0, amax, wmax, False), (amax, wmax)


@settings(max_examples=200)
@given(st.booleans(), st.integers(1, 127), st.integers(1, 127), st.integers(0, 2**32 - 1))
def test_fast_inner_product_with_any_operands(signed: bool, amax: int, wmax: int, seed: int) -> None:
    if "fip" not in exact_mechanisms(amax, wmax, signed, (1, 1), (2, 2)):
        return
    rng = np.random.default_rng(seed)
    low = -amax if signed else 0
    x, w = rng.integers(low, amax + 1, (50, 16)), rng.integers(-wmax, wmax + 1, (50, 16))
    np.testing.assert_array_equal(fast_inner_product(x, w, wmax - low, 0), (x * w).sum(axis=1))


def direct_tile(d: Any, w: Any) -> Any:
    """2 x 2 outputs of a 3 x 3 convolution on d [C, 4, 4], w [C, 3, 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(d, (3, 3), axis=(1, 2))
    return np.einsum("cijab,cab->ij", windows, w)


def winograd_tile(d: Any, w: Any, low: int, high: int, fast: bool) -> Any:
    """The same through F(2x2, 3x3) in bytes, int32 that wraps, and an exact division by four."""
    v = np.einsum("ia,jb,cab->ijc", INPUT_TRANSFORM, INPUT_TRANSFORM, d)
    u = transform_weights(w[None])[0].transpose(1, 2, 0)
    products = np.zeros((4, 4), np.int64)
    for i, j in itertools.product(range(4), range(4)):
        terms = np.outer(INPUT_TRANSFORM[i], INPUT_TRANSFORM[j])
        least = int(terms[terms > 0].sum() * low + terms[terms < 0].sum() * high)
        most = int(terms[terms > 0].sum() * high + terms[terms < 0].sum() * low)
        if fast:
            limit = int(np.abs(u[i, j]).max())
            side = least + 128 - limit  # so that the signed factor starts at -128
            products[i, j] = fast_inner_product(v[i, j], u[i, j], limit - least, side)
        else:
            stored = (v[i, j] - least).astype(np.uint8).astype(np.int64)
            weights = u[i, j].astype(np.int8).astype(np.int64)
            products[i, j] = (stored * weights).sum() + least * u[i, j].sum()
        assert least <= v[i, j].min() and v[i, j].max() <= most
    return (OUTPUT_TRANSFORM @ products @ OUTPUT_TRANSFORM.T).astype(np.int32) >> 2


def extreme_operands(rng: np.random.Generator, channels: int, low: int, high: int, wmax: int) -> tuple[Any, Any]:
    """Operands at their limits, signs often those of one transform's rows, so that V and U reach their own."""
    d = np.where(rng.random((channels, 4, 4)) < 0.5, low, high)
    w = np.where(rng.random((channels, 3, 3)) < 0.5, -wmax, wmax)
    for c in range(channels):
        i, j = rng.integers(0, 4, 2)
        sign = np.outer(INPUT_TRANSFORM[i], INPUT_TRANSFORM[j]) * rng.choice((-1, 1))
        d[c] = np.where(sign > 0, high, np.where(sign < 0, low, d[c]))
        i, j = rng.integers(0, 4, 2)
        sign = np.outer(WEIGHT_TRANSFORM[i], WEIGHT_TRANSFORM[j]) * rng.choice((-1, 1))
        w[c] = np.where(sign > 0, wmax, np.where(sign < 0, -wmax, w[c]))
    return d, w


PAIRS = [(amax, wmax) for amax in (7, 15, 31, 32, 63, 64, 127) for wmax in (7, 10, 14, 15, 31)]


@pytest.mark.parametrize("signed", [False, True])
def test_winograd_is_exact_iff_the_rule_says_so(signed: bool) -> None:
    rng = np.random.default_rng(0)
    for amax, wmax in PAIRS:
        names = exact_mechanisms(amax, wmax, signed, *CONV3)
        low = -amax if signed else 0
        wrong = {"winograd": 0, "winograd_fip": 0}
        for _ in range(20):
            d, w = extreme_operands(rng, 8, low, amax, wmax)
            expected = direct_tile(d, w)
            for name in wrong:
                found = winograd_tile(d, w, low, amax, name == "winograd_fip")
                wrong[name] += not (found == expected).all()
        # The plain form has one range per operand: extremes that leave it are found at once. In the fast inner product two
        # extremes have to meet in one pair; that bound is tested exactly below.
        assert ("winograd" in names) == (wrong["winograd"] == 0), (amax, wmax)
        if "winograd_fip" in names:
            assert wrong["winograd_fip"] == 0, (amax, wmax)


@pytest.mark.parametrize("signed", [False, True])
def test_winograd_with_the_fast_inner_product_fits_bytes_iff_the_rule_says_so(signed: bool) -> None:
    """Every position on its own: some offsets make all extreme pairs of V and U come out right."""
    rows_v = [(int(np.maximum(r, 0).sum()), int(np.minimum(r, 0).sum())) for r in INPUT_TRANSFORM]
    for amax, wmax in [(15, 7), (15, 10), (15, 11), (31, 7), (31, 8), (7, 11), (7, 12), (32, 7), (63, 7), (4, 7)]:
        low = -amax if signed else 0
        exact = True
        for i, j in ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2)):  # one of every kind of position
            (pi, mi), (pj, mj) = rows_v[i], rows_v[j]
            plus, minus = pi * pj + mi * mj, pi * mj + mi * pj
            v_low, v_high = plus * low + minus * amax, plus * amax + minus * low
            u = wmax * int(np.abs(WEIGHT_TRANSFORM[i]).sum() * np.abs(WEIGHT_TRANSFORM[j]).sum())
            exact = exact and bytes_are_exact(v_low, v_high, u, True)
        assert ("winograd_fip" in exact_mechanisms(amax, wmax, signed, *CONV3)) == exact, (amax, wmax, signed)


@settings(max_examples=60)
@given(st.booleans(), st.integers(1, 63), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_weights_at_hand_allow_more_and_stay_exact(signed: bool, amax: int, spread: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = -amax if signed else 0
    weight = np.clip(np.rint(rng.normal(0, spread / 3, (5, 8, 3, 3))), -spread, spread).astype(np.int8)
    worst = exact_mechanisms(amax, spread, signed, *CONV3)
    names = exact_mechanisms(amax, spread, signed, *CONV3, weight)
    assert worst <= names
    for w in weight:
        d, _ = extreme_operands(rng, 8, low, amax, 1)
        for name in names & {"winograd", "winograd_fip"}:
            found = winograd_tile(d, w.astype(np.int64), low, amax, name == "winograd_fip")
            np.testing.assert_array_equal(found, direct_tile(d, w.astype(np.int64)))


def test_weights_at_hand_decide_beyond_the_worst_case() -> None:
    """Limits of 20 whose signs alternate transform into less than their worst case; equal signs do not."""
    lone = np.zeros((1, 1, 3, 3), np.int8)
    lone[0, 0, 1, 1] = 20
    assert "winograd" in exact_mechanisms(63, 20, False, *CONV3, lone)
    assert "winograd" not in exact_mechanisms(63, 20, False, *CONV3)
    assert "winograd" not in exact_mechanisms(63, 20, False, *CONV3, np.full((1, 1, 3, 3), 20, np.int8))
    with pytest.raises(ConfigError, match="beyond their limit"):
        exact_mechanisms(63, 19, False, *CONV3, lone)


def test_the_published_ranges() -> None:
    """Design notes, section 4: the table's operand ranges."""

    def widest(name: str, **fixed: Any) -> int:
        free = "amax" if "wmax" in fixed else "wmax"
        return max(
            v for v in range(1, 128) if name in exact_mechanisms(**{free: v, **fixed}, kernel=(3, 3), stride=(1, 1))
        )

    assert widest("winograd", wmax=14, signed=False) == 63 and widest("winograd", wmax=14, signed=True) == 31
    assert widest("winograd", amax=15, signed=False) == 14
    assert widest("fip", wmax=63, signed=False) == 64 and widest("fip", amax=63, signed=False) == 64
    assert widest("winograd_fip", wmax=7, signed=False) == 32 and widest("winograd_fip", amax=15, signed=False) == 10
    for a, w in itertools.product(range(1, 40), range(1, 15)):
        assert ("winograd_fip" in exact_mechanisms(a, w, False, *CONV3)) == (9 * w + 2 * a <= 127)


@pytest.mark.parametrize(
    "kernel, stride, dilation",
    [((3, 3), (2, 2), None), ((3, 3), (1, 2), None), ((3, 3), (1, 1), (2, 2)), ((1, 1), (1, 1), None), ((3,), (1,), None),
     ((3, 3, 3), (1, 1, 1), None), ((), (), None)],
)  # fmt: skip
def test_winograd_is_for_3x3_stride_1_only(kernel: Any, stride: Any, dilation: Any) -> None:
    assert exact_mechanisms(15, 7, False, kernel, stride, dilation=dilation) == NAMES


def test_winograd_needs_room_for_four_times_the_sum() -> None:
    assert exact_mechanisms(15, 7, False, *CONV3, accumulator_bound=INT32 // 4 - 1) == set(MECHANISMS)
    assert exact_mechanisms(15, 7, False, *CONV3, accumulator_bound=INT32 // 4) == NAMES


@pytest.mark.parametrize(
    "amax, wmax, signed", [(0, 7, False), (256, 7, False), (128, 7, True), (15, 0, False), (15, 128, True)]
)
def test_limits_outside_8_bits_are_refused(amax: int, wmax: int, signed: bool) -> None:
    with pytest.raises(ConfigError, match="magnitude"):
        exact_mechanisms(amax, wmax, signed, *CONV3)


def make_layer(rng: np.random.Generator, conv_groups: int, wmax: int) -> QuantizedLayer:
    outputs, width, n_local = 6, 10, 3
    local = np.array([0, 4, 8, 10], np.int32)
    bounds = np.concatenate([[0], *(local[1:] + g * width for g in range(conv_groups))]).astype(np.int32)
    return QuantizedLayer(
        "layer", "conv", rng.integers(-127, 128, (outputs, width, 3, 3)).astype(np.int8), np.ones(outputs, np.float32),
        np.ones(outputs, np.float32), 0.0, True, "", 15, wmax, bounds,
        rng.integers(0, 5, n_local * conv_groups).astype(np.uint8), rng.integers(0, 5, (outputs, n_local)).astype(np.uint8),
        "output", np.ones(n_local * conv_groups, np.int64), np.zeros((1, n_local * conv_groups), np.bool_),
        np.zeros((1, outputs), np.int32), conv_groups,
    )  # fmt: skip


@pytest.mark.parametrize("conv_groups", [1, 2])
def test_layers_are_judged_by_the_weights_and_shifts_they_have(conv_groups: int) -> None:
    rng = np.random.default_rng(conv_groups)
    for wmax in (7, 10, low_limit(6, True)):
        layer = make_layer(rng, conv_groups, wmax)
        assert layer.weight is not None
        integers = low_integers(layer)
        total = 0
        for o in range(6):
            row = 0
            for c in range(10):
                local = 0 if c < 4 else 1 if c < 8 else 2
                group = (o // (6 // conv_groups)) * 3 + local
                for w8, low in zip(layer.weight[o, c].ravel(), integers[o, c].ravel(), strict=True):
                    assert low == np.clip(np.rint(int(w8) / 2 ** int(layer.weight_shift[o, local])), -wmax, wmax)
                    row += abs(int(low)) << (int(layer.activation_shift[group]) + int(layer.weight_shift[o, local]))
            total = max(total, row * layer.amax)
        assert low_accumulator_bound(layer) == total
        expected = exact_mechanisms(15, wmax, False, *CONV3, integers, accumulator_bound=total)
        assert layer_mechanisms(layer, False, (1, 1)) == expected
