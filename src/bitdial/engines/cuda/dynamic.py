"""Dynamic extraction: the launches in front of a layer that lower its input by each sample's own shifts.

The layer then takes 8-bit products of what was read back from low precision, with weights read back too: exact, since what is
read back fits in a byte again, but without any gain in speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from bitdial.engines.cuda.arguments import Launch, LowerArgs, Span
from bitdial.engines.cuda.device import Pool
from bitdial.engines.cuda.elementwise import blocks
from bitdial.engines.cuda.values import Buffer, Frame, Values
from bitdial.engines.memory import Unsupported
from bitdial.quantization.instructions import Contract
from bitdial.quantization.layer import QuantizedLayer


class Lowering:
    """Of one layer, with its tables among an engine's constants. A sample has `positions` of `pitch` bytes."""

    def __init__(self, layer: QuantizedLayer, signed: bool, positions: int, pitch: int, pool: Pool) -> None:
        self.layer, self.signed, self.positions, self.pitch, self.pool = layer, signed, positions, pitch, pool
        groups = layer.channel_groups().astype(np.int32)
        self.bounds = pool.add(np.asarray(layer.group_bounds, np.int32))
        self.groups = [pool.add(np.where(low[groups], groups, np.int32(-1))) for low in layer.low]

    def low_at(self, ratio: int) -> bool:
        return bool(self.layer.low[ratio].any())

    def launches(self, ratio: int, samples: int, x: Span, shifts: Span, y: Span) -> tuple[Launch, Launch]:
        """(the shifts, uint8 [samples, groups]; the lowered input)."""
        layer, at = self.layer, self.pool.at
        args = LowerArgs(
            x=x, y=y, shifts=shifts, bounds=at(self.bounds), groups=at(self.groups[ratio]), x_sample=self.positions * self.pitch,
            samples=samples, positions=self.positions, pitch=self.pitch, channels=int(layer.group_bounds[-1]),
            n_groups=layer.n_groups, x_signed=int(self.signed), amax=layer.amax, bits=layer.amax.bit_length(),
        )  # fmt: skip
        return (
            Launch("shift_kernel", (samples * layer.n_groups, 1, 1), args),
            Launch("lower_kernel", blocks(samples * self.positions * args.channels), args),
        )


def lowered(c: Values, step: Contract, source: str, x: Buffer) -> tuple[str, Callable[[int], bool]]:
    """(the lowered input of a layer, made by two steps; whether the layer reads it at a ratio)."""
    axis = c.batch_axes[source]
    if axis is None or axis.outer != 1:
        raise Unsupported("it cannot be told which values of its input belong to one sample (dynamic extraction)")
    layer = step.layer
    name, shifts = f"{step.name}:lowered", f"{step.name}:shifts"
    c.buffers[name] = dataclasses.replace(x)
    c.buffers[shifts] = Buffer(1, 1, layer.n_groups, False, False, False, pitch=layer.n_groups, shape=(1, layer.n_groups))
    if c.dry:
        return name, lambda ratio: True
    lowering = Lowering(layer, x.signed, x.factor * x.places, x.pitch, c.pool)

    def launch(frame: Frame, which: int) -> Launch | None:
        if not lowering.low_at(frame.ratio):
            return None
        spans = (frame.span(v) for v in (source, shifts, name))
        return lowering.launches(frame.ratio, frame.batch, *spans)[which]

    c.add(name, (source,), lambda frame: launch(frame, 0), shifts)
    c.add(name, (source, shifts), lambda frame: launch(frame, 1))
    return name, lowering.low_at
