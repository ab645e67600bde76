"""The tables of all layers, bundled by kind: bias, shifts, low masks, group bounds, scales.

Each kind is one uint8 tensor "tables/<kind>" holding one DEFLATE stream over all layers in graph order, so that a file
has a dozen tables however many layers it has. Sizes before packing follow from the layers' outlines, never from the
stream.

  bias            int32 per output channel: row 0 of the bias table
  bias_steps      int32 [n_ratios - 1, O] per layer: each row minus the one before, modulo 2^32
  weight_shift    4 bits each; under granularity block and group every row is stored XOR the row before, so that tied
                  rows are zeros
  activation_shift 4 bits each
  low             nested: uint8 per group, the first ratio index at which it is low (n_ratios: never); else one bit each
  group_width     int32 per group: its number of feature channels
  group_macs      int64 per group, minus the share of the layer's macs that its width gives
  weight_scale    bits of the float32
  multiplier      bits of the float32 minus the bits of fl(weight_scale * c); c is float64, one per layer in
                  "scalars/multiplier_ratio". This is compression only: the float32 read back are the stored ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.packing import deflate, inflate, pack_ints, pack_nibbles, unpack_ints, unpack_nibbles
from bitdial.errors import ArtifactError
from bitdial.quantization.program import QuantizedLayer

Array = npt.NDArray[Any]
KINDS = (
    "bias", "bias_steps", "weight_shift", "activation_shift", "low", "group_width", "group_macs", "weight_scale",
    "multiplier",
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What the manifest says of a layer's sizes; everything else follows from it.

    outputs: columns of the bias table. scales: length of weight_scale. multipliers: length of multiplier.
    channels: feature channels over all convolution groups. rows: rows of weight_shift (0 for matmul).
    """

    outputs: int
    scales: int
    multipliers: int
    rows: int
    channels: int
    n_groups: int
    conv_groups: int
    tied: bool
    macs: int

    @property
    def n_local(self) -> int:
        return self.n_groups // self.conv_groups


def outline(layer: QuantizedLayer) -> Outline:
    """The outline of a checked layer."""
    shape = (0, 0) if layer.weight is None else layer.weight.shape
    return Outline(
        outputs=layer.bias.shape[1],
        scales=len(layer.weight_scale),
        multipliers=len(layer.multiplier),
        rows=shape[0],
        channels=shape[1] * layer.conv_groups,
        n_groups=layer.n_groups,
        conv_groups=layer.conv_groups,
        tied=layer.weight_granularity != "output",
        macs=layer.macs,
    )


def expanded_bytes(outlines: list[Outline], n_ratios: int) -> int:
    """Memory that the decoded tables take, for a bound before decoding."""
    per_layer = (
        4 * o.outputs * n_ratios + 4 * o.scales + 4 * o.multipliers + o.rows * o.n_local + o.n_groups * (n_ratios + 20)
        for o in outlines
    )
    return sum(per_layer)


def encode_tables(layers: list[QuantizedLayer], nested: bool) -> dict[str, Array]:
    """Tensors by name for checked layers."""
    parts: dict[str, list[Array]] = {kind: [] for kind in KINDS}
    ratios = []
    for layer in layers:
        shape = outline(layer)
        rows = layer.bias.view(np.uint32)
        parts["bias"].append(rows[:1].reshape(-1).view(np.int32))
        parts["bias_steps"].append((rows[1:] - rows[:-1]).reshape(-1).view(np.int32))
        shifts = layer.weight_shift
        if shape.tied and len(shifts):
            shifts = np.concatenate([shifts[:1], shifts[1:] ^ shifts[:-1]])
        parts["weight_shift"].append(shifts.reshape(-1))
        parts["activation_shift"].append(layer.activation_shift[: shape.n_groups])
        parts["low"].append((~layer.low).sum(axis=0).astype(np.uint8) if nested else layer.low.reshape(-1))
        if shape.n_groups:
            width = np.diff(layer.group_bounds)
            parts["group_width"].append(width)
            parts["group_macs"].append(layer.group_macs - _even_macs(shape, width))
        scale, multiplier = layer.weight_scale, layer.multiplier
        parts["weight_scale"].append(scale.view(np.int32))
        ratio = float(np.median(multiplier.astype(np.float64) / scale)) if len(scale) == len(multiplier) else 1.0
        ratio = ratio if np.isfinite(ratio) else 1.0
        ratios.append(ratio)
        predicted = _predict_multiplier(scale, ratio, len(multiplier))
        parts["multiplier"].append((multiplier.view(np.uint32) - predicted).view(np.int32))
    packers = dict.fromkeys(KINDS, pack_ints)
    packers |= {"weight_shift": pack_nibbles, "activation_shift": pack_nibbles, "low": _pack_low}
    empty = {"weight_shift": np.uint8, "activation_shift": np.uint8, "low": np.uint8 if nested else np.bool_}
    tensors: dict[str, Array] = {"scalars/multiplier_ratio": np.array(ratios, np.float64)}
    for kind in KINDS:
        dtype = np.dtype(empty.get(kind, np.int64 if kind == "group_macs" else np.int32))
        values = np.concatenate([np.zeros(0, dtype), *parts[kind]]).astype(dtype)
        tensors[f"tables/{kind}"] = deflate(packers[kind](values))
    return tensors


def decode_tables(
    tensors: Mapping[str, Array], outlines: list[Outline], n_ratios: int, nested: bool, where: str
) -> list[dict[str, Array]]:
    """Per layer the arrays of `QuantizedLayer` by field name. Raises ArtifactError.

    The caller has bounded `expanded_bytes`. Shapes and dtypes are right; ranges are still to be checked.
    """

    def integers(kind: str, count: int, dtype: type[np.signedinteger[Any]] = np.int32) -> Array:
        data = inflate(tensors[f"tables/{kind}"], count * np.dtype(dtype).itemsize, f"{where}: table '{kind}'")
        return unpack_ints(data, dtype)

    def nibbles(kind: str, count: int) -> Array:
        return unpack_nibbles(inflate(tensors[f"tables/{kind}"], -(-count // 2), f"{where}: table '{kind}'"), count)

    outputs, groups = sum(o.outputs for o in outlines), sum(o.n_groups for o in outlines)
    low_count = groups if nested else groups * n_ratios
    low_bytes = inflate(tensors["tables/low"], low_count if nested else -(-low_count // 8), f"{where}: table 'low'")
    low_values = np.frombuffer(low_bytes, np.uint8)
    streams = {
        "bias": _Cursor(integers("bias", outputs)),
        "bias_steps": _Cursor(integers("bias_steps", outputs * (n_ratios - 1))),
        "weight_shift": _Cursor(nibbles("weight_shift", sum(o.rows * o.n_local for o in outlines))),
        "activation_shift": _Cursor(nibbles("activation_shift", groups)),
        "low": _Cursor(low_values if nested else np.unpackbits(low_values, count=low_count, bitorder="little")),
        "group_width": _Cursor(integers("group_width", groups)),
        "group_macs": _Cursor(integers("group_macs", groups, np.int64)),
        "weight_scale": _Cursor(integers("weight_scale", sum(o.scales for o in outlines))),
        "multiplier": _Cursor(integers("multiplier", sum(o.multipliers for o in outlines))),
    }
    multiplier_ratio = tensors["scalars/multiplier_ratio"]
    result = []
    for index, o in enumerate(outlines):
        take = {kind: cursor.take for kind, cursor in streams.items()}
        first = take["bias"](o.outputs).reshape(1, -1)
        steps = take["bias_steps"]((n_ratios - 1) * o.outputs).reshape(n_ratios - 1, o.outputs)
        bias = np.cumsum(np.concatenate([first, steps]).view(np.uint32), axis=0, dtype=np.uint32).view(np.int32)
        shifts = take["weight_shift"](o.rows * o.n_local).reshape(o.rows, o.n_local)
        if o.tied:
            shifts = np.bitwise_xor.accumulate(shifts, axis=0) if len(shifts) else shifts
        if nested:
            level = take["low"](o.n_groups)
            if len(level) and level.max() > n_ratios:
                raise ArtifactError.damaged(where, "table 'low' names ratios that do not exist")
            low = level[None, :] <= np.arange(n_ratios)[:, None]
        else:
            low = take["low"](n_ratios * o.n_groups).reshape(n_ratios, o.n_groups).astype(np.bool_)
        width = take["group_width"](o.n_groups)
        if len(width) and (width.min() < 1 or int(width.sum(dtype=np.int64)) != o.channels):
            raise ArtifactError.damaged(where, "table 'group_width' does not cover the channels")
        group_macs = take["group_macs"](o.n_groups) + _even_macs(o, width)
        scale = take["weight_scale"](o.scales).view(np.float32)
        predicted = _predict_multiplier(scale, float(multiplier_ratio[index]), o.multipliers)
        multiplier = (take["multiplier"](o.multipliers).view(np.uint32) + predicted).view(np.float32)
        result.append(
            {
                "weight_scale": scale.copy(),
                "multiplier": multiplier,
                "group_bounds": np.concatenate([[0], np.cumsum(width)]).astype(np.int32),
                "activation_shift": take["activation_shift"](o.n_groups).copy(),
                "weight_shift": shifts.copy(),
                "group_macs": group_macs,
                "low": low,
                "bias": bias,
            }
        )
    return result


class _Cursor:
    """Hands out a vector piece by piece."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self._position = 0

    def take(self, count: int) -> Array:
        self._position += count
        return self._values[self._position - count : self._position]


def _pack_low(values: Array) -> bytes:
    return values.tobytes() if values.dtype == np.uint8 else np.packbits(values, bitorder="little").tobytes()


def _even_macs(shape: Outline, width: Array) -> npt.NDArray[np.int64]:
    """int64 [n_groups]: the layer's macs shared out by channels (cannot overflow: no group is wider than the layer)."""
    return width.astype(np.int64) * (shape.macs // max(shape.channels, 1))


def _predict_multiplier(scale: npt.NDArray[np.float32], ratio: float, count: int) -> npt.NDArray[np.uint32]:
    """uint32 [count]: float32 bits near those of the multipliers (one product, one rounding: the same anywhere)."""
    if len(scale) != count:
        return np.zeros(count, np.uint32)
    with np.errstate(all="ignore"):  # a hostile ratio or scale may overflow; the outcome is checked afterwards
        return (scale.astype(np.float64) * ratio).astype(np.float32).view(np.uint32)
