"""A layer's feature channels cut into parts that one convolution or product each can compute, with their weights.

Pure NumPy. The sum of the parts is the mixed product of the design notes, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.quantization.program import QParams, QuantizedLayer
from bitdial.quantization.weights import low_integers, per_weight, read_back_weights

INT4_LIMIT = 7


@dataclass(frozen=True)
class Part:
    """Some feature channels of one layer at one ratio.

    local            int64 [c]: channels within each convolution group, ascending; all channels of a layer without
    weight           int8 [O, c, *kernel]: what the products use: 8-bit weights, or low ones shifted back
    shift            int64 [C'] activation shift of every channel of the part (conv_groups * c), 0 where not extracted
    limit            int64 [C'] largest magnitude after extracting, in low steps (amax, or the 8-bit limit)
    extracted        some channel is read at low precision
    low_weight       int8 [O, c, *kernel], -7..7, if the part is stored in 4 bits, else None
    weight_shift     uint8 [O, c / group]: shifts that go with low_weight
    group            channels that share a weight shift
    """

    local: npt.NDArray[np.int64]
    weight: npt.NDArray[np.int8]
    shift: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]
    extracted: bool
    low_weight: npt.NDArray[np.int8] | None = None
    weight_shift: npt.NDArray[np.uint8] | None = None
    group: int = 0

    def channels(self, layer: QuantizedLayer) -> npt.NDArray[np.int64]:
        """Feature channels of the layer that the part reads, ascending."""
        assert layer.weight is not None
        starts = np.arange(layer.conv_groups) * layer.weight.shape[1]
        channels: npt.NDArray[np.int64] = (starts[:, None] + self.local[None]).reshape(-1)
        return channels

    def row_sum(self) -> int:
        """max over outputs of sum |w|."""
        w = self.weight.astype(np.int64)
        return int(np.abs(w).reshape(len(w), -1).sum(axis=1).max(initial=0))

    def bound(self, conv_groups: int) -> int:
        """max over outputs of the largest possible |sum|."""
        largest = (self.limit << self.shift).reshape(conv_groups, -1)
        o = len(self.weight)
        w = np.abs(self.weight.astype(np.int64)).reshape(o, len(self.local), -1).sum(axis=2)
        per_row = largest[np.arange(o) * conv_groups // o]
        return int((w * per_row).sum(axis=1).max(initial=0))


def split_layer(layer: QuantizedLayer, index: int, encoding: QParams, four_bits: bool) -> list[Part]:
    """The parts of a conv or linear layer at a ratio index; their channels are disjoint and together all.

    four_bits: store low weights in 4 bits where they fit: one part per group size, and one of the channels that stay at
    8 bits. Otherwise, and where the convolution groups of a grouped conv differ in what is low, one part with all.
    """
    assert layer.weight is not None
    per_group = layer.weight.shape[1]
    low = layer.low[index]
    bounds = layer.group_bounds.astype(np.int64)
    n_local = layer.weight_shift.shape[1]
    if not low.any():
        return [_merged(layer, low, encoding)]
    masks = low.reshape(layer.conv_groups, n_local)
    local_bounds = bounds[: n_local + 1]
    widths = np.diff(local_bounds)
    alike = bool((masks == masks[:1]).all()) and bool(
        (np.diff(bounds).reshape(layer.conv_groups, n_local) == widths).all()
    )
    if not four_bits or layer.wmax > INT4_LIMIT or not alike:
        return [_merged(layer, low, encoding)]
    parts = []
    for width in sorted(set(widths[masks[0]].tolist()), reverse=True):
        groups = np.flatnonzero(masks[0] & (widths == width))
        local = np.concatenate([np.arange(local_bounds[g], local_bounds[g + 1]) for g in groups])
        shift = layer.weight_shift[:, groups]
        per_channel = np.repeat(shift, width, axis=1).reshape(len(shift), -1, *[1] * (layer.weight.ndim - 2))
        low_weight = low_integers(layer)[:, local]
        weight = np.left_shift(low_weight, per_channel.astype(np.int8))
        all_groups = (np.arange(layer.conv_groups)[:, None] * n_local + groups[None]).reshape(-1)
        activation_shift = np.repeat(layer.activation_shift[all_groups].astype(np.int64), width)
        limit = np.full(len(activation_shift), layer.amax, np.int64)
        parts.append(Part(local, weight, activation_shift, limit, True, low_weight, shift, width))
    rest = np.flatnonzero(~np.repeat(masks[0], widths))
    if rest.size:
        count = layer.conv_groups * rest.size
        limit = np.full(count, encoding.qmax, np.int64)
        parts.append(Part(rest, layer.weight[:, rest], np.zeros(count, np.int64), limit, False))
    assert sum(len(p.local) for p in parts) == per_group
    return parts


def _merged(layer: QuantizedLayer, low: npt.NDArray[np.bool_], encoding: QParams) -> Part:
    """All channels at once, weights in 8 bits: low ones as low << shift, which never leaves -127..127."""
    assert layer.weight is not None
    per_group = layer.weight.shape[1]
    channels = low[layer.channel_groups()] if layer.n_groups else np.zeros(per_group * layer.conv_groups, np.bool_)
    weight = layer.weight
    if low.any():
        weight = np.where(per_weight(layer, low), read_back_weights(layer), weight)
    shift = np.where(channels, layer.activation_shift[layer.channel_groups()], 0) if low.any() else 0 * channels
    limit = np.where(channels, layer.amax, encoding.qmax)
    return Part(np.arange(per_group), weight, shift.astype(np.int64), limit.astype(np.int64), bool(low.any()))
