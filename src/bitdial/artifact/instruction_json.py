"""Instructions as plain JSON and back: {"class": .., field: value, ..}, every field of the dataclass, no other.

A window is {"kernel", "stride", "padding", "dilation"}: lists. A table is the name of its dtype; its bytes are in a tensor of the
file. A node (of `Move` and `Float`) is {"op", "attrs", "weight", "bias", "residual"}. A layer is a row of scalars; its arrays are
tensors of the file. Types: [dtype, [dimensions]], a dimension being an int or ["N", k] for k times the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.jsontext import Fields, from_plain, to_plain
from bitdial.errors import ArtifactError
from bitdial.graph.ir import BatchDim, Dim, Node, TensorType
from bitdial.quantization.instructions import INSTRUCTIONS, Contract, Instruction, Window
from bitdial.quantization.layer import GRANULARITIES, MAX_MACS, QuantizedLayer

Array = npt.NDArray[Any]
CLASSES = {kind.__name__: kind for kind in INSTRUCTIONS}
_LARGE = 2**40


@dataclass
class LayerHead:
    """What the manifest says of a layer. `layer` has no arrays yet. shape: of the weight; None for matmul. columns: of the bias
    table. packed: its always-low groups have no 8-bit weights in the file. plane: its low weights are integers of their own."""

    layer: QuantizedLayer
    shape: tuple[int, ...] | None
    n_groups: int
    columns: int
    packed: bool
    plane: bool


def instruction_to_json(step: Instruction, layer: dict[str, Any] | None) -> dict[str, Any]:
    """layer: the row of its layer (`layer_to_json`), for a `Contract` or `MatMul`."""
    where = f"instruction '{step.name:.80}'"
    item: dict[str, Any] = {"class": type(step).__name__}
    for field in fields(step):
        value = getattr(step, field.name)
        if field.name == "layer":
            item["layer"] = layer
        elif isinstance(value, Window):
            item["window"] = to_plain(asdict(value), where)
        elif isinstance(value, Node):
            roles = {"weight": value.weight, "bias": value.bias, "residual": value.residual}
            item["node"] = {"op": value.op, "attrs": to_plain(value.attrs, where), **roles}
        else:
            item[field.name] = value.dtype.name if field.name == "table" else to_plain(value, where)
    return item


def layer_to_json(layer: QuantizedLayer, packed: bool, plane: bool) -> dict[str, Any]:
    """The scalars of a layer; name and kind are its instruction's."""
    return {
        "shape": None if layer.weight is None else list(layer.weight.shape),
        "bias_columns": layer.bias.shape[1],
        "packed": packed,
        "plane": plane,
        "eligible": bool(layer.eligible),
        "reason": layer.reason,
        "amax": int(layer.amax),
        "wmax": int(layer.wmax),
        "granularity": layer.weight_granularity,
        "conv_groups": int(layer.conv_groups),
        "n_groups": layer.n_groups,
        "accumulator_bound": int(layer.accumulator_bound),
        "macs": int(layer.macs),
    }


def instruction_from_json(item: Any, where: str, table: Callable[[str], Array]) -> tuple[Instruction, LayerHead | None]:
    """Undo `instruction_to_json`; nothing but types is checked yet. table: gives the next 256 entries as a dtype.

    Raises ArtifactError.
    """
    row = Fields(item, where)
    kind = CLASSES[row.choice("class", tuple(CLASSES))]
    row.where = f"{where} ({kind.__name__})"
    head: LayerHead | None = None
    values: dict[str, Any] = {}
    for field in fields(kind):
        key = field.name
        if key == "table":
            values[key] = table(row.choice(key, ("int8", "uint8")))
        elif key == "layer":
            head = values[key] = row.any(key)  # read below, when name and kind are known
        elif key == "node":
            values[key] = _node(row.any(key), values, row.where)
        else:
            values[key] = _FIELDS[key](row, key)
    row.done()
    if "layer" in values:
        layer_kind = "matmul" if kind is not Contract else "linear" if values["window"] is None else "conv"
        head = layer_from_json(values["layer"], values["name"], layer_kind, f"{where}: layer '{values['name']:.80}'")
        values["layer"] = head.layer
    return kind(**values), head


def layer_from_json(item: Any, name: str, kind: str, where: str) -> LayerHead:
    """Undo `layer_to_json`. Raises ArtifactError."""
    row = Fields(item, where)
    shape = row.any("shape")
    if (shape is None) != (kind == "matmul"):
        raise row.fail("shape", "does not go with the kind of layer")
    if shape is not None:
        good = isinstance(shape, list) and 2 <= len(shape) <= 5
        if not good or not all(isinstance(d, int) and not isinstance(d, bool) and 1 <= d < _LARGE for d in shape):
            raise row.fail("shape", "is no list of two to five positive integers")
    empty = np.zeros(0)
    layer = QuantizedLayer(
        name=name,
        kind=kind,
        weight=None,
        weight_scale=empty.astype(np.float32),
        multiplier=empty.astype(np.float32),
        residual_factor=0.0,
        eligible=row.flag("eligible"),
        reason=row.text("reason"),
        amax=row.integer("amax", 0, 255),
        wmax=row.integer("wmax", 0, 127),
        group_bounds=empty.astype(np.int32),
        activation_shift=empty.astype(np.uint8),
        weight_shift=empty.astype(np.uint8),
        weight_granularity=row.choice("granularity", GRANULARITIES),
        group_macs=empty.astype(np.int64),
        low=empty.astype(np.bool_),
        bias=empty.astype(np.int32),
        conv_groups=row.integer("conv_groups", 1, 2**31),
        accumulator_bound=row.integer("accumulator_bound", 0, 2**31 - 1),
        macs=row.integer("macs", 0, MAX_MACS),
    )
    head = LayerHead(
        layer,
        None if shape is None else tuple(shape),
        row.integer("n_groups", 0, 2**31),
        row.integer("bias_columns", 0, _LARGE),
        row.flag("packed"),
        row.flag("plane"),
    )
    row.done()
    return head


def types_to_json(types: dict[str, TensorType]) -> dict[str, Any]:
    return {name: [t.dtype, [_dim_to_json(d) for d in t.shape]] for name, t in types.items()}


def types_from_json(items: dict[str, Any], where: str) -> dict[str, TensorType]:
    """Undo `types_to_json`. Raises ArtifactError."""
    return {name: _type(item, f"{where}: type of '{name:.80}'") for name, item in items.items()}


def node_attributes(value: dict[str, Any], where: str) -> dict[str, Any]:
    """A node's attributes as read from a manifest."""
    attrs = from_plain(value, where)
    if not isinstance(attrs, dict):
        raise ArtifactError.damaged(where, "malformed")
    return attrs


def _node(item: Any, values: dict[str, Any], where: str) -> Node:
    row = Fields(item, f"{where}: node")
    node = Node(
        name=values["name"],
        op=row.text("op"),
        inputs=list(values["inputs"]),
        attrs=node_attributes(row.mapping("attrs"), f"{row.where}: attributes"),
        weight=row.text_or_none("weight"),
        bias=row.text_or_none("bias"),
        residual=row.text_or_none("residual"),
        source=values["source"],
    )
    row.done()
    return node


def _number(row: Fields, key: str) -> float:
    value = from_plain(row.any(key), f"{row.where}: field '{key}'")
    if not isinstance(value, float):
        raise row.fail(key, "is no number with a point")
    return value


def _numbers(row: Fields, key: str) -> tuple[float, ...]:
    values = [from_plain(v, f"{row.where}: field '{key}'") for v in row.rows(key)]
    if not all(isinstance(v, float) for v in values):
        raise row.fail(key, "is no list of numbers with a point")
    return tuple(values)


def _integers(row: Fields, key: str) -> tuple[int, ...]:
    values = row.rows(key)
    if not all(isinstance(v, int) and not isinstance(v, bool) and -_LARGE < v < _LARGE for v in values):
        raise row.fail(key, "is no list of integers")
    return tuple(values)


def _window(row: Fields, key: str) -> Window:
    part = Fields(row.any(key), f"{row.where}: window")
    window = Window(*(_integers(part, name) for name in ("kernel", "stride", "padding", "dilation")))
    part.done()
    return window


def _pair(row: Fields, key: str) -> tuple[int, int]:
    values = _integers(row, key)
    if len(values) != 2:
        raise row.fail(key, "is no pair")
    return values[0], values[1]


def _attributes(row: Fields, key: str) -> dict[str, Any]:
    return node_attributes(row.mapping(key), f"{row.where}: field '{key}'")


def _or_none(read: Callable[[Fields, str], Any]) -> Callable[[Fields, str], Any]:
    return lambda row, key: row.any(key) if row.is_none(key) else read(row, key)


def _integer(row: Fields, key: str) -> int:
    return row.integer(key, -_LARGE, _LARGE)


_FIELDS: dict[str, Callable[[Fields, str], Any]] = {
    "name": Fields.text, "inputs": lambda row, key: tuple(row.strings(key)), "source": Fields.text,
    "lo": _integer, "hi": _integer, "factor": _number, "factors": _numbers, "scale": _number, "offset": _integer,
    "function": Fields.text, "attrs": _attributes, "activation": _or_none(_attributes), "clamp": _or_none(_pair),
    "residual": Fields.text_or_none, "window": _or_none(_window), "transpose_b": Fields.flag, "axis": _integer,
    "axes": _or_none(_integers), "ceil_mode": Fields.flag, "keepdim": Fields.flag, "cells": _integer, "reason": Fields.text,
}  # fmt: skip


def _dim_to_json(dim: Dim) -> Any:
    return ["N", dim.factor] if isinstance(dim, BatchDim) else int(dim)


def _type(value: Any, where: str) -> TensorType:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not isinstance(value[0], str)
        or not isinstance(value[1], list)
    ):
        raise ArtifactError.damaged(where, "malformed")
    return TensorType(tuple(_dim(d, where) for d in value[1]), value[0])


def _dim(value: Any, where: str) -> Dim:
    batch = isinstance(value, list) and len(value) == 2 and value[0] == "N"
    size = value[1] if batch else value
    if not isinstance(size, int) or isinstance(size, bool):
        raise ArtifactError.damaged(where, f"malformed dimension {value!r:.40}")
    return BatchDim(size) if batch else size
