"""Operators that move values: the same for float32 and 8-bit tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitdial.export.onnx.builder import data_type
from bitdial.export.onnx.writer import Writer
from bitdial.graph.ir import Node


def _x(w: Writer, node: Node) -> str:
    return w.value(node.inputs[0])


def _reshape(w: Writer, node: Node) -> str:
    shape = w.shape_tensor(node.attrs["shape"], infer=True)
    return w.b.emit("Reshape", [_x(w, node), shape], node.name, output=node.name)


def _permute(w: Writer, node: Node) -> str:
    return w.b.emit("Transpose", [_x(w, node)], node.name, output=node.name, perm=node.attrs["axes"])


def _expand(w: Writer, node: Node) -> str:
    shape = w.shape_tensor(node.attrs["shape"], infer=False)
    return w.b.emit("Expand", [_x(w, node), shape], node.name, output=node.name)


def _slice(w: Writer, node: Node) -> str:
    a = node.attrs
    return w.b.slice(_x(w, node), a["axis"], a["start"], a["stop"], a["step"], node.name, output=node.name)


def _select(w: Writer, node: Node) -> str:
    return w.b.gather(_x(w, node), int(node.attrs["index"]), node.attrs["axis"], node.name, output=node.name)


def _gather(w: Writer, node: Node) -> str:
    indices = np.array(node.attrs["indices"], np.int64)
    return w.b.gather(_x(w, node), indices, node.attrs["axis"], node.name, output=node.name)


def _roll(w: Writer, node: Node) -> str:
    x = _x(w, node)
    pairs = [(s, a) for s, a in zip(node.attrs["shifts"], node.attrs["axes"], strict=True)]
    for shift, axis in pairs:
        size = w.shape(node.inputs[0])[axis]
        assert isinstance(size, int)
        cut = -shift % size
        if cut:
            tail = w.b.slice(x, axis, cut, size, 1, f"{node.name}/tail")
            head = w.b.slice(x, axis, 0, cut, 1, f"{node.name}/head")
            x = w.b.emit("Concat", [tail, head], f"{node.name}/rolled", axis=axis)
    return w.b.emit("Identity", [x], node.name, output=node.name)


def _pad(w: Writer, node: Node) -> str:
    pads = node.attrs["pads"]
    sizes = w.b.ints([before for before, _ in pads] + [after for _, after in pads])
    encoding = w.encoding(node.name)
    if encoding is not None:  # pads with 0, whatever the scale
        fill = w.zero(encoding.signed)
    else:
        data_type(w.dtype(node.name))
        fill = w.b.constant(np.array(node.attrs.get("value", 0.0), w.dtype(node.name)))
    return w.b.emit("Pad", [_x(w, node), sizes, fill], node.name, output=node.name)


MOVEMENT: dict[str, Callable[[Writer, Node], str]] = {
    "reshape": _reshape, "permute": _permute, "expand": _expand, "slice": _slice, "select": _select, "gather": _gather,
    "roll": _roll, "pad": _pad,
}  # fmt: skip
