"""An ONNX file as plain data: nodes, constants as NumPy arrays, inputs and outputs. The file may come from a stranger.

Nothing is run or unpickled. Weights beside the model are read from regular files inside the model's own folder only, and every
size is checked against the bytes that are there before anything is made of it.
"""

from __future__ import annotations

import importlib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.errors import CaptureError
from bitdial.graph.ir import VALUE_DTYPES, Array
from bitdial.graph.onnx.table import CONVERTERS

SMALLEST_OPSET = 11
_LARGEST_FILE = (1 << 31) - 1  # of a protocol buffer
_MOST_NODES = 1 << 16
_MOST_DIMENSIONS = 16
_QUANTIZED = ("quantize", "qlinear", "matmulinteger", "convinteger", "qattention", "qgemm", "matmulnbits")
_HALF = "is {dtype}: bitdial quantizes float32 networks; export the model in float32"


@dataclass(frozen=True)
class InputSpec:
    """An input of the file. shape: an int, or None where the file leaves the size open; dtype: one of VALUE_DTYPES."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(['N', *('?' if d is None else str(d) for d in self.shape[1:])])}]"


@dataclass(frozen=True)
class OnnxNode:
    """One node. inputs: names, "" where left out; attributes: ints, floats, str, lists of these, arrays."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op} '{self.name:.80}'"


@dataclass(frozen=True)
class OnnxModel:
    """A read file. Nodes that no output needs are gone."""

    path: Path
    opset: int
    inputs: list[InputSpec]
    outputs: list[str]
    nodes: list[OnnxNode]
    constants: dict[str, Array] = field(repr=False)


def is_onnx(model: Any) -> bool:
    """Whether what a caller passes as a network is the path of an ONNX file."""
    return isinstance(model, (str, os.PathLike)) and str(model).lower().endswith(".onnx")


def read_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """Read a float ONNX model. Raises CaptureError naming what is wrong with the file and what to do."""
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise CaptureError(
            f"reading {path} needs the Python package 'onnx', which cannot be imported ({error}): pip install 'bitdial[onnx]'"
        ) from None
    file = Path(path)
    data = _bytes_of(file)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's error class differs between its implementations
        raise CaptureError(f"{file} is no ONNX model, or damaged ({type(error).__name__}): export or download it again") from None
    del data
    return _Reader(onnx, file).model(model)


def _bytes_of(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CaptureError(f"{file} is no regular file: give the path of an ONNX model")
            if status.st_size > _LARGEST_FILE:
                raise CaptureError(f"{file} is larger than 2 GiB, which no ONNX file can be; keep the weights beside the model")
            return stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise CaptureError(f"{file} cannot be read ({error.strerror or error}): check the path of the ONNX model") from None


class _Reader:
    """Reads the parts of one model. `onnx`: the imported package."""

    def __init__(self, onnx: Any, file: Path) -> None:
        self.onnx, self.file = onnx, file

    def fail(self, why: str) -> CaptureError:
        return CaptureError(f"{self.file}: {why}")

    def model(self, model: Any) -> OnnxModel:
        graph = model.graph
        if not graph.node and not graph.output:
            raise self.fail("it holds no ONNX graph: export or download it again")
        if len(graph.node) > _MOST_NODES:
            raise self.fail(f"it has {len(graph.node)} nodes, more than the {_MOST_NODES} that are read")
        if any(isinstance(text, bytes) for text in _texts(model)):  # how protobuf gives what is no UTF-8
            raise self.fail("it holds names that are no text: the file is damaged")
        opset = self._opset(model)
        outputs = [value.name for value in graph.output]
        nodes = self._needed(graph.node, outputs)
        self._check_operators(model, nodes)
        read = [self._node(node, position) for position, node in nodes]
        used = {v for node in read for v in node.inputs} | set(outputs)
        constants: dict[str, Array] = {}
        for tensor in graph.initializer:
            if tensor.name in constants:
                raise self.fail(f"two initializers are called '{tensor.name:.80}'")
            if tensor.name in used:
                constants[tensor.name] = self.array(tensor)
        if any(t.values.name in used for t in graph.sparse_initializer):
            raise self.fail("it has sparse initializers, which are not read: store them as dense tensors")
        initialized = {tensor.name for tensor in graph.initializer}
        inputs = [self._input(value) for value in graph.input if value.name not in initialized]
        if not inputs:
            raise self.fail("it has no input that is not a constant")
        return OnnxModel(self.file, opset, inputs, outputs, read, constants)

    def _opset(self, model: Any) -> int:
        opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        if opset < SMALLEST_OPSET:
            raise self.fail(
                f"it is of opset {opset}, bitdial reads {SMALLEST_OPSET} on: export it anew, or convert it with "
                "onnx.version_converter.convert_version(model, 17)"
            )
        return int(opset)

    def _needed(self, nodes: Iterable[Any], outputs: list[str]) -> list[tuple[int, Any]]:
        """The nodes that outputs depend on, each with its place in the file, in the file's order."""
        needed = set(outputs)
        kept = []
        for position, node in reversed(list(enumerate(nodes))):
            if needed.intersection(node.output) - {""}:
                kept.append((position, node))
                needed.update(node.input)
        return kept[::-1]

    def _check_operators(self, model: Any, nodes: list[tuple[int, Any]]) -> None:
        """Raise one CaptureError for everything that cannot be read."""
        quantized = [n.op_type for _, n in nodes if any(word in n.op_type.lower() for word in _QUANTIZED)]
        if quantized:
            raise self.fail(
                f"it is quantized already ({len(quantized)} nodes such as {quantized[0]:.40}): give the float model that it was "
                "made from"
            )
        functions = {(f.domain, f.name) for f in model.functions}
        if any((n.domain, n.op_type) in functions for _, n in nodes):
            raise self.fail(
                "it calls functions of its own: write it without them first, onnx.save(onnx.inliner.inline_local_functions("
                "model), path)"
            )
        unknown: dict[str, list[str]] = {}
        for position, node in nodes:
            known = node.domain in ("", "ai.onnx") and node.op_type in CONVERTERS
            if not known:
                name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
                unknown.setdefault(name[:80], []).append((node.name or f"node {position}")[:80])
        if unknown:
            count = sum(map(len, unknown.values()))
            listed = "; ".join(
                f"{op} ({len(names)}: {', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" for op, names in unknown.items()
            )
            raise self.fail(
                f"{count} nodes have {len(unknown)} operator(s) that bitdial does not read: {listed[:4000]}. Export the model "
                "without them, or cut it where they begin (onnx.utils.extract_model) and run that part beside it"
            )

    def _node(self, node: Any, position: int) -> OnnxNode:
        name = node.name or (node.output[0] if node.output else f"node {position}")
        try:
            attributes = {a.name: self._attribute(a) for a in node.attribute}
        except CaptureError:
            raise
        except Exception as error:
            raise self.fail(f"{node.op_type} '{name:.80}' has a malformed attribute ({error!s:.200})") from None
        return OnnxNode(node.op_type, name, list(node.input), list(node.output), attributes)

    def _attribute(self, attribute: Any) -> Any:
        kinds = self.onnx.AttributeProto
        if attribute.type == kinds.TENSOR:
            return self.array(attribute.t)
        if attribute.type == kinds.STRING:
            return attribute.s.decode("utf-8", "replace")
        if attribute.type in (kinds.INT, kinds.FLOAT, kinds.INTS, kinds.FLOATS):
            value = self.onnx.helper.get_attribute_value(attribute)
            return list(value) if attribute.type in (kinds.INTS, kinds.FLOATS) else value
        return None  # a kind that no operator read here has

    # -- types and tensors ---------------------------------------------------------------------------------------------

    def dtype(self, element: int, what: str) -> str:
        """Name of an ONNX element type. Raises CaptureError for one that graphs do not hold."""
        try:
            name = str(np.dtype(self.onnx.helper.tensor_dtype_to_np_dtype(element)).name)
        except Exception:
            name = f"of element type {element}"
        if name in ("float16", "bfloat16"):
            raise self.fail(f"{what} {_HALF.format(dtype=name)}")
        if name not in VALUE_DTYPES:
            raise self.fail(f"{what} is {name}, which bitdial does not hold; it takes {', '.join(VALUE_DTYPES)}")
        return name

    def _input(self, value: Any) -> InputSpec:
        what = f"its input '{value.name:.80}'"
        if value.type.WhichOneof("value") != "tensor_type":
            raise self.fail(f"{what} is no tensor")
        kind = value.type.tensor_type
        dtype = self.dtype(kind.elem_type, what)
        dims = kind.shape.dim
        if not kind.HasField("shape") or not 1 <= len(dims) <= _MOST_DIMENSIONS:
            raise self.fail(f"{what} has {len(dims)} dimensions: there must be one for the batch, and at most {_MOST_DIMENSIONS}")
        shape = tuple(int(d.dim_value) if d.dim_value > 0 else None for d in dims)
        return InputSpec(value.name, shape, dtype)

    def array(self, tensor: Any) -> Array:
        """A tensor of the file, float32 numbers finite or -infinity as everywhere in a graph. Raises CaptureError."""
        what = f"the tensor '{tensor.name:.80}'"
        dtype = np.dtype(self.dtype(tensor.data_type, what))
        shape = tuple(int(d) for d in tensor.dims)
        if len(shape) > _MOST_DIMENSIONS or any(d < 0 for d in shape):
            raise self.fail(f"{what} has the shape {shape!s:.120}")
        size = math.prod(shape) * dtype.itemsize
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raw = self._external(tensor, what, size)
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
        else:
            return self._listed(tensor, what, shape)
        if len(raw) != size:
            raise self.fail(f"{what} of {dtype.name} {list(shape)} needs {size} bytes and has {len(raw)}: the file is damaged")
        return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(shape)

    def _listed(self, tensor: Any, what: str, shape: tuple[int, ...]) -> Array:
        """Numbers written one by one."""
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        if sum(map(len, fields)) != math.prod(shape):
            raise self.fail(f"{what} of shape {list(shape)} has {sum(map(len, fields))} numbers: the file is damaged")
        try:
            return np.array(self.onnx.numpy_helper.to_array(tensor))
        except Exception as error:
            raise self.fail(f"{what} cannot be read ({error!s:.200})") from None

    def _external(self, tensor: Any, what: str, size: int) -> bytes:
        """Bytes of a tensor that lie in a file beside the model. The path must stay inside the model's folder, links resolved."""
        entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        folder = Path(os.path.realpath(self.file.parent))
        try:
            target = Path(os.path.realpath(folder / location))
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        except ValueError:
            raise self.fail(f"{what} names its external data in a way that cannot be read") from None
        if not location or os.path.isabs(location) or folder not in target.parents:
            raise self.fail(f"{what} lies in '{location:.120}', outside the model's folder: move it inside")
        if offset < 0 or length != size:
            raise self.fail(f"{what} needs {size} bytes of external data, and names {length} from {offset}: the file is damaged")
        try:
            with target.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode) or offset + length > status.st_size:
                    raise self.fail(f"{what} reaches beyond the end of '{location:.120}': the file is truncated")
                stream.seek(offset)
                return stream.read(length)
        except OSError as error:
            raise self.fail(f"{what} lies in '{location:.120}', which cannot be read ({error.strerror}): put it beside") from None


def _texts(model: Any) -> Iterator[Any]:
    """Every name in a model that is read."""
    graph = model.graph
    yield from (part for f in model.functions for part in (f.domain, f.name))
    yield from (value.name for value in (*graph.input, *graph.output))
    for node in graph.node:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (a.name for a in node.attribute)
    tensors = (a.t for node in graph.node for a in node.attribute if a.HasField("t"))
    for tensor in (*graph.initializer, *tensors, *(sparse.values for sparse in graph.sparse_initializer)):
        yield tensor.name
        yield from (part for entry in tensor.external_data for part in (entry.key, entry.value))
