"""Labels: which feature each position of a value holds, for the abstract run behind the layout pass.

Every axis of a value is a product of *sub-axes* (a channel axis made by flattening [C, H, W] has sub-axes C, H, W). A
label array has one dimension per sub-axis: its size, or 1 where the label does not vary. One sub-axis, the *moving*
one, is the axis along which permutations act. Movement operators act on labels exactly as on data; an operation whose
result cannot be written this way returns None, and the caller keeps the channels where they are.

Labels are positive integers ("atoms"), one per output channel of each producer, plus two special ones: `FROZEN`, a
position that nothing moves, and `ZERO`, a padded zero, which may change places with other zeros of its row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
SubAxes = tuple[int, ...]

FROZEN = 0
ZERO = -1


@dataclass(frozen=True)
class Labels:
    """Labels of one value.

    axes    per axis its sub-axes, outer to inner; a size of 1 is the empty product
    ids     int64, one dimension per sub-axis in order: the sub-axis' size, or 1 where labels do not vary
    moving  index of the sub-axis along which permutations act, or None: then nothing moves and `ids` holds one FROZEN
    """

    axes: tuple[SubAxes, ...]
    ids: Ids
    moving: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(sub) for sub in self.axes)

    @property
    def sizes(self) -> SubAxes:
        """Sizes of all sub-axes."""
        return tuple(s for sub in self.axes for s in sub)

    @property
    def moving_axis(self) -> int | None:
        """The axis that holds the moving sub-axis."""
        return None if self.moving is None else self.axis_of(self.moving)

    def axis_of(self, sub_axis: int) -> int:
        for axis, sub in enumerate(self.axes):
            if sub_axis < len(sub):
                return axis
            sub_axis -= len(sub)
        raise IndexError(sub_axis)

    def start(self, axis: int) -> int:
        """Index of the first sub-axis of an axis."""
        return sum(len(sub) for sub in self.axes[:axis])

    def span(self, axis: int) -> range:
        first = self.start(axis)
        return range(first, first + len(self.axes[axis]))

    def varying(self) -> list[int]:
        """Sub-axes along which labels differ, or may."""
        return [i for i, n in enumerate(self.ids.shape) if n > 1 or i == self.moving]

    def rows(self) -> Ids:
        """Labels as [rows, size of the moving sub-axis]."""
        assert self.moving is not None
        return np.moveaxis(self.ids, self.moving, -1).reshape(-1, self.ids.shape[self.moving])

    def with_ids(self, ids: Ids) -> Labels:
        return Labels(self.axes, ids, self.moving)

    def spans_one_axis(self) -> bool:
        """All labels vary inside the axis that moves, so that one reorder of that axis can undo any permutation."""
        return self.moving is not None and {self.axis_of(i) for i in self.varying()} == {self.moving_axis}


def unlabelled(shape: Sequence[int]) -> Labels:
    """A value of this shape in which nothing moves."""
    axes = tuple((n,) if n > 1 else () for n in shape)
    return Labels(axes, np.full([1] * sum(map(len, axes)), FROZEN, np.int64), None)


def along(shape: Sequence[int], axis: int, ids: Ids) -> Labels:
    """A value whose labels are `ids` [shape[axis]] along one axis."""
    base = unlabelled(shape)
    if shape[axis] <= 1:
        return base
    moving = base.start(axis)
    dims = [1] * base.ids.ndim
    dims[moving] = shape[axis]
    return Labels(base.axes, ids.reshape(dims), moving)


def permute(labels: Labels, order: Sequence[int]) -> Labels:
    """New axis i is old axis order[i]."""
    sub_order = [i for axis in order for i in labels.span(axis)]
    moving = None if labels.moving is None else sub_order.index(labels.moving)
    return Labels(tuple(labels.axes[a] for a in order), labels.ids.transpose(sub_order), moving)


def drop_axis(labels: Labels, axis: int, *, keep_size_one: bool = False) -> Labels:
    """Remove an axis along which labels do not vary (or leave it with size 1)."""
    span = labels.span(axis)
    if any(i in span for i in labels.varying()):
        raise ValueError(f"labels vary along axis {axis}")
    moving = labels.moving
    if moving is not None and moving >= span.stop:
        moving -= len(span)
    kept: tuple[SubAxes, ...] = ((),) if keep_size_one else ()
    axes = (*labels.axes[:axis], *kept, *labels.axes[axis + 1 :])
    return Labels(axes, labels.ids.reshape(labels.ids.shape[: span.start] + labels.ids.shape[span.stop :]), moving)


def resize_axis(labels: Labels, axis: int, size: int) -> Labels | None:
    """Give an axis along which labels do not vary another size."""
    span = labels.span(axis)
    if any(i in span for i in labels.varying()):
        return None if math.prod(labels.axes[axis]) != size else labels
    sub: SubAxes = (size,) if size > 1 else ()
    dims = (*labels.ids.shape[: span.start], *[1] * len(sub), *labels.ids.shape[span.stop :])
    moving = labels.moving
    if moving is not None and moving >= span.stop:
        moving += len(sub) - len(span)
    return Labels((*labels.axes[:axis], sub, *labels.axes[axis + 1 :]), labels.ids.reshape(dims), moving)


def expand(labels: Labels, shape: Sequence[int]) -> Labels | None:
    """Broadcast to a larger shape; new axes come first."""
    result: Labels | None = Labels((*((),) * (len(shape) - len(labels.axes)), *labels.axes), labels.ids, labels.moving)
    for axis, size in enumerate(shape):
        if result is not None and result.shape[axis] != size:
            result = resize_axis(result, axis, size)
    return result


def split(labels: Labels, sub_axis: int, factors: SubAxes) -> Labels:
    """Write one sub-axis as a product of `factors`; the innermost factor inherits the movement."""
    axis = labels.axis_of(sub_axis)
    local = sub_axis - labels.start(axis)
    sub = labels.axes[axis]
    dims = factors if labels.ids.shape[sub_axis] > 1 else (1,) * len(factors)
    ids = labels.ids.reshape(labels.ids.shape[:sub_axis] + dims + labels.ids.shape[sub_axis + 1 :])
    moving = labels.moving
    if moving is not None and moving >= sub_axis:
        moving += len(factors) - 1
    return Labels(
        (*labels.axes[:axis], sub[:local] + factors + sub[local + 1 :], *labels.axes[axis + 1 :]), ids, moving
    )


def reshape(labels: Labels, shape: Sequence[int]) -> Labels | None:
    """Reshape as data would be; None where a new axis border falls inside a sub-axis it does not divide."""
    if labels.moving is None:
        return unlabelled(shape)
    sizes, varying = labels.sizes, set(labels.varying())
    new_axes: list[list[int]] = [[] for _ in shape]
    dims: list[int] = []
    moving: int | None = None
    old, new = 0, 0
    targets = [j for j, n in enumerate(shape) if n > 1]
    while old < len(sizes) or new < len(targets):
        # the smallest block of old sub-axes and new axes with the same number of elements
        first_old, first_new = old, new
        a, b = sizes[old], shape[targets[new]]
        old, new = old + 1, new + 1
        while a != b:
            if a < b:
                a, old = a * sizes[old], old + 1
            else:
                b, new = b * shape[targets[new]], new + 1
        block_new = targets[first_new:new]
        if not varying.intersection(range(first_old, old)):
            for j in block_new:
                new_axes[j].append(shape[j])
                dims.append(1)
            continue
        position, left = first_old, sizes[first_old]
        for j in block_new:
            need = shape[j]
            while need > 1:
                if need % left == 0:
                    piece = left
                elif left % need == 0:
                    piece = need
                else:
                    return None
                new_axes[j].append(piece)
                dims.append(piece if position in varying else 1)
                if position == labels.moving:
                    moving = len(dims) - 1
                need, left = need // piece, left // piece
                if left == 1:
                    position += 1
                    left = sizes[position] if position < old else 1
    return Labels(tuple(map(tuple, new_axes)), labels.ids.reshape(dims), moving)


def take(labels: Labels, axis: int, indices: Ids, *, zero_fill: bool = True) -> Labels | None:
    """Pick positions of one axis, index -1 meaning a padded value (a zero if `zero_fill`, else some other constant)."""
    span = labels.span(axis)
    if not any(i in span for i in labels.varying()):
        # all positions of the axis carry the same labels; padding is constant along the moving axis, which fits any
        # label
        return resize_axis(labels, axis, len(indices))
    sub = labels.axes[axis]
    for k in range(1, len(sub) + 1):
        inner = math.prod(sub[k:])
        if len(indices) % inner:
            continue
        blocks = indices.reshape(-1, inner)
        base = np.where(blocks[:, :1] < 0, -1, blocks[:, :1] // inner)
        expected = np.where(base < 0, -1, base * inner + np.arange(inner))
        if not np.array_equal(blocks, expected):
            continue
        merged = collapse(labels, axis, k)
        if merged is None:
            continue
        return _take_sub_axis(merged, axis, base[:, 0], zero_fill)
    return None


def collapse(labels: Labels, axis: int, count: int) -> Labels | None:
    """Merge the first `count` sub-axes of an axis into one; None if the moving one is among them but not the last."""
    if count <= 1:
        return labels
    first = labels.start(axis)
    last = first + count - 1
    moving = labels.moving
    if moving is not None and first <= moving < last:
        return None
    sub = labels.axes[axis]
    dims = labels.ids.shape
    size = math.prod(sub[:count])
    if any(dims[i] > 1 for i in range(first, last + 1)) or moving == last:
        full = np.broadcast_to(labels.ids, dims[:first] + sub[:count] + dims[last + 1 :])
        ids = full.reshape(dims[:first] + (size,) + dims[last + 1 :])
    else:
        ids = labels.ids.reshape(dims[:first] + (1,) + dims[last + 1 :])
    if moving is not None and moving >= last:
        moving -= count - 1
    return Labels((*labels.axes[:axis], (size, *sub[count:]), *labels.axes[axis + 1 :]), ids, moving)


def _take_sub_axis(labels: Labels, axis: int, indices: Ids, zero_fill: bool) -> Labels | None:
    first = labels.start(axis)
    sub = labels.axes[axis]
    if first != labels.moving and labels.ids.shape[first] == 1:
        if len(indices) > 1:
            return Labels(
                (*labels.axes[:axis], (len(indices), *sub[1:]), *labels.axes[axis + 1 :]), labels.ids, labels.moving
            )
        ids = labels.ids
    else:
        ids = labels.ids.take(np.maximum(indices, 0), axis=first)
        fill = ZERO if zero_fill else FROZEN
        mask = (indices < 0).reshape([-1 if i == first else 1 for i in range(ids.ndim)])
        ids = np.where(mask, fill, ids)
    if len(indices) == 1:
        if first == labels.moving:
            return None
        ids = ids.reshape(ids.shape[:first] + ids.shape[first + 1 :])
        moving = labels.moving - 1 if labels.moving is not None and labels.moving > first else labels.moving
        return Labels((*labels.axes[:axis], sub[1:], *labels.axes[axis + 1 :]), ids, moving)
    return Labels((*labels.axes[:axis], (len(indices), *sub[1:]), *labels.axes[axis + 1 :]), ids, labels.moving)


def concat(parts: Sequence[Labels], axis: int) -> Labels | None:
    """Concatenate along the axis that moves; parts in which nothing moves contribute FROZEN positions.

    The parts are aligned on all other axes. None if their inner structures differ.
    """
    moving_parts = [p for p in parts if p.moving is not None]
    if not moving_parts:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return unlabelled(shape)
    tails = {p.axes[axis][1:] for p in moving_parts}
    if len(tails) == 1 and all(p.moving is not None and p.axes[axis] for p in parts):
        ready: list[Labels | None] = list(parts)  # the same inner structure everywhere: join the outer sub-axes
        tail = next(iter(tails))
    else:
        ready = [collapse(p, axis, len(p.axes[axis])) for p in parts]
        tail = ()
    ids: list[Ids] = []
    model: Labels | None = None
    for part in ready:
        if part is None:
            return None
        if part.moving is not None:
            if model is not None and (model.moving != part.moving or not _same_but(model, part, axis)):
                return None
            model = model or part
    assert model is not None
    first = model.start(axis)
    for part in ready:
        assert part is not None
        head = math.prod(part.axes[axis]) // math.prod(tail)
        if part.moving is None:
            dims = [head if i == first else 1 for i in range(model.ids.ndim)]
            ids.append(np.full(dims, FROZEN, np.int64))
        else:
            dims = [head if i == first else n for i, n in enumerate(part.ids.shape)]
            ids.append(np.broadcast_to(part.ids, dims))
    full = [max(i.shape[d] for i in ids) if d != first else -1 for d in range(model.ids.ndim)]
    joined = np.concatenate(
        [np.broadcast_to(i, [i.shape[first] if n < 0 else n for n in full]) for i in ids], axis=first
    )
    axes = (*model.axes[:axis], (joined.shape[first], *tail), *model.axes[axis + 1 :])
    return Labels(axes, joined, model.moving)


def _same_but(a: Labels, b: Labels, axis: int) -> bool:
    return all(x == y for i, (x, y) in enumerate(zip(a.axes, b.axes, strict=True)) if i != axis)


def align(parts: Sequence[Labels], *, skip: int | None = None) -> list[Labels] | None:
    """Give values of broadcastable shapes the same sub-axes (an axis of size 1 gets sub-axes without variation).

    skip: an axis left as it is (the axis of a concat). None if the sub-axes of two values, both varying along an axis,
    have no common refinement.
    """
    rank = max(len(p.axes) for p in parts)
    aligned = [Labels((*((),) * (rank - len(p.axes)), *p.axes), p.ids, p.moving) for p in parts]
    for axis in range(rank):
        if axis == skip:
            continue
        size = max(p.shape[axis] for p in aligned)
        cuts = {1, size}
        for p in aligned:
            if p.shape[axis] == size and any(i in p.span(axis) for i in p.varying()):
                inner = 1
                for s in reversed(p.axes[axis]):
                    inner *= s
                    cuts.add(inner)
        chain = sorted(cuts)
        if any(b % a for a, b in itertools.pairwise(chain)):
            return None
        common = tuple(b // a for a, b in itertools.pairwise(chain))[::-1]
        aligned = [_restructure(p, axis, common) for p in aligned]
    return aligned


def _restructure(labels: Labels, axis: int, sub: SubAxes) -> Labels:
    """Rewrite an axis over finer sub-axes `sub`."""
    span = labels.span(axis)
    if not any(i in span for i in labels.varying()):
        dims = (*labels.ids.shape[: span.start], *[1] * len(sub), *labels.ids.shape[span.stop :])
        moving = labels.moving
        if moving is not None and moving >= span.stop:
            moving += len(sub) - len(span)
        return Labels((*labels.axes[:axis], sub, *labels.axes[axis + 1 :]), labels.ids.reshape(dims), moving)
    position = 0
    while labels.axes[axis] != sub:
        current, factors = labels.axes[axis][position], list[int]()
        while math.prod(factors) < current:
            factors.append(sub[position + len(factors)])
        labels = split(labels, labels.start(axis) + position, tuple(factors))
        position += len(factors)
    return labels
