"""Which fast multiplications are exact for which low operands. Pure functions; NumPy only.

Names and rules (design notes, section 4; x are activations, w weights, both low integers before their shifts):

  direct        int8 products of the operands read back into 8 bits. Always exact.
  fip           fast inner product (Winograd 1968; in hardware: Pogue and Nicolici 2024): pairs of products as
                (x1 + c + w2)(x2 + w1), the left factor stored in uint8, the right one in int8. Exact if a byte offset c
                exists so that neither leaves its range.
  winograd      F(2x2, 3x3) with integer transforms: V = B^T d B in uint8 with an offset per position, U = G w G^T, G doubled,
                in int8 within -127..127; results are four times the sums, divided exactly. 3x3, stride 1, dilation 1.
  winograd_fip  both: the fast inner product over V and U, with an offset of V per position (taken from V before either
                factor is formed, so that only the width of V's range counts).
  narrow, winograd_narrow   the direct form and F(2x2, 3x3) on processors without a byte dot product (AVX2), where sums of
                eight products are held in 16 bits before they are widened.

Weights enter by their largest magnitude: wmax, or what the integer weights at hand reach (per Winograd position after the
transform, over all channels). A rule that looked at their signs too would allow a little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError
from bitdial.quantization.program import QuantizedLayer
from bitdial.quantization.weights import low_integers, per_weight

MECHANISMS = ("direct", "fip", "winograd", "winograd_fip", "narrow", "winograd_narrow")
NARROW_PRODUCTS, INT16_MAX = 8, 2**15 - 1
WINOGRAD_FACTOR = 4  # by which the accumulators of F(2x2, 3x3) exceed the sums, with G doubled per dimension
INT32 = 2**31

Integers = npt.NDArray[np.integer[Any]]
# Rows of B^T: d0 - d2, d1 + d2, d2 - d1, d1 - d3; rows of 2 G.
INPUT_TRANSFORM = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=np.int64)
WEIGHT_TRANSFORM = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=np.int64)


def activation_range(amax: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest low activation. Raises ConfigError for limits that 8 bits cannot hold."""
    top = 127 if signed else 255
    if not 1 <= amax <= top:
        raise ConfigError(f"activations of magnitude {amax}: low limits lie in 1..{top}")
    return (-amax if signed else 0), amax


def transformed_range(low: int, high: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """int64 [4, 4] each: smallest and largest V = B^T d B per position for inputs low..high."""
    terms = np.einsum("ia,jb->ijab", INPUT_TRANSFORM, INPUT_TRANSFORM).reshape(4, 4, -1)
    plus, minus = np.maximum(terms, 0).sum(axis=2), np.minimum(terms, 0).sum(axis=2)
    return plus * low + minus * high, plus * high + minus * low


def transform_weights(weight: Integers) -> npt.NDArray[np.int64]:
    """int64 [O, I, 4, 4]: U = G w G^T with G doubled, of weights [O, I, 3, 3]."""
    result: npt.NDArray[np.int64] = np.einsum(
        "ia,jb,ocab->ocij", WEIGHT_TRANSFORM, WEIGHT_TRANSFORM, weight.astype(np.int64)
    )
    return result


def transformed_limit(wmax: int, weight_low: Integers | None = None) -> npt.NDArray[np.int64]:
    """int64 [4, 4]: largest |U| per position, of the weights at hand or, without them, of any within -wmax..wmax."""
    limit: npt.NDArray[np.int64]
    if weight_low is not None:
        limit = np.abs(transform_weights(weight_low)).max(axis=(0, 1), initial=0)
    else:
        rows = np.abs(WEIGHT_TRANSFORM).sum(axis=1)
        limit = wmax * rows[:, None] * rows[None, :]
    return limit


def has_winograd(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] | None = None) -> bool:
    """Is F(2x2, 3x3) a form of this convolution?"""
    return tuple(kernel) == (3, 3) and tuple(stride) == (1, 1) and tuple(dilation or (1, 1)) == (1, 1)


def exact_mechanisms(
    amax: int,
    wmax: int,
    signed: bool,
    kernel: Sequence[int],
    stride: Sequence[int],
    weight_low: Integers | None = None,
    *,
    dilation: Sequence[int] | None = None,
    accumulator_bound: int = 0,
) -> frozenset[str]:
    """The mechanisms that compute a layer's low products exactly, a subset of MECHANISMS; "direct" is always among them.

    amax, wmax         limits of low activations (0..amax, or -amax..amax if signed) and weights (-wmax..wmax)
    kernel, stride     per spatial dimension; () for a linear layer
    weight_low         integers [O, I, *kernel] before their shifts: decides by these weights instead of by wmax
    accumulator_bound  largest |sum| of the low part with its shifts applied (see `low_accumulator_bound`); four times it
                       must stay inside int32 for Winograd. 0 leaves that out

    Raises ConfigError for limits outside 8 bits, and for weights at hand beyond wmax.
    """
    low, high = activation_range(amax, signed)
    if not 1 <= wmax <= 127:
        raise ConfigError(f"weights of magnitude {wmax}: low limits lie in 1..127")
    largest = wmax
    if weight_low is not None:
        largest = int(np.abs(weight_low.astype(np.int64)).max(initial=0))
        if largest > wmax:
            raise ConfigError(f"low weights reach {largest}, beyond their limit {wmax}: extract them with that limit")
    names = {"direct"}
    if _fast_inner_product_fits(low, high, largest):
        names.add("fip")
    if NARROW_PRODUCTS * (high - low) * largest <= INT16_MAX:
        names.add("narrow")
    if has_winograd(kernel, stride, dilation) and WINOGRAD_FACTOR * accumulator_bound < INT32:
        v_low, v_high = transformed_range(low, high)
        u = transformed_limit(wmax, weight_low)
        if bool((v_high - v_low <= 255).all()) and bool((u <= 127).all()):
            names.add("winograd")
            if bool((NARROW_PRODUCTS * (v_high - v_low) * u <= INT16_MAX).all()):
                names.add("winograd_narrow")
        if bool((v_high - v_low + 2 * u <= 255).all()):
            names.add("winograd_fip")
    return frozenset(names)


def _fast_inner_product_fits(low: int, high: int, largest: int) -> bool:
    """low + c - w >= 0 and high + c + w <= 255 for some c; high + w <= 127 and low - w >= -128."""
    offset = largest - low  # the smallest that keeps the unsigned factor from falling below 0
    return high + offset + largest <= 255 and high + largest <= 127 and low - largest >= -128


def low_accumulator_bound(layer: QuantizedLayer) -> int:
    """Largest |accumulator| of the layer with every group low: max over outputs of sum amax * |w_low| << (sa + sw).

    Every subset of groups stays below it.
    """
    assert layer.weight is not None
    shift = per_weight(layer, layer.activation_shift.astype(np.int64)) + per_weight(layer, layer.weight_shift)
    magnitude = np.abs(low_integers(layer).astype(np.int64)) << shift
    return int(magnitude.reshape(len(magnitude), -1).sum(axis=1).max(initial=0)) * layer.amax


def layer_mechanisms(
    layer: QuantizedLayer, signed: bool, stride: Sequence[int], dilation: Sequence[int] | None = None
) -> frozenset[str]:
    """`exact_mechanisms` of a quantized conv or linear layer from the weights and shifts at hand."""
    assert layer.weight is not None
    return exact_mechanisms(
        layer.amax,
        layer.wmax,
        signed,
        layer.weight.shape[2:],
        stride,
        low_integers(layer),
        dilation=dilation,
        accumulator_bound=low_accumulator_bound(layer),
    )
