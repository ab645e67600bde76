"""The arrays of one conv or linear layer in the order that the exported inner loops read them.

A row holds the groups of channels one after another, each as [kernel_h][kernel_w][channels of the group], filled up with
zeros to a multiple of four bytes: a low group is one run, and ARM's SIMD reads it by words. With one fixed ratio the rows
are those of that ratio: low groups read back from low precision, or packed at two values a byte. With more ratios the rows
are 8-bit ones; low weights are derived from them at run time, or, where they are integers of their own, stored in rows beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ExportError
from bitdial.quantization.effective_bits import extract, read_back
from bitdial.quantization.program import QParams, QuantizedLayer
from bitdial.quantization.weights import INT32_LIMIT, low_integers, read_back_weights

DIRECT, LOWERS, UNPACKS = "direct", "lowers", "unpacks"
NIBBLE = 7  # largest low weight of four bits
BLOCK_ROWS = 16


@dataclass
class PackedLayer:
    """One layer ready to be written.

    kind: "direct" (rows are used as stored), "lowers" (8-bit rows, low groups made at run time) or "unpacks" (packed rows).
    weight: int8 [rows * stored_row]. group_*: per group over all convolution groups. low: uint8 [ratios, groups], None if no
    exported ratio has low groups. weight_shift: uint8, one row for every `shift_rows` outputs; None if not needed.
    low_weight: int8 [rows * low_row], of the groups that are low at some exported ratio, at two values a byte where they fit;
    group_low_offset: of the groups in such a row. None: low weights are derived, or are in `weight`.
    """

    kind: str
    weight: npt.NDArray[np.int8]
    row: int
    stored_row: int
    group_first: list[int]
    group_width: list[int]
    group_offset: list[int]
    group_length: list[int]
    group_shift: list[int]
    low: npt.NDArray[np.uint8] | None
    weight_shift: npt.NDArray[np.uint8] | None
    shift_rows: int
    bias: npt.NDArray[np.int32]
    depthwise: bool
    conv_groups: int
    low_weight: npt.NDArray[np.int8] | None = None
    low_row: int = 0
    low_nibbles: bool = False
    group_low_offset: list[int] = field(default_factory=list)
    fours: bool = False  # low operands of four bits, which ARM's SIMD multiplies four at an instruction


def pack_layer(layer: QuantizedLayer, activation: QParams, ratios: Sequence[int]) -> PackedLayer:
    """A layer at the exported ratio indices. Raises ExportError for shifts or sums outside what the C code holds."""
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)  # [O, I, taps]
    outputs, local, taps = weight.shape
    low = layer.low[list(ratios)]
    bias = np.ascontiguousarray(layer.bias[list(ratios)])
    ever = np.asarray(low.any(axis=0))
    any_low = bool(ever.any())
    _check_ranges(layer, activation, low, bias)
    if layer.conv_groups > 1 and local == 1 and not any_low:
        rows = np.ascontiguousarray(weight[:, 0].T).reshape(-1)
        return PackedLayer(DIRECT, rows, 0, 0, [], [], [], [], [], None, None, 1, bias, True, layer.conv_groups)
    bounds = layer.group_bounds
    if not any_low:  # one group per convolution group is as good as many
        bounds = np.arange(layer.conv_groups + 1, dtype=np.int32) * local
    n_local = (len(bounds) - 1) // layer.conv_groups
    first = [int(bounds[g]) - (g // n_local) * local for g in range(len(bounds) - 1)]
    width = [int(w) for w in np.diff(bounds)]
    length = [w * taps for w in width]
    offsets: list[int] = []
    for g in range(len(width)):
        offsets.append(0 if g % n_local == 0 else offsets[-1] + _fours(length[g - 1]))
    row = offsets[-1] + _fours(length[-1])
    # Rows of all convolution groups have one size; their groups may be cut differently.
    row = max(offsets[g] + _fours(length[g]) for g in range(len(width)))
    shift = layer.weight_shift
    fixed = len(ratios) == 1
    values = weight
    if fixed and any_low:
        values = _at_ratio(layer, low[0])
    packed_rows = fixed and any_low and layer.wmax <= NIBBLE and layer.conv_groups == 1
    per_group = outputs // layer.conv_groups
    parts: list[npt.NDArray[Any]] = []
    for cg in range(layer.conv_groups):
        own = slice(cg * per_group, (cg + 1) * per_group)
        runs = []
        for j in range(n_local):
            g = cg * n_local + j
            channels = slice(first[g], first[g] + width[g])
            end = offsets[g + 1] if j + 1 < n_local else row
            source = values[own, channels]
            pack = packed_rows and bool(low[0, g])
            if pack:
                source = low_integers(layer).reshape(weight.shape)[own, channels]
            run = _run(source, end - offsets[g])
            runs.append(_nibbles(run) if pack else run)
        parts.append(np.concatenate(runs, axis=1))
    stored = np.concatenate(parts)
    makes = any_low and (packed_rows or not fixed)
    tied, step = _tied(shift) if makes else (None, 1)
    result = PackedLayer(
        kind=UNPACKS if packed_rows else LOWERS if makes else DIRECT,
        weight=np.ascontiguousarray(stored).reshape(-1),
        row=row,
        stored_row=stored.shape[1],
        group_first=first,
        group_width=width,
        group_offset=offsets,
        group_length=length,
        group_shift=[int(s) for s in layer.activation_shift] if any_low else [0] * len(width),
        low=low.astype(np.uint8) if any_low else None,
        weight_shift=tied,
        shift_rows=step,
        bias=bias,
        depthwise=False,
        conv_groups=layer.conv_groups,
        fours=makes and layer.wmax <= NIBBLE and layer.amax <= (NIBBLE if activation.signed else 15),
    )
    if result.kind == LOWERS and layer.low_weight is not None:
        _store_low(result, layer.low_weight.reshape(weight.shape), ever, layer.wmax <= NIBBLE)
    return result


def _store_low(
    packed: PackedLayer, low_weight: npt.NDArray[np.int8], ever: npt.NDArray[np.bool_], nibbles: bool
) -> None:
    """Add the rows of low weights [O, I, taps] that cannot be derived. ever: bool [groups], low at some exported ratio."""
    per_group, n_local = len(low_weight) // packed.conv_groups, len(ever) // packed.conv_groups
    rows: list[npt.NDArray[np.int8]] = []
    for cg in range(packed.conv_groups):
        runs = [np.zeros((per_group, 0), np.int8)]
        for g in range(cg * n_local, (cg + 1) * n_local):
            packed.group_low_offset.append(sum(r.shape[1] for r in runs))
            if ever[g]:
                first = packed.group_first[g]
                source = low_weight[cg * per_group : (cg + 1) * per_group, first : first + packed.group_width[g]]
                end = packed.group_offset[g + 1] if g + 1 < (cg + 1) * n_local else packed.row
                run = _run(source, end - packed.group_offset[g])  # as long as the 8-bit run that it stands for
                runs.append(_nibbles(run) if nibbles else run)
        rows.append(np.concatenate(runs, axis=1))
    packed.low_row = max(r.shape[1] for r in rows)
    packed.low_nibbles = nibbles
    packed.low_weight = np.concatenate([np.pad(r, ((0, 0), (0, packed.low_row - r.shape[1]))) for r in rows]).reshape(-1)


def extract_table(shift: int, limit: int, signed: bool) -> npt.NDArray[np.uint8]:
    """uint8 [256]: stored byte of an 8-bit activation -> stored byte of what it becomes at low precision."""
    stored = np.arange(256)
    values = np.where(stored > 127, stored - 256, stored) if signed else stored
    return (read_back(values, shift, limit, signed).astype(np.int32) & 255).astype(np.uint8)


def weight_tables(top_shift: int, limit: int) -> npt.NDArray[np.int8]:
    """int8 [top_shift + 1, 256]: stored byte of an 8-bit weight -> its low value at a shift."""
    stored = np.arange(256)
    values = np.where(stored > 127, stored - 256, stored)
    return extract(values[None], np.arange(top_shift + 1)[:, None], limit)


def _at_ratio(layer: QuantizedLayer, low: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """[O, I, taps]: the weights with the low groups read back."""
    assert layer.weight is not None
    result = layer.weight.reshape(*layer.weight.shape[:2], -1).copy()
    if low.any():
        back = read_back_weights(layer).reshape(result.shape)
        for g in np.flatnonzero(low):
            block = _block(layer, int(g))
            result[block] = back[block]
    return result


def _block(layer: QuantizedLayer, group: int) -> tuple[slice, slice]:
    """(outputs, input channels) of a group's weights."""
    assert layer.weight is not None
    conv_group = group // layer.weight_shift.shape[1]
    rows, local = len(layer.weight) // layer.conv_groups, layer.weight.shape[1]
    a, b = (int(v) - conv_group * local for v in layer.group_bounds[group : group + 2])
    return slice(conv_group * rows, (conv_group + 1) * rows), slice(a, b)


def _check_ranges(
    layer: QuantizedLayer, activation: QParams, low: npt.NDArray[np.bool_], bias: npt.NDArray[np.int32]
) -> None:
    """Low values must fit a byte when read back, and sums int32 at every exported ratio."""
    ever = np.flatnonzero(low.any(axis=0))
    if len(ever) and layer.low_weight is not None and int(np.abs(layer.low_weight).max(initial=0)) > layer.wmax:
        raise ExportError(f"layer '{layer.name}': a low weight is larger than {layer.wmax}; quantize the network again")
    for g in ever:
        shift = int(layer.activation_shift[g])
        top = int(read_back([activation.qmax], shift, layer.amax, activation.signed)[0])
        own, channels = _block(layer, int(g))
        shifts = layer.weight_shift[own, g % layer.weight_shift.shape[1]].astype(np.int64)
        if layer.low_weight is None:
            reach = read_back([127], shifts, layer.wmax)
        else:
            largest = np.abs(layer.low_weight[own, channels].reshape(len(shifts), -1).astype(np.int64)).max(axis=1)
            reach = largest << shifts
        if top > activation.qmax or int(reach.max()) > 127:
            raise ExportError(
                f"layer '{layer.name}': the shifts of group {g} take low values out of eight bits; quantize the network again"
            )
    for index in range(len(low)):
        sums = np.abs(_at_ratio(layer, low[index]).astype(np.int64)).sum(axis=(1, 2))
        top = int((sums * activation.qmax + np.abs(bias[index].astype(np.int64))).max(initial=0))
        # Targets that store unsigned activations minus 128 add 128 times the row's sum: up to 256 times it on the way.
        top = max(top, 256 * int(sums.max(initial=0)))
        if top > INT32_LIMIT:
            raise ExportError(
                f"layer '{layer.name}': its sums can leave int32 (bound {top}); keep it in float with ignored=('{layer.name}',)"
            )


def _tied(shift: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], int]:
    """(rows of shifts, outputs per row): one row where all are equal, or one per block of 16, or one per output."""
    for step in (len(shift), BLOCK_ROWS):
        if all((shift[a : a + step] == shift[a]).all() for a in range(0, len(shift), step)):
            return np.ascontiguousarray(shift[::step]), step
    return shift, 1


def _run(source: npt.NDArray[np.int8], size: int) -> npt.NDArray[np.int8]:
    """[rows, channels, taps] -> [rows, size]: a group's part of the rows, filled up with zeros."""
    rows = source.transpose(0, 2, 1).reshape(len(source), -1)
    return np.pad(rows, ((0, 0), (0, size - rows.shape[1])))


def _nibbles(run: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """[rows, n] values -8..7 -> [rows, n / 2] bytes of value + 8, the first of each pair in the low nibble."""
    offset = (run.astype(np.int16) + 8).astype(np.uint8)
    return (offset[:, 0::2] | (offset[:, 1::2] << 4)).astype(np.uint8).view(np.int8)


def _fours(n: int) -> int:
    return -(-n // 4) * 4
