"""Converters of reshapes, and where the batch goes in them.

A file written for one batch size says numbers where the batch belongs. The batch keeps its place in the flat order of the
elements, from which follows which axes of the new shape can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitdial.graph.batch_axis import batch_axes
from bitdial.graph.ir import BatchDim, Dim, Shape
from bitdial.graph.onnx.call import Call
from bitdial.graph.shapes import broadcast


def reshape(c: Call) -> Any:
    x, source = c.inputs[0], c.shape(c.inputs[0])
    entries = c.entries(1)
    if not c.attribute("allowzero", 0):
        entries = [source[i] if d == 0 else d for i, d in enumerate(entries)]
    if sum(d == -1 for d in entries) > 1 or any(not isinstance(d, BatchDim) and d < -1 for d in entries):
        raise c.refuse(f"the shape {entries!s:.120}")
    batch = next((i for i, d in enumerate(source) if isinstance(d, BatchDim)), None)
    named = any(isinstance(d, BatchDim) for d in entries)
    open_ended = c.importer.model.inputs[0].shape[0] is None and -1 in entries
    if batch is None or named or open_ended:
        return c.reshape(x, _literal(c, source, entries))
    return c.reshape(x, _placed(c, x, source, batch, entries))


def _count(shape: Sequence[Any]) -> tuple[int, int]:
    """Elements as (factor, power of the batch size)."""
    factor = math.prod(d.factor if isinstance(d, BatchDim) else d for d in shape)
    return factor, sum(isinstance(d, BatchDim) for d in shape)


def _literal(c: Call, source: Shape, entries: list[Any]) -> Shape:
    """The shape as it is said, -1 being what is left over."""
    if -1 not in entries:
        return tuple(entries)
    (all_, power), (known, used) = _count(source), _count([d for d in entries if d != -1])
    if known == 0 or all_ % known or power - used not in (0, 1):
        raise c.refuse(f"a reshape of {list(map(str, source))} to {list(map(str, entries))}")
    rest: Dim = BatchDim(all_ // known) if power > used else all_ // known
    return tuple(rest if d == -1 else d for d in entries)


def _placed(c: Call, x: Any, source: Shape, batch: int, entries: list[int]) -> Shape:
    """The shape for an open batch size of one that is said for the file's own."""
    size = c.fixed_batch
    concrete = [d.factor * size if isinstance(d, BatchDim) else d for d in source]
    sizes = [int(d) if isinstance(d, int) else 0 for d in _literal(c, tuple(concrete), entries)]
    if math.prod(sizes) != math.prod(concrete):
        raise c.refuse(f"a reshape of {list(map(str, source))} to {entries}")
    folded = source[batch]
    assert isinstance(folded, BatchDim)
    outer, inner = 1, folded.factor
    if folded.factor > 1:
        place = batch_axes(c.importer.graph).get(str(x))
        if place is not None:
            outer, inner = place.outer, place.inner
    before, after = math.prod(concrete[:batch]) * outer, math.prod(concrete[batch + 1 :]) * inner
    choices = []
    for axis, own in enumerate(sizes):
        ahead, behind = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
        if ahead and behind and before % ahead == 0 and after % behind == 0:
            # where several axes can: one of the batch's own size, the one left open, one that is not the last (features), one
            # that begins with the batch
            last = axis == len(sizes) - 1
            rank = (own != size, entries[axis] != -1, last, ahead != before)
            choices.append((rank, axis, before // ahead * (after // behind)))
    if not choices:
        raise c.refuse(
            f"a reshape of {list(map(str, source))} to {entries} has no place for the batch: export the model with a dynamic "
            "batch axis"
        )
    _, axis, factor = min(choices)
    return tuple(BatchDim(factor) if i == axis else d for i, d in enumerate(sizes))


def flatten(c: Call) -> Any:
    x = c.inputs[0]
    axis, dims = int(c.attribute("axis", 1)), c.shape(x)
    axis = axis + len(dims) if axis < 0 else axis
    parts: list[Dim] = []
    for half in (dims[:axis], dims[axis:]):
        factor, power = _count(half)
        parts.append(BatchDim(factor) if power else factor)
    if axis == 0:
        raise c.refuse("it flattens the batch too")
    return c.reshape(x, parts)


def squeeze(c: Call) -> Any:
    x, dims = c.inputs[0], c.shape(c.inputs[0])
    axes = c.axes()
    chosen = [i for i, d in enumerate(dims) if d == 1] if axes is None else [c.axis(a, x) for a in axes]
    for i in chosen:
        if isinstance(dims[i], BatchDim):
            raise c.refuse("it removes the batch axis, as if there were one sample only")
        if dims[i] != 1:
            raise c.refuse(f"axis {i} has the size {dims[i]}")
    return c.reshape(x, [d for i, d in enumerate(dims) if i not in chosen])


def unsqueeze(c: Call) -> Any:
    x, axes = c.inputs[0], c.axes() or []
    chosen = {c.axis(a, x, extra=len(axes)) for a in axes}
    if len(chosen) != len(axes):
        raise c.refuse(f"the axes {axes!s:.80} name one twice")
    rest = iter(c.shape(x))
    return c.reshape(x, [1 if i in chosen else next(rest) for i in range(c.rank(x) + len(chosen))])


def expand(c: Call) -> Any:
    x, source = c.inputs[0], c.shape(c.inputs[0])
    target = c.entries(1)
    shift = len(target) - len(source)
    for i, d in enumerate(source):
        if isinstance(d, BatchDim) and i + shift >= 0 and target[i + shift] in (1, d.factor * c.fixed_batch):
            target[i + shift] = d  # the file's own batch size
    return c.expand(x, broadcast(source, tuple(target)))
