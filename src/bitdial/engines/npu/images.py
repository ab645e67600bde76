"""What the banks hold: weights, shifts and activations as the array reads them; and sums back. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.npu.plan import Chunk, Design, Job, LayerPlan

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer[Any]]


def weight_image(plan: LayerPlan, job: Job, weight: Integers, low: Integers, design: Design) -> Bytes:
    """uint8 [entries, columns]. weight, low: int8 [O, I / conv_groups, taps]; of `low`, groups that are never low mean nothing.

    Order: column tile, chunk, tap, low tile (if any), halves; rows of a tile from 0. A low byte holds channel r in its low
    nibble and r + rows in the high one.
    """
    rows, tiles = design.rows, []
    for tile in range(*job.tiles):
        for chunk in job.chunks:
            wide = _block(plan, chunk, weight, tile, design)  # [taps, 2 * rows, columns]
            parts = []
            if chunk.has_low:
                nibbles = _block(plan, chunk, low, tile, design) & 15
                parts.append(nibbles[:, :rows] | nibbles[:, rows:] << 4)
            halves = (1,) if chunk.second else range(chunk.halves)
            parts += [wide[:, h * rows : (h + 1) * rows] for h in halves]
            tiles.append(np.stack(parts, axis=1).reshape(-1, design.columns))
    return (np.concatenate(tiles) & 255).astype(np.uint8)


def _block(plan: LayerPlan, chunk: Chunk, weight: Integers, tile: int, design: Design) -> npt.NDArray[np.int16]:
    """int16 [taps, 2 * rows, columns]: weights from a chunk's channels to a tile's outputs, 0 where there are none."""
    g = plan.geometry
    local, per_group = weight.shape[1], g.outputs // g.conv_groups
    outputs = np.arange(tile * design.columns, min(g.outputs, (tile + 1) * design.columns))
    channels = np.arange(*chunk.channels)
    inner = channels[:, None] - outputs // per_group * local  # [channels, outputs]: index inside the output's own channels
    found = weight[outputs, np.clip(inner, 0, local - 1)].astype(np.int16)  # [channels, outputs, taps]
    found[(inner < 0) | (inner >= local)] = 0
    block = np.zeros((g.taps, design.lanes, design.columns), np.int16)
    block[:, : len(channels), : len(outputs)] = found.transpose(2, 0, 1)
    return block


def shift_image(job: Job, weight_shift: npt.NDArray[np.uint8], design: Design) -> Bytes:
    """uint8 [tiles * chunks, columns]: activation shift plus weight shift. weight_shift: [O, groups]."""
    result = np.zeros((job.tiles[1] - job.tiles[0], len(job.chunks), design.columns), np.uint8)
    for t, tile in enumerate(range(*job.tiles)):
        for i, chunk in enumerate(job.chunks):
            if chunk.has_low:
                own = weight_shift[tile * design.columns : (tile + 1) * design.columns, chunk.group]
                result[t, i, : len(own)] = own + chunk.shift
    return result.reshape(-1, design.columns)


def activation_image(plan: LayerPlan, job: Job, x: Integers, design: Design) -> npt.NDArray[np.uint16]:
    """uint16 [pixels * words, rows] of a job's input rows. x: [channels, height, width], integers of 8 bits."""
    rows = x[:, job.in_rows[0] : job.in_rows[1]].transpose(1, 2, 0)
    image = np.zeros((*rows.shape[:2], plan.words, design.lanes), np.uint16)
    for chunk in job.chunks:
        begin, end = chunk.channels
        image[:, :, chunk.word, : end - begin] = rows[:, :, begin:end].astype(np.int16) & 255
    halves = image.reshape(-1, 2, design.rows)
    result: npt.NDArray[np.uint16] = halves[:, 0] | halves[:, 1] << 8
    return result


def place_sums(plan: LayerPlan, job: Job, sums: npt.NDArray[np.int32], into: npt.NDArray[np.int32], design: Design) -> None:
    """Write a job's sums [tiles * pixels, columns] to their place in `into`: int32 [O, out height, out width]."""
    width = plan.geometry.out_size[1]
    tiles = job.tiles[1] - job.tiles[0]
    found = sums.reshape(tiles, -1, width, design.columns).transpose(0, 3, 1, 2).reshape(-1, sums.size // (
        tiles * design.columns * width), width)
    start = job.tiles[0] * design.columns
    stop = min(len(into), start + len(found))
    into[start:stop, job.out_rows[0] : job.out_rows[1]] = found[: stop - start]
