"""How a layer becomes jobs of the array: chunks of channels in nesting order, tiles of columns, slices of rows. NumPy only.

A chunk is what one activation word holds: up to 2 * rows channels of one group. Low, it takes one pass a tap and column tile; at
8 bits one per started half. Chunks lie in the order in which ratios make their groups low, so that a setting of the dial is
one number: how many chunks from the start are low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitdial.engines.npu.words import MAX_CHUNKS
from bitdial.errors import EngineError
from bitdial.quantization.instructions import Window

ADDRESSES = 1 << 16


@dataclass(frozen=True)
class Design:
    """Size of the unit. words, activations, weights, shifts, sums: entries per bank, as `rtl.npu.Npu` takes them."""

    rows: int = 32
    columns: int = 32
    words: int = 1024
    activations: int = 4096
    weights: int = 8192
    shifts: int = 256
    sums: int = 4096

    def __post_init__(self) -> None:
        if self.rows < 4 or self.columns < 1:
            raise EngineError(f"npu: an array of {self.rows} x {self.columns}: at least 4 rows and 1 column are needed")
        for name in ("activations", "weights", "shifts", "sums"):
            if not 1 <= getattr(self, name) <= ADDRESSES:
                raise EngineError(f"npu: {name} of {getattr(self, name)} entries: 1 to {ADDRESSES} can be addressed")

    @property
    def lanes(self) -> int:
        """Channels of a chunk."""
        return 2 * self.rows

    @property
    def buffer_bytes(self) -> int:
        """All on-chip memories but the instructions."""
        return 2 * self.rows * self.activations + self.columns * (self.weights + self.shifts // 2 + 4 * self.sums)


@dataclass(frozen=True)
class Geometry:
    """A convolution over (height, width); a linear layer over n rows has size (n, 1) and a window of 1."""

    channels: int
    outputs: int
    size: tuple[int, int]
    window: Window
    conv_groups: int = 1

    @classmethod
    def linear(cls, channels: int, outputs: int, rows: int) -> Geometry:
        return cls(channels, outputs, (rows, 1), Window((1, 1), (1, 1), (0, 0), (1, 1)))

    @property
    def out_size(self) -> tuple[int, int]:
        pairs = zip(self.size, *self.window.pairs, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in pairs)
        return height, width

    @property
    def taps(self) -> int:
        return self.window.kernel[0] * self.window.kernel[1]

    @property
    def macs(self) -> int:
        height, width = self.out_size
        return height * width * self.taps * self.channels // self.conv_groups * self.outputs


@dataclass(frozen=True)
class Chunk:
    """channels: start and stop. word: its place inside a pixel. first_low: the ratio index from which on it is low, None: never.
    halves: 8-bit passes. second: the only half is the second. shift: of activations, where low. group: where it may be low."""

    channels: tuple[int, int]
    word: int
    halves: int
    first_low: int | None = None
    second: bool = False
    shift: int = 0
    group: int = 0

    @property
    def has_low(self) -> bool:
        return self.first_low is not None

    @property
    def tiles(self) -> int:
        """Weight tiles kept for each tap."""
        return self.halves + self.has_low


@dataclass(frozen=True)
class Job:
    """One RUN. out_rows, in_rows, tiles: start and stop. chunks: the table's entries."""

    out_rows: tuple[int, int]
    in_rows: tuple[int, int]
    tiles: tuple[int, int]
    chunks: tuple[Chunk, ...]

    def passes(self, taps: int, low: int) -> int:
        """low: how many chunks are low."""
        per_tile = sum(1 if c.has_low and i < low else c.halves for i, c in enumerate(self.chunks))
        return (self.tiles[1] - self.tiles[0]) * taps * per_tile


@dataclass(frozen=True)
class LayerPlan:
    """words: activation words of a pixel. low: how many chunks are low at each ratio (the LOW word)."""

    name: str
    geometry: Geometry
    words: int
    low: tuple[int, ...]
    jobs: tuple[Job, ...]

    def pixels(self, job: Job) -> int:
        return (job.out_rows[1] - job.out_rows[0]) * self.geometry.out_size[1]


def dense_chunks(
    name: str,
    bounds: npt.NDArray[np.int32],
    low: npt.NDArray[np.bool_],
    shifts: npt.NDArray[np.uint8],
    rows: int,
    pad_groups: bool,
) -> list[Chunk]:
    """Chunks of a layer without convolution groups, in nesting order.

    bounds [n_groups + 1], low [n_ratios, n_groups], shifts [n_groups] as in `QuantizedLayer`. Raises EngineError where low
    groups are not nested, or so small that low passes would gain nothing and `pad_groups` does not allow that.
    """
    lanes = 2 * rows
    if not low.any():
        return _runs(int(bounds[-1]), rows)
    if (low[:-1] & ~low[1:]).any():
        raise EngineError(f"layer '{name}': its low groups are not nested, so that no one number says which; quantize it nested")
    sizes = np.diff(bounds)
    size = int(sizes.max())
    if len(sizes) > 1 and not pad_groups and size <= rows:
        verdict = "gain nothing" if size == rows else "are slower than 8 bits"
        raise EngineError(
            f"layer '{name}': groups of {size} channels on {rows} rows {verdict}, as a low pass takes {lanes} channels of one "
            f"group; quantize with group_size={lanes}, use at most {max(4, size // 2)} rows, or allow padding (pad_groups)"
        )
    first = np.where(low.any(axis=0), low.argmax(axis=0), len(low))
    chunks: list[Chunk] = []
    for g in np.argsort(first, kind="stable"):
        begin, end = int(bounds[g]), int(bounds[g + 1])
        for start in range(begin, end, lanes):
            stop = min(end, start + lanes)
            once = int(first[g]) if first[g] < len(low) else None
            chunks.append(Chunk((start, stop), len(chunks), -(-(stop - start) // rows), once, False, int(shifts[g]), int(g)))
    return chunks


def _runs(channels: int, rows: int) -> list[Chunk]:
    lanes = 2 * rows
    spans = [(s, min(channels, s + lanes)) for s in range(0, channels, lanes)]
    return [Chunk(span, i, -(-(span[1] - span[0]) // rows)) for i, span in enumerate(spans)]


def _reached(geometry: Geometry, columns: range, rows: int) -> tuple[Chunk, ...]:
    """Of a grouped convolution: the chunks that output channels `columns` read, halves that they do not read left out."""
    per_in, per_out = geometry.channels // geometry.conv_groups, geometry.outputs // geometry.conv_groups
    start, stop = columns.start // per_out * per_in, (columns.stop - 1) // per_out * per_in + per_in
    result = []
    for chunk in _runs(geometry.channels, rows):
        begin, middle, end = chunk.channels[0], chunk.channels[0] + rows, chunk.channels[1]
        halves = [begin < stop and start < min(middle, end), middle < end and middle < stop and start < end]
        if any(halves):
            result.append(replace(chunk, halves=sum(halves), second=halves == [False, True]))
    return tuple(result)


def plan_layer(name: str, geometry: Geometry, chunks: Sequence[Chunk], design: Design, ratios: int) -> LayerPlan:
    """Jobs that fit the design's buffers. chunks: of a layer without convolution groups (see `dense_chunks`).

    Raises EngineError, naming the layer and the buffer, where not even one row of pixels or one column tile fits.
    """
    height, width = geometry.out_size
    if height < 1 or width < 1:
        raise EngineError(f"layer '{name}': its window does not fit its input of {geometry.size}")
    tiles = -(-geometry.outputs // design.columns)
    grouped = geometry.conv_groups > 1
    words = -(-geometry.channels // design.lanes) if grouped else len(chunks)

    def too_large(what: str, needed: int, there: int) -> EngineError:
        return EngineError(f"layer '{name}': {what} needs {needed} entries a bank, the NPU has {there}; use a larger Design")

    rows = next(
        (n for n in range(min(height, design.sums // width), 0, -1) if _fits(geometry, n, words, design.activations)), 0
    )
    if not rows:
        if width > design.sums:
            raise too_large("one row of its outputs", width, design.sums)
        kernel, _, _, dilation = geometry.window.pairs
        needed = min(geometry.size[0], (kernel[0] - 1) * dilation[0] + 1) * geometry.size[1] * words
        raise too_large("the input of one row of its outputs", needed, design.activations)
    jobs = []
    slices = [(s, min(height, s + rows)) for s in range(0, height, rows)]
    groups_of_tiles: list[tuple[tuple[int, int], tuple[Chunk, ...]]] = []
    if grouped:
        for t in range(tiles):
            columns = range(t * design.columns, min(geometry.outputs, (t + 1) * design.columns))
            groups_of_tiles.append(((t, t + 1), _reached(geometry, columns, design.rows)))
        per_tile = max(design.rows * geometry.taps * sum(c.tiles for c in own) for _, own in groups_of_tiles)
        entries = max(len(own) for _, own in groups_of_tiles)
        at_once = 1
    else:
        entries, per_tile = len(chunks), design.rows * geometry.taps * sum(c.tiles for c in chunks)
        at_once = min(tiles, design.sums // (rows * width), design.weights // per_tile, design.shifts // entries)
        groups_of_tiles = [
            ((t, min(tiles, t + at_once)), tuple(chunks)) for t in range(0, tiles, max(1, at_once))
        ]
    if entries > min(MAX_CHUNKS, design.shifts):
        raise too_large(f"its table of {entries} chunks", entries, min(MAX_CHUNKS, design.shifts))
    if at_once < 1 or per_tile > design.weights:
        raise too_large("one column tile of its weights", per_tile, design.weights)
    for span, own in groups_of_tiles:
        for out_rows in slices:
            jobs.append(Job(out_rows, _input_rows(geometry, out_rows), span, own))
    first = np.array([ratios if c.first_low is None else c.first_low for c in chunks])
    low = (0,) * ratios if grouped else tuple(int((first <= r).sum()) for r in range(ratios))
    return LayerPlan(name, geometry, words, low, tuple(jobs))


def _input_rows(geometry: Geometry, out_rows: tuple[int, int]) -> tuple[int, int]:
    kernel, stride, padding, dilation = geometry.window.pairs
    first = out_rows[0] * stride[0] - padding[0]
    last = (out_rows[1] - 1) * stride[0] - padding[0] + (kernel[0] - 1) * dilation[0]
    start = min(max(0, first), geometry.size[0] - 1)
    return start, max(start + 1, min(geometry.size[0], last + 1))


def _fits(geometry: Geometry, rows: int, words: int, there: int) -> bool:
    """Whether the input of every slice of so many output rows fits."""
    height = geometry.out_size[0]
    most = 0
    for start in range(0, height, rows):
        begin, end = _input_rows(geometry, (start, min(height, start + rows)))
        most = max(most, end - begin)
    return most * geometry.size[1] * words <= there
