"""Slow definitions written straight from the design notes (section 1), independent of the code under test.

Plain Python integers, fractions and NumPy int64; nothing here imports bitdial or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def rne_quotient(value: int, shift: int) -> int:
    """rne(value / 2^shift), half to even."""
    return round(Fraction(value, 2**shift))  # Python rounds exact fractions half to even


def low_value(value: int, shift: int, limit: int, signed: bool) -> int:
    """clamp(rne(v / 2^shift)) to -limit..limit (signed) or 0..limit."""
    return max(-limit if signed else 0, min(limit, rne_quotient(value, shift)))


def plain_shift(magnitudes: list[int], bits: int, signed: bool) -> int:
    """shift = max(0, n - b) unsigned, max(0, n - (b - 1)) signed; n = bit length of the largest magnitude."""
    n = max(magnitudes, default=0).bit_length()
    return max(0, n - (bits - 1 if signed else bits))


def low_array(values: Ints, shift: Ints | int, limit: int, signed: bool) -> Ints:
    """`low_value` over an array, each distinct (value, shift) once."""
    v, s = np.broadcast_arrays(np.asarray(values, np.int64), np.asarray(shift, np.int64))
    codes, where = np.unique(v * 64 + s, return_inverse=True)
    table = np.array([low_value(int(c) >> 6, int(c) & 63, limit, signed) for c in codes], np.int64)
    return table[where.reshape(v.shape)]


class LayerOracle:
    """One conv or linear layer of a program: accumulators by the formula of the mixed product, one output at a time.

    layer: the QuantizedLayer. attrs: the node's attributes. x: int64, channels along axis 1 (conv) or last (linear).
    samples: int64, shaped like x without its channel axis: which sample of the batch each position belongs to.
    """

    def __init__(
        self, layer: Any, attrs: dict[str, Any], x: Ints, signed: bool, extraction: str, samples: Ints | None = None
    ) -> None:
        self.layer, self.attrs, self.conv = layer, attrs, layer.kind == "conv"
        self.x = np.asarray(x, np.int64)
        channels = np.moveaxis(self.x, 1, 0) if self.conv else np.moveaxis(self.x, -1, 0)  # [C, positions...]
        if samples is None:
            samples = np.broadcast_to(
                np.arange(self.x.shape[0]).reshape(-1, *[1] * (channels.ndim - 2)), channels.shape[1:]
            )
        self.samples = samples
        bounds = [int(b) for b in layer.group_bounds]
        self.group_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        shifts = np.zeros((int(samples.max()) + 1, len(bounds) - 1), np.int64)
        if extraction == "dynamic":
            width = int(layer.amax).bit_length()
            for sample in range(shifts.shape[0]):
                for g in range(len(bounds) - 1):
                    seen = 0
                    for v in np.unique(np.abs(channels[bounds[g] : bounds[g + 1], samples == sample])):
                        seen |= int(v)
                    shifts[sample, g] = max(0, seen.bit_length() - width)
        else:
            shifts[:] = layer.activation_shift.astype(np.int64)
        self.shifts = shifts
        per_value = shifts[samples][..., self.group_of]  # [positions..., C]
        low = low_array(np.moveaxis(channels, 0, -1), per_value, int(layer.amax), signed)
        self.x_low = np.moveaxis(low, -1, 1 if self.conv else -1)

    def outputs(self) -> Iterator[tuple[int, ...]]:
        """Indices of all outputs, as `accumulator` takes them."""
        rows = self.layer.weight.shape[0]
        if not self.conv:
            yield from np.ndindex(*self.x.shape[:-1], rows)
            return
        yield from np.ndindex(self.x.shape[0], rows, *self.spatial())

    def spatial(self) -> list[int]:
        a, kernel = self.attrs, self.layer.weight.shape[2:]
        return [
            (d + 2 * p - dil * (k - 1) - 1) // s + 1
            for d, k, s, p, dil in zip(self.x.shape[2:], kernel, a["stride"], a["padding"], a["dilation"], strict=True)
        ]

    def _field(self, x: Ints, index: tuple[int, ...]) -> tuple[Ints, int, int]:
        """What output `index` reads ([channels of its convolution group, taps]), its row, its convolution group."""
        if not self.conv:
            return x[index[:-1]].reshape(-1, 1), index[-1], 0
        a, weight = self.attrs, self.layer.weight
        groups = int(a["groups"])
        row = index[1]
        conv_group = row // (weight.shape[0] // groups)
        per_group = weight.shape[1]
        field = np.zeros((per_group, int(np.prod(weight.shape[2:]))), np.int64)
        for tap, offset in enumerate(np.ndindex(*weight.shape[2:])):
            at = [
                o * s - p + k * d
                for o, s, p, k, d in zip(index[2:], a["stride"], a["padding"], offset, a["dilation"], strict=True)
            ]
            if all(0 <= i < size for i, size in zip(at, x.shape[2:], strict=True)):
                field[:, tap] = x[(index[0], slice(conv_group * per_group, (conv_group + 1) * per_group), *at)]
        return field, row, conv_group

    def accumulator(self, index: tuple[int, ...], low: npt.NDArray[np.bool_]) -> int:
        """acc of one output; low: bool [n_groups], which groups run low.

        acc[o] = sum over low groups ( sum a_low * w_low ) << (sa[g] + sw[o,g])  +  sum over the others a8 * w8
        """
        layer = self.layer
        field8, row, conv_group = self._field(self.x, index)
        field4, _, _ = self._field(self.x_low, index)
        weight = layer.weight[row].reshape(field8.shape[0], -1).astype(np.int64)
        position = (index[0], *index[2:]) if self.conv else index[:-1]
        # every position of one receptive field belongs to one sample: that of the output's own row of x
        sample = int(self.samples[index[0]].reshape(-1)[0]) if self.conv else int(self.samples[position])
        n_local = layer.weight_shift.shape[1]
        first = conv_group * field8.shape[0]
        total = 0
        for j in range(n_local):
            g = conv_group * n_local + j
            channels = slice(int(layer.group_bounds[g]) - first, int(layer.group_bounds[g + 1]) - first)
            if low[g]:
                sw = int(layer.weight_shift[row, j])
                if layer.low_weight is None:
                    w_low = low_array(weight[channels], sw, int(layer.wmax), True)
                else:  # integers of their own
                    own = layer.low_weight[row].reshape(field8.shape[0], -1)
                    w_low = own[channels].astype(np.int64)
                total += int((field4[channels] * w_low).sum()) << (int(self.shifts[sample, g]) + sw)
            else:
                total += int((field8[channels] * weight[channels]).sum())
        return total

    def accumulators(self, low: npt.NDArray[np.bool_]) -> Ints:
        """All accumulators, shaped like the layer's output."""
        rows = self.layer.weight.shape[0]
        shape = (self.x.shape[0], rows, *self.spatial()) if self.conv else (*self.x.shape[:-1], rows)
        result = np.empty(shape, np.int64)
        for index in self.outputs():
            result[index] = self.accumulator(index, low)
        return result


def epilogue(
    acc: Ints,
    bias: npt.NDArray[np.int32],
    multiplier: npt.NDArray[np.float32],
    residual: Ints | None = None,
    residual_factor: float = 0.0,
    clamp: tuple[int, int] | None = None,
    channel_axis: int = 1,
) -> npt.NDArray[np.float32]:
    """t = fl(float(acc + b) * M); t = fl(t + fl(float(r) * R)); clamp; rne. float32 all along."""
    shape = [1] * acc.ndim
    shape[channel_axis] = -1
    t = (acc + bias.astype(np.int64).reshape(shape)).astype(np.float32) * multiplier.reshape(shape)
    if residual is not None:
        t = t + residual.astype(np.float32) * np.float32(residual_factor)
    assert t.dtype == np.float32
    if clamp is not None:
        t = np.rint(np.clip(t, np.float32(clamp[0]), np.float32(clamp[1])))
    return t
