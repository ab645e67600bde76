"""An ONNX graph under construction: nodes, initializers, fresh names. The package `onnx` is imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ExportError

Array = npt.NDArray[Any]

# TensorProto.DataType; fixed by the format.
FLOAT, UINT8, INT8, INT32, INT64, BOOL, UINT4, INT4 = 1, 2, 3, 6, 7, 9, 21, 22
BFLOAT16 = 16
_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
_SHARED_BYTES = 1 << 12  # constants up to this size are stored once per content
_LIMIT_BYTES = (1 << 31) - 1  # of one protocol buffer message


def require(package: str) -> Any:
    """The package `onnx` or `onnxruntime`. Raises ExportError naming how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the Python package '{package}' cannot be imported ({error}): pip install bitdial[onnx]"
        ) from None


def data_type(dtype: str) -> int:
    """ONNX element type of a NumPy dtype name. Raises ExportError."""
    if dtype not in _TYPES:
        raise ExportError(f"values of dtype {dtype} have no ONNX form here; keep them out of the model")
    return _TYPES[dtype]


class Builder:
    """Collects nodes in topological order."""

    def __init__(self, opset: int) -> None:
        self.onnx = require("onnx")
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: set[str] = set()
        self._shared: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    # -- names ---------------------------------------------------------------------------------------------------------

    def reserve(self, name: str) -> str:
        """Keep a name for a value of the program's graph."""
        self._names.add(name)
        return name

    def fresh(self, hint: str) -> str:
        """`hint`, or the next free name after it."""
        name, k = hint, 1
        while name in self._names:
            name, k = f"{hint}.{k}", k + 1
        self._names.add(name)
        return name

    # -- constants -----------------------------------------------------------------------------------------------------

    def raw(self, kind: int, dims: Sequence[int], data: bytes, hint: str) -> str:
        """An initializer from its bytes (little endian). Small ones of equal content are one."""
        key = (kind, tuple(dims), data)
        shared = len(data) <= _SHARED_BYTES
        if shared and key in self._shared:
            return self._shared[key]
        tensor = self.onnx.TensorProto()
        tensor.name = self.fresh(hint)
        tensor.data_type = kind
        tensor.dims.extend(int(d) for d in dims)
        tensor.raw_data = data
        self.initializers.append(tensor)
        if shared:
            self._shared[key] = tensor.name
        return str(tensor.name)

    def constant(self, array: npt.ArrayLike, hint: str = "c") -> str:
        """An initializer from an array."""
        a = np.asarray(array)
        little = np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<"))
        return self.raw(data_type(a.dtype.name), a.shape, little.tobytes(), hint)

    def int4(self, values: npt.NDArray[np.int8], hint: str) -> str:
        """An INT4 initializer: two values a byte, the first in the low half. values: -8..7."""
        flat = values.reshape(-1).astype(np.uint8) & 15
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        return self.raw(INT4, values.shape, (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes(), hint)

    def scalar(self, value: float) -> str:
        """A float32 number."""
        return self.constant(np.float32(value))

    def ints(self, values: Sequence[int]) -> str:
        """An int64 vector: axes, shapes, indices."""
        return self.constant(np.array(values, np.int64))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def emit(self, op: str, inputs: Sequence[str], hint: str, *, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, named `output` or afresh after `hint`. Empty input names are inputs left out."""
        name = self.fresh(hint) if output is None else output
        trimmed = list(inputs)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        self.nodes.append(self.onnx.helper.make_node(op, trimmed, [name], **attributes))
        return name

    def cast(self, x: str, kind: int, hint: str, output: str | None = None) -> str:
        return self.emit("Cast", [x], hint, output=output, to=kind)

    def reshape(self, x: str, shape: Sequence[int], hint: str, output: str | None = None) -> str:
        """shape: -1 at most once."""
        return self.emit("Reshape", [x, self.ints(shape)], hint, output=output)

    def gather(self, x: str, indices: Array | int, axis: int, hint: str, output: str | None = None) -> str:
        """Entries along an axis; a run of consecutive ones is a Slice, an int drops the axis."""
        if isinstance(indices, int):
            return self.emit("Gather", [x, self.constant(np.array(indices, np.int64))], hint, output=output, axis=axis)
        index = np.asarray(indices, np.int64)
        if index.size and np.array_equal(index, np.arange(index[0], index[0] + index.size)):
            return self.slice(x, axis, int(index[0]), int(index[-1]) + 1, 1, hint, output)
        small = index.astype(np.int32)
        return self.emit("Gather", [x, self.constant(small)], hint, output=output, axis=axis)

    def slice(self, x: str, axis: int, start: int, stop: int, step: int, hint: str, output: str | None = None) -> str:
        bounds = [self.ints([v]) for v in (start, stop, axis, step)]
        return self.emit("Slice", [x, *bounds], hint, output=output)

    def reduce(self, op: str, x: str, axes: Sequence[int], keepdims: bool, hint: str, output: str | None = None) -> str:
        return self.emit(op, [x, self.ints(axes)], hint, output=output, keepdims=int(keepdims))

    def clip(self, x: str, lo: float | None, hi: float | None, hint: str, output: str | None = None) -> str:
        """Clamp a float32 value; None or infinite: no bound on that side."""
        bounds = ["" if b is None or not np.isfinite(b) else self.scalar(b) for b in (lo, hi)]
        if not any(bounds):
            return x if output is None else self.emit("Identity", [x], hint, output=output)
        return self.emit("Clip", [x, *bounds], hint, output=output)

    # -- the model -----------------------------------------------------------------------------------------------------

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], metadata: dict[str, str], version: str) -> Any:
        """The checked ModelProto. inputs, outputs: from `value_info`. Raises ExportError."""
        h = self.onnx.helper
        read = {v for node in self.nodes for v in node.input} | {o.name for o in outputs}
        kept = [t for t in self.initializers if t.name in read]
        size = sum(len(t.raw_data) for t in kept)
        if size > _LIMIT_BYTES:
            raise ExportError(f"the model holds {size} bytes of weights, and one ONNX file cannot hold more than 2 GiB")
        graph = h.make_graph(self.nodes, "bitdial", list(inputs), list(outputs), kept)
        opsets = [h.make_opsetid("", self.opset)]
        model = h.make_model(
            graph,
            opset_imports=opsets,
            ir_version=h.find_min_ir_version_for(opsets),
            producer_name="bitdial",
            producer_version=version,
        )
        h.set_model_props(model, metadata)
        try:
            self.onnx.checker.check_model(model, full_check=True)
        except (self.onnx.checker.ValidationError, self.onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the ONNX checker refuses the graph that was built: {error}") from error
        return model

    def value_info(self, name: str, kind: int, shape: Sequence[int | str]) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, kind, list(shape))
