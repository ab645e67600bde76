"""Converters of operators that move values or make them from sizes: reshapes, slices, gathers, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bitdial.graph.ir import Array, BatchDim, Dim
from bitdial.graph.onnx.call import Call
from bitdial.graph.onnx.reshaping import expand, flatten, reshape, squeeze, unsqueeze
from bitdial.graph.onnx.sizes import positions

_MOST_CONSTANT = 1 << 24  # elements of a constant that only a shape describes
_MOST_POSITIONS = 1 << 20  # along an axis, where each is worked out


def identity(c: Call) -> Any:
    return c.inputs[0]


def dropout(c: Call) -> Any:
    if c.given(2) and bool(c.constant(2).any()):
        raise c.refuse("it is in training mode: export the model in evaluation mode")
    return [c.inputs[0]]


def constant(c: Call) -> Any:
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if (value := c.attribute(name)) is not None:
            return np.array(value, np.float32 if "float" in name else np.int64)
    value = c.attribute("value")
    if not isinstance(value, np.ndarray):
        raise c.refuse("it holds no dense tensor of numbers")
    return value


def shape(c: Call) -> Any:
    dims: list[Any] = list(c.shape(c.inputs[0]))
    dims = dims[slice(int(c.attribute("start", 0)), c.attribute("end"))]
    result = np.empty(len(dims), object)
    result[:] = dims
    return result if any(isinstance(d, BatchDim) for d in dims) else result.astype(np.int64)


def size(c: Call) -> Any:
    dims = c.shape(c.inputs[0])
    factor = math.prod(d.factor if isinstance(d, BatchDim) else d for d in dims)
    batches = sum(isinstance(d, BatchDim) for d in dims)
    if batches > 1:
        raise c.refuse("the square of the batch size")
    return np.array(BatchDim(factor) if batches else factor, object if batches else np.int64)


def constant_of_shape(c: Call) -> Any:
    dims: list[Dim] = c.entries(0)
    fill = c.attribute("value", np.zeros(1, np.float32))
    if not isinstance(fill, np.ndarray) or fill.size != 1:
        raise c.refuse("its value is not one number")
    if any(isinstance(d, BatchDim) for d in dims):
        cell = fill.reshape([1] * len(dims))
        return c.expand(cell, tuple(d if isinstance(d, BatchDim) else int(d) for d in dims))
    dims = [int(d) for d in dims]  # type: ignore[arg-type]
    if any(d < 0 for d in dims) or math.prod(dims) > _MOST_CONSTANT:  # type: ignore[operator, arg-type]
        raise c.refuse(f"a constant of shape {dims!s:.120}")
    return np.full(dims, fill.reshape(()))


def range_(c: Call) -> Any:
    start, limit, delta = (c.constant(i).reshape(()).item() for i in range(3))
    if delta == 0 or (limit - start) / delta > _MOST_CONSTANT:
        raise c.refuse(f"the numbers from {start} to {limit} in steps of {delta}")
    return np.arange(start, limit, delta, dtype=c.constant(0).dtype)


def transpose(c: Call) -> Any:
    x = c.inputs[0]
    axes = [c.axis(int(a), x) for a in c.attribute("perm", list(range(c.rank(x)))[::-1])]
    return c.permute(x, axes)


def slice_(c: Call) -> Any:
    x, starts, ends = c.inputs[0], c.ints(1), c.entries(2)
    axes = c.ints(3) if c.given(3) else list(range(len(starts)))
    steps = c.ints(4) if c.given(4) else [1] * len(starts)
    for axis, start, end, step in zip((c.axis(a, x) for a in axes), starts, ends, steps, strict=True):
        dim = c.shape(x)[axis]
        beyond = end == dim if isinstance(end, BatchDim) else end >= 2**31 - 1
        if isinstance(dim, BatchDim) and (start, step) == (0, 1) and beyond:
            continue  # the whole batch
        n = c.size(dim)
        stop = n if isinstance(end, BatchDim) else int(end)  # as far as the batch reaches: beyond
        taken = positions(n, start, stop, step)
        if step > 0:
            x = c.slice(x, axis, taken.start if taken else 0, taken.stop if taken else 0, step)
        elif len(taken) > _MOST_POSITIONS:
            raise c.refuse(f"{len(taken)} positions in reverse")
        else:
            x = c.aten("index_select.default", x, axis, c.importer.keep(np.array(taken, np.int64)))
    return x


def split(c: Call) -> Any:
    x = c.inputs[0]
    axis = c.own_axis(int(c.attribute("axis", 0)), x)
    n, parts = c.size(c.shape(x)[axis]), len(c.node.outputs)
    if c.attribute("split") is not None:
        lengths = [int(v) for v in c.attribute("split")]
    elif c.given(1):
        lengths = c.ints(1)
    else:
        each = -(-n // int(c.attribute("num_outputs", parts)))
        lengths = [max(0, min(each, n - i * each)) for i in range(parts)]
    if sum(lengths) != n or len(lengths) != parts or min(lengths) < 0:
        raise c.refuse(f"{lengths!s:.80} do not make up {n}")
    ends = [sum(lengths[: i + 1]) for i in range(parts)]
    return [c.slice(x, axis, end - length, end) for end, length in zip(ends, lengths, strict=True)]


def concat(c: Call) -> Any:
    axis = c.axis(int(c.attribute("axis", 0)), c.inputs[0])
    values = [v for v in c.inputs if 0 not in c.shape(v) or len(c.inputs) == 1] or c.inputs[:1]
    shapes = [c.shape(v) for v in values]
    batch = next((s[0] for s in shapes if axis != 0 and s and isinstance(s[0], BatchDim)), None)
    if batch is not None:  # constants of the file's own batch size, such as a class token, for any
        values = [
            c.expand(v, (batch, *s[1:])) if isinstance(v, np.ndarray) and s[0] == 1 else v
            for v, s in zip(values, shapes, strict=True)
        ]
    for value in values:
        c.own_axis(axis, value)
    if len(values) == 1:
        return values[0]
    if c.float32(*values):
        return c.emit("concat", values, {"axis": axis})
    return c.aten("cat.default", values, axis)


def gather(c: Call) -> Any:
    data, indices = c.inputs
    axis = c.axis(int(c.attribute("axis", 0)), data)
    if isinstance(indices, np.ndarray):
        return _pick(c, data, axis, indices)
    if not isinstance(data, np.ndarray) or axis != 0:
        raise c.refuse("both its data and its positions depend on the model's inputs")
    table = data if data.ndim == 2 else c.importer.keep(data.reshape(data.shape[0], -1))
    return c.reshape(c.aten("embedding.default", table, indices), (*c.shape(indices), *data.shape[1:]))


def _pick(c: Call, data: Any, axis: int, indices: Array) -> Any:
    n = c.size(c.shape(data)[axis])
    wanted = [int(i) + n if i < 0 else int(i) for i in indices.ravel()]
    if not all(0 <= i < n for i in wanted):
        raise c.refuse(f"a position outside the axis of size {n}")
    if indices.ndim == 0:
        return c.emit("select", [data], {"axis": axis, "index": wanted[0]})
    before, after = c.shape(data)[:axis], c.shape(data)[axis + 1 :]
    if wanted and wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        picked = c.slice(data, axis, wanted[0], wanted[0] + len(wanted))
    else:
        picked = c.aten("index_select.default", data, axis, c.importer.keep(np.array(wanted, np.int64)))
    return c.reshape(picked, (*before, *indices.shape, *after))


def gather_elements(c: Call) -> Any:
    return c.aten("gather.default", c.inputs[0], c.own_axis(int(c.attribute("axis", 0)), c.inputs[0]), c.inputs[1])


def pad(c: Call) -> Any:
    x, mode = c.inputs[0], c.attribute("mode", "constant")
    flat = c.ints(1)
    axes = [c.axis(a, x) for a in c.ints(3)] if c.given(3) else list(range(c.rank(x)))
    if len(flat) != 2 * len(axes):
        raise c.refuse(f"{len(flat)} pads for {len(axes)} axes")
    pads = [[0, 0] for _ in range(c.rank(x))]
    for i, axis in enumerate(axes):
        pads[axis] = [flat[i], flat[len(axes) + i]]
    for axis, (before, after) in enumerate(pads):  # negative ones cut
        if before < 0 or after < 0:
            n = c.size(c.shape(x)[axis])
            x = c.slice(x, axis, max(0, -before), n - max(0, -after))
            pads[axis] = [max(0, before), max(0, after)]
        if pads[axis] != [0, 0]:
            c.own_axis(axis, x)
    if not any(n for pair in pads for n in pair):
        return x
    fill = c.number(2, 0.0)
    if mode == "constant" and c.float32(x) and math.isfinite(fill):
        return c.pad(x, pads, fill)
    if mode == "constant":
        value = fill if c.dtype(x).startswith("float") else int(fill)
        return c.aten("constant_pad_nd.default", x, [n for pair in reversed(pads) for n in pair], value)
    names = {"reflect": "reflection", "edge": "replication"}
    spatial = max(1, c.rank(x) - next(i for i, pair in enumerate(pads) if pair != [0, 0]))
    if mode not in names or spatial > 3 or c.rank(x) not in (spatial + 1, spatial + 2):
        if mode not in names or c.rank(x) - 2 not in (1, 2, 3) or pads[0] != [0, 0] or pads[1] != [0, 0]:
            raise c.refuse(f"padding of mode '{mode!s:.20}' on these axes")
        spatial = c.rank(x) - 2
    flat = [n for pair in reversed(pads[c.rank(x) - spatial :]) for n in pair]
    return c.aten(f"{names[mode]}_pad{spatial}d.default", x, flat)


def tile(c: Call) -> Any:
    x, repeats = c.inputs[0], c.entries(1)
    dims = c.shape(x)
    if len(repeats) != len(dims):
        raise c.refuse(f"{len(repeats)} repeats for {len(dims)} axes")
    if all(r == 1 or d == 1 for r, d in zip(repeats, dims, strict=True)):
        counts = [r if isinstance(r, BatchDim) else int(r) for r in repeats]
        return c.expand(x, tuple(r if d == 1 else d for r, d in zip(counts, dims, strict=True)))
    if any(isinstance(r, BatchDim) or (isinstance(d, BatchDim) and r != 1) for r, d in zip(repeats, dims, strict=True)):
        raise c.refuse("it repeats along the batch")
    if math.prod(int(r) for r in repeats) > _MOST_CONSTANT:
        raise c.refuse(f"{repeats!s:.80} repeats")
    return c.aten("repeat.default", x, [int(r) for r in repeats])


def depth_to_space(c: Call) -> Any:
    x, b = c.inputs[0], int(c.attribute("blocksize", 1))
    if b < 1 or c.rank(x) != 4:
        raise c.refuse(f"blocks of {b} on {c.rank(x)} axes")
    (n, *_), (channels, h, w) = c.shape(x), c.sizes(x)
    rest = channels // (b * b)
    if c.attribute("mode", "DCR") == "DCR":
        y = c.permute(c.reshape(x, (n, b, b, rest, h, w)), [0, 3, 4, 1, 5, 2])
    else:
        y = c.permute(c.reshape(x, (n, rest, b, b, h, w)), [0, 1, 4, 2, 5, 3])
    return c.reshape(y, (n, rest, h * b, w * b))


def space_to_depth(c: Call) -> Any:
    x, b = c.inputs[0], int(c.attribute("blocksize", 1))
    if b < 1 or c.rank(x) != 4:
        raise c.refuse(f"blocks of {b} on {c.rank(x)} axes")
    (n, *_), (channels, h, w) = c.shape(x), c.sizes(x)
    y = c.permute(c.reshape(x, (n, channels, h // b, b, w // b, b)), [0, 3, 5, 1, 2, 4])
    return c.reshape(y, (n, channels * b * b, h // b, w // b))


def triangle(c: Call) -> Any:
    diagonal = c.ints(1)[0] if c.given(1) else 0
    return c.aten("triu.default" if c.attribute("upper", 1) else "tril.default", c.inputs[0], diagonal)


# ---- resizing


def resize(c: Call) -> Any:
    x, mode = c.inputs[0], str(c.attribute("mode", "nearest"))
    place = str(c.attribute("coordinate_transformation_mode", "half_pixel"))
    rank = c.rank(x)
    axes = [c.axis(int(a), x) for a in c.attribute("axes", list(range(rank)))]
    before = c.shape(x)
    after: list[Any] = list(before)
    scales = [1.0] * rank
    target_sizes = c.entries(3) if c.given(3) else []
    if target_sizes:
        if c.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise c.refuse("it keeps the aspect ratio")
        for axis, target in zip(axes, target_sizes, strict=True):
            after[axis] = target
            if before[axis] != after[axis] and not (axis == 0 and after[axis] in (1, c.fixed_batch)):
                scales[axis] = c.size(after[axis]) / c.size(before[axis])
    else:
        for axis, scale in zip(axes, c.constant(2).ravel(), strict=True):
            scales[axis] = float(scale)
            if scales[axis] != 1.0:
                after[axis] = math.floor(c.size(before[axis]) * scales[axis])
    if any(isinstance(d, int) and not 1 <= d <= _MOST_POSITIONS for d in after):
        raise c.refuse(f"the size {after!s:.80}")
    changed = [i for i in range(rank) if scales[i] != 1.0]
    if not changed:
        return x
    if 0 in changed or 1 in changed or not 3 <= rank <= 5 or not c.float32(x):
        raise c.refuse(f"it resizes axes {changed} of {c.dtype(x)} values with {rank} axes")
    if mode == "nearest":
        return _nearest(c, x, place, [int(d) for d in after[2:]], scales)
    return _smooth(c, x, mode, place, [int(d) for d in after[2:]], scales)


def _nearest(c: Call, x: Any, place: str, target: list[int], scales: list[float]) -> Any:
    """By torch's own operator where that picks the same cells, else by their positions, axis by axis."""
    how, spatial = str(c.attribute("nearest_mode", "round_prefer_floor")), c.sizes(x)[1:]
    wanted = [_cells(c, place, how, d, t, s) for d, t, s in zip(spatial, target, scales[2:], strict=True)]
    plain = [
        [min(int(i * (np.float32(d) / np.float32(t))), d - 1) for i in range(t)] for d, t in zip(spatial, target, strict=True)
    ]
    if wanted == plain and len(target) <= 2:
        return c.aten(f"upsample_nearest{len(target)}d.vec", x, target, None)
    for i, cells in enumerate(wanted):
        if cells != list(range(spatial[i])):
            x = c.aten("index_select.default", x, i + 2, c.importer.keep(np.array(cells, np.int64)))
    return x


def _cells(c: Call, place: str, how: str, size: int, target: int, scale: float) -> list[int]:
    """The input cell of every output cell, as ONNX defines it; in float32, as ONNX Runtime rounds."""
    i, scale = np.arange(target, dtype=np.float32), np.float32(scale)  # type: ignore[assignment]
    positions: dict[str, Callable[[], Any]] = {
        "asymmetric": lambda: i / scale,
        "half_pixel": lambda: (i + 0.5) / scale - 0.5,
        "half_pixel_symmetric": lambda: size / 2 * (1 - target / (scale * size)) + (i + 0.5) / scale - 0.5,
        "pytorch_half_pixel": lambda: (i + 0.5) / scale - 0.5 if target > 1 else i * 0,
        "align_corners": lambda: i * (size - 1) / (target - 1) if target > 1 else i * 0,
    }
    roundings: dict[str, Callable[[Any], Any]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda p: np.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: np.floor(p + 0.5),
    }
    if place not in positions or how not in roundings:
        raise c.refuse(f"nearest cells of '{place:.40}' by '{how:.40}'")
    return [int(v) for v in np.clip(roundings[how](positions[place]()), 0, size - 1)]


def _smooth(c: Call, x: Any, mode: str, place: str, target: list[int], scales: list[float]) -> Any:
    names = {
        ("linear", 1): "upsample_linear1d.vec", ("linear", 2): "upsample_bilinear2d.vec", ("cubic", 2): "upsample_bicubic2d.vec",
    }  # fmt: skip
    op = names.get((mode, len(target)))
    places = ("half_pixel", "pytorch_half_pixel", "align_corners")
    exact = c.attribute("cubic_coeff_a", -0.75) == -0.75 and not c.attribute("exclude_outside", 0)
    if op is None or place not in places or c.attribute("antialias", 0) or (mode == "cubic" and not exact):
        raise c.refuse(
            f"{mode:.20} interpolation over {len(target)} dimensions at '{place:.40}' (taken: linear over 1 or 2 and cubic over "
            "2, half_pixel or align_corners, without antialias)"
        )
    if place == "pytorch_half_pixel" and 1 in target:
        raise c.refuse("pytorch_half_pixel to a single cell")
    even = all(t == d * s for t, d, s in zip(target, c.sizes(x)[1:], scales[2:], strict=True))
    if place == "align_corners" or even:
        return c.aten(op, x, target, place == "align_corners", None)
    return c.aten(op, x, None, False, [float(s) for s in scales[2:]])


CONVERTERS: dict[str, Callable[[Call], Any]] = {
    "Identity": identity,
    "Dropout": dropout,
    "Constant": constant,
    "Shape": shape,
    "Size": size,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Transpose": transpose,
    "Slice": slice_,
    "Split": split,
    "Concat": concat,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Pad": pad,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": triangle,
    "Resize": resize,
}
