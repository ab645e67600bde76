"""Launches of convolutions and linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitdial.engines.cuda.arguments import ConvArgs, Epilogue, Launch, Span
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.packing import COLUMNS, STEP_BYTES, PackedLayer
from bitdial.quantization.instructions import Window

ROWS = 64  # positions of a block
WIDE = 128  # outputs of a block of the wide kernels
# What a step of a wide block takes of one that is half as wide, by the counts of benchmarks/gpu_model.py: nearly twice as much
# where 8-bit products bound both (1.65 to 2, by card), less where loads and extraction do, which it shares (1.36 to 1.53).
WIDE_BYTES, WIDE_LOW = 1.8, 1.45


@dataclass(frozen=True)
class Plane:
    """Bytes, channels last: height x width positions of `pitch` bytes each. sample: bytes from one sample to the next."""

    height: int
    width: int
    pitch: int
    sample: int


class Product:
    """A packed layer with its tables among an engine's constants. Raises nothing; `launch` is called once per ratio and batch."""

    def __init__(self, packed: PackedLayer, window: Window, pool: Pool) -> None:
        self.packed, self.window, self.pool = packed, window, pool
        self.weights, self.shifts = pool.add(packed.weights), pool.add(packed.shifts)
        self._known: dict[bytes, int] = {}
        self.steps = [self._table(v) for v in packed.steps]
        self.places = [self._table(v) for v in packed.places]
        self.starts = [self._table(v) for v in packed.starts]

    def _table(self, values: Any) -> int:
        """Ratios with the same low groups share their tables."""
        key = str(values.shape).encode() + values.tobytes()
        if key not in self._known:
            self._known[key] = self.pool.add(values)
        return self._known[key]

    def columns(self, ratio: int, rows: int, multiprocessors: int) -> int:
        """Outputs of a block: those of which the multiprocessors, all busy until the last round, are done sooner."""
        packed, count = self.packed, max(1, multiprocessors)
        if packed.padded % WIDE or packed.elements:
            return COLUMNS
        wide = -(-rows // ROWS) * (packed.padded // WIDE) * (len(packed.starts[ratio]) - 1)
        low = float(np.mean(packed.steps[ratio][:, 0] != STEP_BYTES))
        cost = low * WIDE_LOW + (1 - low) * WIDE_BYTES
        return WIDE if -(-wide // count) * cost < -(-2 * wide // count) else COLUMNS

    def launch(
        self, ratio: int, samples: int, x: Span, x_plane: Plane, out_size: tuple[int, int], out: Epilogue, multiprocessors: int
    ) -> Launch:
        packed, at = self.packed, self.pool.at
        _, stride, pad, _ = self.window.pairs
        rows = samples * out_size[0] * out_size[1]
        groups = len(packed.starts[ratio]) - 1
        columns = self.columns(ratio, rows, multiprocessors)
        args = ConvArgs(
            x=x, weights=at(self.weights), steps=at(self.steps[ratio]), places=at(self.places[ratio]),
            starts=at(self.starts[ratio]), shifts=at(self.shifts), out=out, x_sample=x_plane.sample, rows=rows,
            height=x_plane.height, width=x_plane.width, pitch=x_plane.pitch, out_height=out_size[0], out_width=out_size[1],
            stride_y=stride[0], stride_x=stride[1], pad_y=pad[0], pad_x=pad[1], outputs=packed.outputs, padded=packed.padded,
            least=packed.limits[0], most=packed.limits[1],
        )  # fmt: skip
        kernel = packed.kernel if columns == COLUMNS else packed.kernel.replace("conv", "conv_wide")
        return Launch(kernel, (-(-rows // ROWS), packed.padded // columns, groups), args)


def depthwise_weights(weight: Any) -> Any:
    """int8 [taps, outputs] of a depthwise layer's [outputs, 1, kh, kw]."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)
