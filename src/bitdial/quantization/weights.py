"""8-bit weights, their shifts at low precision, and the factors of the integer epilogue. Pure NumPy functions.

Source: design notes, section 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError, GraphError
from bitdial.quantization.effective_bits import extract, plain_shift
from bitdial.quantization.layer import BLOCK_ROWS, QParams, QuantizedLayer, WeightGranularity

INT32_LIMIT = 2**31 - 1


def weight_scales(
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    activation_scale: float,
    pairs: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.float32]:
    """float32 [O]: max(max|W[o]|/127, |bias[o]|/(s_a * 2^30), 2^-40); dead filters and large biases are safe.

    pairs: int32 [n_local + 1], group borders over the input channels. Scales then also hold the sum of two weights of one sign,
    of channels 2i and 2i + 1 of a group, to 128: what AVX2 multiplies without widening.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64) / 127.0
    if pairs is not None:
        largest = np.maximum(largest, largest_pairs(weight, pairs) / 127.0)  # each rounds up by a half at most
    if bias is not None:
        largest = np.maximum(largest, np.abs(bias.astype(np.float64)) / (activation_scale * 2.0**30))
    scale: npt.NDArray[np.float32] = np.maximum(largest, 2.0**-40).astype(np.float32)
    return scale


def largest_pairs(weight: npt.NDArray[np.float32], bounds: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """float64 [O]: the largest sum of two weights of one sign, of one tap and adjacent channels, counted from each border."""
    w = weight.reshape(len(weight), weight.shape[1], -1).astype(np.float64)
    result = np.zeros(len(w))
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        for part in (np.maximum(w[:, begin:end], 0.0), np.maximum(-w[:, begin:end], 0.0)):
            pairs = part[:, : len(part[0]) // 2 * 2].reshape(len(w), -1, 2, part.shape[2]).sum(axis=2)
            if pairs.size:
                result = np.maximum(result, pairs.max(axis=(1, 2)))
    return result


def quantize_weight(weight: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """int8, same shape: clamp(rne(W / s_w[o]), -127, 127)."""
    ratio = weight.astype(np.float64) / scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(ratio), -127, 127).astype(np.int8)


def quantize_bias(
    bias: npt.NDArray[Any], weight_scale: npt.NDArray[np.float32], activation_scale: float
) -> npt.NDArray[np.int32]:
    """int32 [O]: bias in the accumulator's scale s_a * s_w[o]."""
    units = bias.astype(np.float64) / (weight_scale.astype(np.float64) * activation_scale)
    return np.clip(np.rint(units), -(2**30), 2**30).astype(np.int32)


def multipliers(
    weight_scale: npt.NDArray[np.float32], activation_scale: float, output: QParams | None
) -> npt.NDArray[np.float32]:
    """float32 [O]: M = s_a * s_w[o] / s_y (float output: s_a * s_w[o])."""
    product = weight_scale.astype(np.float64) * activation_scale
    return (product / output.scale if output is not None else product).astype(np.float32)


def accumulator_bound(weight: npt.NDArray[np.signedinteger[Any]], activation: QParams) -> int:
    """Largest |accumulator| any input can give: activation limit times the largest row sum of |w8|."""
    rows = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1)
    return int(rows.max(initial=0)) * activation.qmax


def check_accumulators(name: str, bound: int, bias: npt.NDArray[np.int32]) -> None:
    """Raise ConfigError if accumulator plus bias could leave int32."""
    if bound + int(np.abs(bias.astype(np.int64)).max(initial=0)) > INT32_LIMIT:
        raise ConfigError(
            f"layer '{name}': its accumulators can leave int32 (bound {bound}); keep it in float with ignored=('{name}',)"
        )


def blocked(
    weight: npt.NDArray[np.int8], local_bounds: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Weight as [O, I, taps] and the channel borders of its groups inside one convolution group."""
    return weight.reshape(weight.shape[0], weight.shape[1], -1).astype(np.int16), local_bounds.astype(np.int64)


def plain_weight_shifts(
    weight: npt.NDArray[np.int8],
    local_bounds: npt.NDArray[np.int32],
    limit: int,
    granularity: WeightGranularity,
) -> npt.NDArray[np.uint8]:
    """uint8 [O, n_local]: shift of every (output channel, group) from the largest magnitude, tied as the granularity says.

    weight: int8 [O, I, *kernel]. local_bounds: [n_local + 1] group borders over I.
    """
    w, bounds = blocked(weight, local_bounds)
    largest = np.maximum.reduceat(np.abs(w).max(axis=2), bounds[:-1], axis=1)
    if granularity != "output":
        starts = np.arange(0, len(largest), BLOCK_ROWS if granularity == "block" else len(largest))
        tied = np.maximum.reduceat(largest, starts, axis=0)
        largest = np.repeat(tied, np.diff([*starts, len(largest)]), axis=0)
    return plain_shift(largest, limit)


def per_weight(layer: QuantizedLayer, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What each weight takes from its group: [O, I, 1, ..], for broadcasting against the weight.

    values: [n_groups], or [O, n_local] where output rows differ.
    """
    assert layer.weight is not None
    if values.ndim == 1:  # of each output row, the groups of its convolution group
        values = np.repeat(values.reshape(layer.conv_groups, -1), len(layer.weight) // layer.conv_groups, axis=0)
    widths = np.diff(layer.group_bounds[: layer.weight_shift.shape[1] + 1])
    spread = np.repeat(values, widths, axis=1)
    return spread.reshape(*spread.shape, *[1] * (layer.weight.ndim - 2))


def low_integers(layer: QuantizedLayer) -> npt.NDArray[np.int8]:
    """int8, shape of the layer's weight: every weight at low precision before its shift, stored or derived from 8 bits.

    Only in groups that may run low does it mean anything; a layer without groups has none (raises AssertionError).
    """
    assert layer.weight is not None and layer.n_groups
    if layer.low_weight is not None:
        return layer.low_weight
    return extract(layer.weight, per_weight(layer, layer.weight_shift), layer.wmax)


def read_back_weights(layer: QuantizedLayer) -> npt.NDArray[np.int8]:
    """int8, shape of the layer's weight: every weight read back from low precision (low << shift)."""
    low = low_integers(layer).astype(np.int16)
    result: npt.NDArray[np.int8] = np.left_shift(low, per_weight(layer, layer.weight_shift)).astype(np.int8)
    return result


def bound_accumulators(layer: QuantizedLayer, activation: QParams) -> None:
    """Set the bound on the layer's accumulators for every choice of low groups: a weight read back can exceed its 8-bit value.

    Raises ConfigError where they could leave int32.
    """
    assert layer.weight is not None
    larger = np.maximum(np.abs(layer.weight), np.abs(read_back_weights(layer)))  # both symmetric, so abs stays in int8
    layer.accumulator_bound = accumulator_bound(larger, activation)
    check_accumulators(layer.name, layer.accumulator_bound, layer.bias[0])


def largest_magnitudes(layer: QuantizedLayer) -> npt.NDArray[np.int16]:
    """int16, shape of the weight: the largest magnitude that each has at any ratio, 8-bit or, where its group may be low and the
    layer has low weights of its own, `low << shift`."""
    assert layer.weight is not None
    largest = np.abs(layer.weight.astype(np.int16))
    if layer.low_weight is None:
        return largest
    back = np.left_shift(np.abs(layer.low_weight.astype(np.int16)), per_weight(layer, layer.weight_shift))
    some = per_weight(layer, np.asarray(layer.low.any(axis=0)))
    result: npt.NDArray[np.int16] = np.maximum(largest, np.where(some, back, 0)).astype(np.int16)
    return result


def check_low_weight(layer: QuantizedLayer) -> None:
    """Raise GraphError for low weights that are not what `QuantizedLayer` says. The layer is sound otherwise."""
    low = layer.low_weight
    if low is None:
        return
    if layer.weight is None or low.dtype != np.int8 or low.shape != layer.weight.shape:
        raise GraphError(f"layer '{layer.name:.80}': low_weight is not int8 of the weight's shape")
    if int(np.abs(low.astype(np.int16)).max()) > layer.wmax:
        raise GraphError(f"layer '{layer.name:.80}': a low weight is beyond {layer.wmax}")
    if int(largest_magnitudes(layer).max()) > 127:
        raise GraphError(f"layer '{layer.name:.80}': a low weight shifted back is beyond 127")
