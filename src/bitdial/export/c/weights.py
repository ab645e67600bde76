"""The arrays of one conv or linear layer in the order that the exported inner loops read them.

A row holds the groups of channels one after another, each as [kernel_h][kernel_w][channels of the group], filled up with
zeros to a multiple of four bytes: a low group is one run, and ARM's SIMD reads it by words. With one fixed ratio the rows
are those of that ratio: low groups read back from low precision, or packed at two values a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ExportError
from bitdial.quantization.effective_bits import extract, read_back
from bitdial.quantization.program import QParams, QuantizedLayer
from bitdial.quantization.weights import INT32_LIMIT

DIRECT, LOWERS, UNPACKS = "direct", "lowers", "unpacks"
NIBBLE = 7  # largest low weight of four bits
BLOCK_ROWS = 16


@dataclass
class PackedLayer:
    """One layer ready to be written.

    kind: "direct" (rows are used as stored), "lowers" (8-bit rows, low groups made at run time) or "unpacks" (packed rows).
    weight: int8 [rows * stored_row]. group_*: per group over all convolution groups. low: uint8 [ratios, groups], None if no
    exported ratio has low groups. weight_shift: uint8, one row for every `shift_rows` outputs; None if not needed.
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
    fours: bool = False  # low operands of four bits, which ARM's SIMD multiplies four at an instruction


def pack_layer(layer: QuantizedLayer, activation: QParams, ratios: Sequence[int], float_output: bool) -> PackedLayer:
    """A layer at the exported ratio indices. Raises ExportError for shifts or sums outside what the C code holds."""
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)  # [O, I, taps]
    outputs, local, taps = weight.shape
    low = layer.low[list(ratios)]
    bias = np.ascontiguousarray(layer.bias[list(ratios)])
    any_low = bool(low.any())
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
        values = _at_ratio(layer, weight, low[0])
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
                source = extract(weight[own, channels], shift[own, j, None, None], layer.wmax)
            run = np.zeros((per_group, end - offsets[g]), np.int8)
            run[:, : length[g]] = source.transpose(0, 2, 1).reshape(per_group, -1)
            runs.append(_nibbles(run) if pack else run)
        parts.append(np.concatenate(runs, axis=1))
    stored = np.concatenate(parts)
    makes = any_low and (packed_rows or not fixed)
    tied, step = _tied(shift) if makes else (None, 1)
    return PackedLayer(
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


def _at_ratio(layer: QuantizedLayer, weight: npt.NDArray[np.int8], low: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """[O, I, taps]: the weights with the low groups read back."""
    result = weight.copy()
    n_local = layer.weight_shift.shape[1]
    rows, local = len(weight) // layer.conv_groups, weight.shape[1]
    for g in np.flatnonzero(low):
        own = slice((g // n_local) * rows, (g // n_local + 1) * rows)
        a, b = (int(v) - (g // n_local) * local for v in layer.group_bounds[g : g + 2])
        shift = layer.weight_shift[own, g % n_local, None, None]
        result[own, a:b] = read_back(weight[own, a:b], shift, layer.wmax)
    return result


def _check_ranges(
    layer: QuantizedLayer, activation: QParams, low: npt.NDArray[np.bool_], bias: npt.NDArray[np.int32]
) -> None:
    """Low values must fit a byte when read back, and sums int32 at every exported ratio."""
    assert layer.weight is not None
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)
    ever = low.any(axis=0)
    n_local = max(1, layer.weight_shift.shape[1])
    for g in np.flatnonzero(ever):
        shift = int(layer.activation_shift[g])
        top = int(read_back([activation.qmax], shift, layer.amax, activation.signed)[0])
        rows = len(weight) // layer.conv_groups
        own = slice((g // n_local) * rows, (g // n_local + 1) * rows)
        reach = read_back([127], layer.weight_shift[own, g % n_local].astype(np.int64), layer.wmax)
        if top > activation.qmax or int(reach.max()) > 127:
            raise ExportError(
                f"layer '{layer.name}': the shifts of group {g} take low values out of eight bits; quantize the network again"
            )
    for index in range(len(low)):
        sums = np.abs(_at_ratio(layer, weight, low[index]).astype(np.int64)).reshape(len(weight), -1).sum(axis=1)
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


def _nibbles(run: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """[rows, n] values -8..7 -> [rows, n / 2] bytes of value + 8, the first of each pair in the low nibble."""
    offset = (run.astype(np.int16) + 8).astype(np.uint8)
    return (offset[:, 0::2] | (offset[:, 1::2] << 4)).astype(np.uint8).view(np.int8)


def _fours(n: int) -> int:
    return -(-n // 4) * 4
