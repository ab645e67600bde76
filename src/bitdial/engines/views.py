"""Movement operators as views: where the elements of a result lie in the memory of the value that they come from.

A view is of one sample of the batch: samples follow each other in memory, whichever axis of a value carries the batch, and that
axis has here the size that it has for a batch of one. Movement operators on views are views, as long as no element is repeated
out of order or padded; what is not becomes an index of units (`unit_index`), the longest runs that stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.memory import Unsupported
from bitdial.graph.ir import BatchDim, Node, TensorType

Axis = tuple[tuple[int, int], ...]  # (extent, stride in elements), outermost first, without extents of 1
LONGEST = 8192  # elements of a merged innermost axis: longer ones leave nothing to share between threads


def sizes_of(type_: TensorType) -> tuple[list[int], int | None]:
    """(shape for a batch of one, the axis that carries the batch). Raises Unsupported where several do."""
    places = [i for i, d in enumerate(type_.shape) if isinstance(d, BatchDim)]
    if len(places) > 1:
        raise Unsupported("two axes carry the batch")
    sizes = [d.factor if isinstance(d, BatchDim) else int(d) for d in type_.shape]
    return sizes, places[0] if places else None


@dataclass(frozen=True)
class View:
    """axes: one per axis of the value."""

    offset: int
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> list[int]:
        return [size_of(axis) for axis in self.axes]

    @property
    def flat(self) -> list[tuple[int, int]]:
        return [part for axis in self.axes for part in axis]


def size_of(axis: Axis) -> int:
    return math.prod(extent for extent, _ in axis)


def dense(shape: Sequence[int]) -> View:
    """A value in its own order."""
    axes: list[Axis] = []
    stride = 1
    for size in reversed(shape):
        axes.append(((size, stride),) if size != 1 else ())
        stride *= size
    return View(0, tuple(reversed(axes)))


def moved_view(view: View, node: Node) -> View | None:
    """What a movement operator makes of a view; None if it is none. The operator moves nothing between samples."""
    a = node.attrs
    axes = list(view.axes)
    if node.op == "reshape":
        return _reshaped(view, shape_of(a["shape"]))
    if node.op == "permute":
        return replace(view, axes=tuple(axes[int(i)] for i in a["axes"]))
    if node.op == "expand":
        shape = shape_of(a["shape"])
        grown = [()] * (len(shape) - len(axes)) + axes
        return replace(view, axes=tuple(
            ((size, 0),) if size_of(axis) == 1 and size != 1 else axis for axis, size in zip(grown, shape, strict=True)
        ))  # fmt: skip
    if node.op not in ("slice", "select"):
        return None
    place = int(a["axis"]) % len(axes)
    axis = axes[place]
    if node.op == "select":
        offset = view.offset + _offset_in(axis, int(a["index"]) % size_of(axis))
        return View(offset, tuple(axes[:place] + axes[place + 1 :]))
    places = range(size_of(axis))[int(a["start"]) : int(a["stop"]) : int(a["step"])]
    if len(places) == size_of(axis):
        return view
    if len(axis) != 1 or not len(places):
        return None
    stride = axis[0][1]
    axes[place] = ((len(places), stride * places.step),) if len(places) != 1 else ()
    return View(view.offset + stride * places.start, tuple(axes))


def element_offsets(view: View) -> npt.NDArray[np.int64]:
    """The place of every element, in the value's order."""
    offsets: npt.NDArray[np.int64] = np.zeros((), np.int64)
    for axis in view.axes:
        for extent, stride in axis:
            offsets = offsets[..., None] + np.arange(extent, dtype=np.int64) * stride
    return offsets.reshape(-1) + view.offset


def shape_of(shape: Sequence[Any]) -> list[int]:
    """An operator's shape attribute for a batch of one."""
    return [int(d[1]) if isinstance(d, (list, tuple)) else int(d) for d in shape]


def _offset_in(axis: Axis, index: int) -> int:
    offset = 0
    for extent, stride in reversed(axis):
        offset += index % extent * stride
        index //= extent
    return offset


def _reshaped(view: View, shape: list[int]) -> View | None:
    parts = view.flat
    axes: list[Axis] = []
    for size in reversed(shape):
        axis: list[tuple[int, int]] = []
        left = size
        while left > 1:
            if not parts:
                return None
            extent, stride = parts.pop()
            if left % extent == 0:
                axis.insert(0, (extent, stride))
                left //= extent
            elif extent % left == 0:
                axis.insert(0, (left, stride))
                parts.append((extent // left, stride * left))
                left = 1
            else:
                return None
        axes.insert(0, tuple(axis))
    return View(view.offset, tuple(axes)) if not parts else None


def common_axes(views: Sequence[View], longest: int = LONGEST) -> tuple[list[int], list[list[int]]] | None:
    """Loops that walk all of the views, which are of one shape: (extents, strides per view), outermost first; None where their
    axes are cut at places that do not go together. Axes that adjoin in every view are one."""
    parts = [list(view.flat) for view in views]
    extents: list[int] = []
    strides: list[list[int]] = [[] for _ in views]
    while any(parts):
        if not all(parts):
            return None
        least = min(p[-1][0] for p in parts)
        if any(p[-1][0] % least for p in parts):
            return None
        step = []
        for p in parts:
            extent, stride = p.pop()
            if extent != least:
                p.append((extent // least, stride * least))
            step.append(stride)
        inner = extents[0] if extents else 0
        adjoins = inner and all(s == inner * own[0] for s, own in zip(step, strides, strict=True))
        if adjoins and (len(extents) > 1 or inner * least <= longest):
            extents[0] *= least
        else:
            extents.insert(0, least)
            for own, s in zip(strides, step, strict=True):
                own.insert(0, s)
    return (extents, strides) if extents else ([1], [[1] for _ in views])


# ---- index of units --------------------------------------------------------------------------------------------------------


def unit_index(shape: Sequence[int], nodes: Sequence[Node], whole: bool) -> tuple[npt.NDArray[np.int64], int]:
    """(for every unit of the result the number of the source's unit, -1 where it pads; elements of a unit).

    shape: of the source, for a batch of one. whole: both lie in their own order, so that units may be longer than one element.
    """
    unit = _unit(list(shape), nodes) if whole and shape else 1
    index = np.arange(math.prod(shape) // unit).reshape(*shape[:-1], shape[-1] // unit) if shape else np.arange(1).reshape(())
    for node in nodes:
        index = _moved(index, node, unit)
    return index.reshape(-1), unit


def _unit(shape: list[int], nodes: Sequence[Node]) -> int:
    unit, rank = shape[-1], len(shape)
    for node in nodes:
        a = node.attrs
        if node.op in ("reshape", "expand"):
            sizes = shape_of(a["shape"])
            unit, rank = math.gcd(unit, sizes[-1] if sizes else 1), len(sizes)
            continue
        axes = [int(v) % rank for v in a.get("axes", [a.get("axis", 0)])]
        if node.op == "permute":
            kept = axes[-1] == rank - 1
        elif node.op == "pad":
            kept = list(a["pads"][-1]) == [0, 0]
        else:
            kept = rank - 1 not in axes
        rank -= node.op == "select"
        if not kept:
            return 1
    return unit


def _moved(index: npt.NDArray[np.int64], node: Node, unit: int) -> npt.NDArray[np.int64]:
    a = node.attrs
    if node.op in ("reshape", "expand"):
        shape = shape_of(a["shape"])
        if shape:
            shape[-1] //= unit
        return index.reshape(shape) if node.op == "reshape" else np.broadcast_to(index, shape)
    if node.op == "permute":
        return np.transpose(index, a["axes"])
    if node.op == "pad":
        return np.pad(index, a["pads"], constant_values=-1)
    axes = [int(v) % index.ndim for v in a.get("axes", [a.get("axis", 0)])]
    if node.op == "roll":
        return np.roll(index, a["shifts"], axis=axes)
    if node.op == "select":
        return np.take(index, [int(a["index"])], axis=axes[0]).squeeze(axes[0])
    if node.op == "gather":
        return np.take(index, np.asarray(a["indices"]), axis=axes[0])
    cut = [slice(None)] * index.ndim
    cut[axes[0]] = slice(int(a["start"]), int(a["stop"]), int(a["step"]))
    return index[tuple(cut)]


def check_samples_stay(node: Node, source: TensorType, result: TensorType) -> None:
    """Raise Unsupported if an operator moves values between samples, or is none of those that move values only."""
    if node.op not in ("reshape", "permute", "expand", "slice", "select", "pad", "roll", "gather"):
        raise Unsupported(f"{node.op} runs in float")
    sizes, place = sizes_of(source)
    shape, target = sizes_of(result)
    a = node.attrs
    if node.op == "pad" and float(a.get("value", 0.0)) != 0.0:
        raise Unsupported("it pads with something other than 0")
    if place is None:
        kept = target is not None
    elif target is None:
        kept = False
    elif node.op == "reshape":
        kept = math.prod(sizes[:place]) == math.prod(shape[:target])
    elif node.op == "permute":
        kept = int(a["axes"][target]) % len(sizes) == place
    elif node.op == "expand":
        kept = len(shape) - target == len(sizes) - place and sizes[place] == shape[target]
    elif node.op == "pad":
        kept = list(a["pads"][place]) == [0, 0]
    else:
        axes = [int(v) % len(sizes) for v in a.get("axes", [a.get("axis", 0)])]
        kept = place not in axes
    if not kept:
        raise Unsupported(f"this {node.op} moves values between samples")


def strided(offsets: npt.NDArray[np.int64]) -> tuple[int, int, npt.NDArray[np.int64]]:
    """(outer stride, inner stride, offset per head) of offsets [heads, outer, inner]. Raises Unsupported if they have none."""
    heads = offsets[:, 0, 0]
    outer = int(offsets[0, 1, 0] - offsets[0, 0, 0]) if offsets.shape[1] > 1 else 0
    inner = int(offsets[0, 0, 1] - offsets[0, 0, 0]) if offsets.shape[2] > 1 else 0
    _, rows, columns = np.ogrid[:1, : offsets.shape[1], : offsets.shape[2]]
    if not np.array_equal(offsets, heads[:, None, None] + rows * outer + columns * inner):
        raise Unsupported("an operand of a product of two activations has no fixed strides")
    return outer, inner, heads
