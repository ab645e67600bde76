"""How values lie in memory in compiled forms of a program: shared by the CPU engine and by exporters. NumPy only.

Values of rank 4 lie channels last (h, w, c), all others row by row with the last axis as channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.graph.ir import BatchDim, TensorType, Values
from bitdial.quantization.instructions import Contract, Float, SumPool, Window

COPY_AXES = 5  # loops of a copy step, the samples' not counted
Offsets = npt.NDArray[np.int64]


class Unsupported(Exception):
    """An instruction has no compiled form; the text says why."""


@dataclass
class Buffer:
    """One sample of a value. channels_first: its logical order has the channels on axis 1. factor: samples in memory per sample
    of the batch. halo: margin around the two spatial axes that the convolutions reading it need."""

    h: int
    w: int
    c: int
    channels_first: bool
    signed: bool
    is_float: bool
    factor: int = 1
    halo: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        return self.h * self.w * self.c

    @property
    def size(self) -> int:
        """Bytes, without the halo."""
        return self.count * (4 if self.is_float else 1)

    @property
    def planes(self) -> tuple[int, int]:
        """(positions, channels) of the change between the network's order and channels last."""
        return (self.h * self.w, self.c) if self.channels_first else (1, self.count)


def physical(type_: TensorType) -> tuple[int, int, int, int, bool]:
    """(factor, h, w, c, channels_first) of a value. Raises Unsupported if the first axis is not the batch."""
    shape = type_.shape
    if not shape or not isinstance(shape[0], BatchDim) or any(isinstance(d, BatchDim) for d in shape[1:]):
        raise Unsupported("its first axis is not the batch")
    rest = sample_shape(type_)
    if len(rest) == 3:
        return shape[0].factor, rest[1], rest[2], rest[0], True
    if not rest:
        return shape[0].factor, 1, 1, 1, False
    return shape[0].factor, 1, math.prod(rest[:-1]), rest[-1], False


def sample_shape(type_: TensorType) -> list[int]:
    """The shape without its first axis, which is the batch."""
    return [int(d) for d in type_.shape[1:]]  # type: ignore[arg-type]


def check_contract(step: Contract, x: Buffer, graph: Values) -> None:
    """Raise Unsupported for layers over other than two spatial axes, linear layers that contract the last of four, and residuals
    that broadcast."""
    if step.window is not None and len(step.window.kernel) != 2:
        raise Unsupported(f"convolution over {len(step.window.kernel)} axes")
    if step.window is None and x.channels_first:
        raise Unsupported("linear layer over the last of four axes")
    if step.residual is not None and graph.types[step.residual].shape != graph.types[step.name].shape:
        raise Unsupported("its residual is broadcast")


UNIT = Window((1, 1), (1, 1), (0, 0), (1, 1))


def sum_window(step: SumPool, x: Buffer, rank: int) -> Window:
    """The window of a pool; for a mean, one over the whole of its axes. rank: of the input, with the batch."""
    if step.axes is not None:
        if (rank, step.axes) not in ((4, (2, 3)), (3, (1,))):
            raise Unsupported(f"mean over axes {list(step.axes)} of {rank}")
        return Window((x.h, x.w), (1, 1), (0, 0), (1, 1))
    assert step.window is not None
    return plane_window(step.window)


def plane_window(window: Window) -> Window:
    """The window itself if it is over two axes."""
    if len(window.kernel) != 2:
        raise Unsupported("pooling over one or three axes")
    return window


def offsets_of(buffer: Buffer) -> Offsets:
    """Byte offset from the tensor's origin of every element of one sample, in logical order."""
    pitch_x = buffer.c
    pitch_y = (buffer.w + 2 * buffer.halo[1]) * buffer.c
    if buffer.channels_first:
        c, h, w = np.ogrid[: buffer.c, : buffer.h, : buffer.w]
        offsets: Offsets = (h * pitch_y + w * pitch_x + c).reshape(-1).astype(np.int64)
        return offsets
    return np.arange(buffer.w * buffer.c, dtype=np.int64)


def copy_loops(
    flat: Offsets, start: Offsets, end: Offsets, in_shape: list[int], out_shape: list[int]
) -> tuple[list[int], list[int], list[int], int, int] | None:
    """A move as nested loops with fixed strides: (extents, source strides, target strides, source offset, target offset),
    or None if it has no such form. flat: index of the source element per target element, -1 where it pads."""
    if not flat.size or flat.min() < 0:
        return None
    forms = [(out_shape, start[flat], end)]
    order = np.argsort(flat, kind="stable")
    if np.array_equal(flat[order], np.arange(start.size)):  # nothing dropped or repeated: the input's axes do as well
        forms.append((in_shape, start, end[order]))
    for shape, source, target in forms:
        strides = _strides(source.reshape(shape)), _strides(target.reshape(shape))
        if len(shape) <= COPY_AXES and strides[0] is not None and strides[1] is not None:
            return shape, strides[0], strides[1], int(source[0]), int(target[0])
    return None


def _strides(offsets: Offsets) -> list[int] | None:
    """The step along every axis; None if one is not the same positive number everywhere. 0 along axes of one element."""
    strides = []
    for axis in range(offsets.ndim):
        steps = np.diff(offsets, axis=axis)
        step = int(steps.flat[0]) if steps.size else 0
        if steps.size and (step <= 0 or (steps != step).any()):
            return None
        strides.append(step)
    return strides


def arguments(step: Float) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an aten operator: names of values, and numbers. Raises Unsupported for others' kinds of template."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            if "value" in value:
                return step.node.inputs[value["value"]]
            if "dtype" in value:
                return str(value["dtype"])
            if "float" in value:
                return float(value["float"])
            raise Unsupported("its arguments depend on the batch")
        return value

    return [plain(v) for v in step.node.attrs["args"]], {k: plain(v) for k, v in step.node.attrs["kwargs"].items()}


def clamp_limits(step: Float) -> tuple[float, float]:
    """Limits of aten's clamp, clamp_min and clamp_max; infinite where there is none. Raises Unsupported where they are values."""
    (_, *limits), kwargs = arguments(step)
    lo, hi = [*limits, None, None][:2]
    lo, hi = kwargs.get("min", lo), kwargs.get("max", hi)
    if step.operation == "aten.clamp_max.default":
        lo, hi = None, lo if hi is None else hi
    if isinstance(lo, str) or isinstance(hi, str):
        raise Unsupported("its limits are values")
    return -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)


def common_type(found: Sequence[str]) -> str:
    """The type that operands of these types are compared or chosen in. Raises Unsupported where none of them is known."""
    for dtype in ("float32", "int64", "int32", "bool"):
        if dtype in found:
            return "int64" if dtype == "int32" else dtype
    raise Unsupported(f"it reads {found[0]}")
