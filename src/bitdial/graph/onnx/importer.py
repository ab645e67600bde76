"""From a read ONNX model to a float graph: walks the nodes, keeps what is known of every value, types what is emitted."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bitdial.errors import CaptureError, GraphError
from bitdial.graph.aten import ALLOWED
from bitdial.graph.dtypes import aten_dtype, check_dtypes, value_dtype
from bitdial.graph.interpreter import evaluate_node, type_shape
from bitdial.graph.ir import Array, BatchDim, Dim, Graph, Node, Shape, TensorType
from bitdial.graph.onnx import sizes
from bitdial.graph.onnx.call import Call
from bitdial.graph.onnx.patterns import recognize
from bitdial.graph.onnx.reading import OnnxModel, OnnxNode
from bitdial.graph.onnx.table import CONVERTERS
from bitdial.graph.operators import MOVEMENT, OPERATORS
from bitdial.graph.symbolic import Ref
from bitdial.graph.verify import infer_shape, verify

_LARGEST_VALUE = 1 << 31  # elements of one sample
_LARGEST_CONSTANT = 1 << 28  # bytes of a constant that is computed here
_MISFITS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration, RuntimeError, OverflowError, AssertionError,
    ZeroDivisionError, MemoryError,
)  # fmt: skip


def import_graph(model: OnnxModel, shapes: Sequence[Sequence[int]] | None = None) -> Graph:
    """The float graph of a model. The first axis of every input is the batch, whatever the file says of it.

    shapes: of one sample per input, without the batch axis, for sizes that the file leaves open. Raises CaptureError naming the
    node, or the input whose size is missing or another.
    """
    return Importer(model).run(input_shapes(model, shapes))


def input_shapes(model: OnnxModel, shapes: Sequence[Sequence[int]] | None = None) -> list[Shape]:
    """Shapes of the inputs with the batch size open. Raises CaptureError."""
    if shapes is not None and len(shapes) != len(model.inputs):
        raise CaptureError(
            f"{model.path} takes {len(model.inputs)} inputs ({', '.join(i.name for i in model.inputs)}), got {len(shapes)}"
        )
    result: list[Shape] = []
    for i, spec in enumerate(model.inputs):
        given = tuple(shapes[i]) if shapes is not None else spec.shape[1:]
        fits = len(given) == len(spec.shape) - 1 and all(d in (None, g) for d, g in zip(spec.shape[1:], given, strict=False))
        if not fits:
            told = ", ".join(map(str, ["N", *given]))
            raise CaptureError(
                f"{model.path} takes '{spec.name}' as {spec} (N: the batch, ?: any size), not [{told}]: resize or crop the data"
            )
        if any(d is None for d in given):
            raise CaptureError(
                f"{model.path} leaves sizes of its input '{spec.name}' open, {spec}: they are taken from the calibration data"
            )
        result.append((BatchDim(1), *(int(d) for d in given if d is not None)))
    return result


class Importer:
    """Builds one graph. known: ONNX value name -> Ref or constant."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        fixed = {spec.shape[0] for spec in model.inputs} - {None}
        if len(fixed) > 1:
            raise CaptureError(
                f"{model.path} has inputs of different first sizes {sorted(d for d in fixed if d)}: the first axis of every "
                "input must be the batch"
            )
        self.fixed_batch = next(iter(fixed), None) or 1
        self.known: dict[str, Any] = dict(model.constants)
        self.graph = Graph([], [], [], {}, {})
        self.names: dict[int, str] = {}  # id of an array -> constant of the graph
        self.hints = {id(array): name for name, array in model.constants.items()}
        self.kept: list[Array] = list(model.constants.values())  # keeps these ids alive
        self.turned: dict[int, Array] = {}
        self.computed = 0

    def run(self, shapes: list[Shape]) -> Graph:
        for spec, shape in zip(self.model.inputs, shapes, strict=True):
            self._define(spec.name, Ref(self.fresh(clean(spec.name, identifier=True))), "the graph's inputs")
            name = self.known[spec.name]
            self.graph.inputs.append(str(name))
            self.graph.types[name] = TensorType(shape, spec.dtype)
        for node in self.model.nodes:
            results = self._convert(node)
            for output, value in zip(node.outputs, results, strict=False):
                if output:
                    self._define(output, value, str(node))
        for name in self.model.outputs:
            self.graph.outputs.append(self._output(name))
        graph = recognize(self.graph)
        try:
            verify(graph)
        except GraphError as error:
            raise CaptureError(f"{self.model.path} does not give a sound graph: {error}") from error
        return graph

    def _define(self, name: str, value: Any, what: str) -> None:
        if name in self.known:
            raise CaptureError(
                f"{self.model.path}: '{name:.80}', which {what} gives, is there already: every value needs one source"
            )
        self.known[name] = value

    def _output(self, name: str) -> str:
        if name not in self.known:
            raise CaptureError(f"{self.model.path}: its output '{name:.80}' is computed by no node")
        value = self.known[name]
        if isinstance(value, np.ndarray):
            if value.dtype == object:
                raise CaptureError(f"{self.model.path}: its output '{name:.80}' is a size of the batch, no tensor of numbers")
            return self.constant(value, name)
        return str(value)

    def _convert(self, node: OnnxNode) -> list[Any]:
        missing = [v for v in node.inputs if v and v not in self.known]
        if missing:
            raise CaptureError(
                f"{self.model.path}: {node} reads '{missing[0]:.80}', which no earlier node gives: the nodes are out of order, "
                "in a circle, or one is missing"
            )
        inputs = [self.known[v] if v else None for v in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        call = Call(self, node, inputs)
        try:
            if sizes.computes(call):
                return [sizes.evaluate(call)]
            for value in inputs:
                if isinstance(value, np.ndarray) and value.dtype == object and node.op not in _TAKE_SIZES:
                    raise call.refuse("it computes with the batch size in a way that is not followed")
            result = CONVERTERS[node.op](call)
        except sizes.NotASize as error:
            raise call.refuse(f"it makes of the batch size {error}, which is no multiple of it") from None
        except _MISFITS as error:
            raise call.refuse(f"its operands or attributes do not fit ({type(error).__name__}: {error!s:.300})") from error
        return result if isinstance(result, list) else [result]

    # -- emitting ------------------------------------------------------------------------------------------------------

    def emit(self, call: Call, op: str, inputs: list[Any], attrs: dict[str, Any], weight: Any, bias: Any) -> Any:
        """See `Call.emit`."""
        inputs = [np.asarray(v) if isinstance(v, np.generic) else v for v in inputs]  # NumPy's arithmetic drops empty shapes
        operands = [*inputs, *(v for v in (weight, bias) if v is not None)]
        if any(isinstance(v, np.ndarray) and v.dtype == object for v in operands):
            raise call.refuse("it computes with the batch size in a way that is not followed")
        if operands and all(isinstance(v, np.ndarray) for v in operands) and not _of_batch(attrs):
            return self._fold(call, op, inputs, attrs, weight, bias)
        output = next((v for v in call.node.outputs if v), call.node.name)
        name = self.fresh(clean(output))
        node = Node(name, op, [self.ref(v, f"{name}_constant") for v in inputs], attrs, source=call.node.name.strip("/"))
        node.weight = None if weight is None else self.ref(weight, f"{name}_weight")
        node.bias = None if bias is None else self.ref(bias, f"{name}_bias")
        self.graph.types[name] = self._type(call, node, self.graph)
        self.graph.nodes.append(node)
        return Ref(name)

    def _type(self, call: Call, node: Node, graph: Graph) -> TensorType:
        """The type that a node gives. Raises CaptureError for operands that do not fit, and for values beyond all bounds."""
        try:
            kind = infer_type(node, graph)
            graph.types[node.name] = kind
            check_dtypes(node, graph, frozenset())
        except _MISFITS as error:
            graph.types.pop(node.name, None)
            reads = ", ".join(str(graph.types.get(v, self._constant_type(graph, v))) for v in node.operands())
            raise call.refuse(f"{node.op} on {reads} does not go ({error!s:.300})") from error
        if sum(isinstance(d, BatchDim) for d in kind.shape) > 1:
            raise call.refuse("it combines the batch with itself; an answer may not depend on the other samples")
        elements = math.prod(d.factor if isinstance(d, BatchDim) else d for d in kind.shape)
        if elements > _LARGEST_VALUE:
            raise call.refuse(f"it gives {kind}, more than {_LARGEST_VALUE} numbers for one sample")
        return kind

    @staticmethod
    def _constant_type(graph: Graph, value: str) -> TensorType | None:
        array = graph.constants.get(value)
        return None if array is None else TensorType(tuple(array.shape), array.dtype.name)

    def _fold(self, call: Call, op: str, inputs: list[Array], attrs: dict[str, Any], weight: Any, bias: Any) -> Array:
        """Compute an operation on constants."""
        scratch = Graph([], [], [], {f"c{i}": v for i, v in enumerate(inputs)}, {})
        node = Node("result", op, list(scratch.constants), attrs)
        for role, array in (("weight", weight), ("bias", bias)):
            if array is not None:
                scratch.constants[role] = array
                setattr(node, role, role)
        kind = self._type(call, node, scratch)
        size = math.prod(int(d) for d in kind.shape if isinstance(d, int)) * np.dtype(kind.dtype).itemsize
        self.computed += size
        if size > _LARGEST_CONSTANT or self.computed > 4 * _LARGEST_CONSTANT:
            raise call.refuse(f"it makes constants of more than {_LARGEST_CONSTANT} bytes")
        with torch.no_grad():
            tensors = [torch.from_numpy(np.array(scratch.constants[v])) for v in node.operands()]
            return self.keep(evaluate_node(node, tensors, 1).contiguous().numpy())

    def keep(self, array: Array) -> Array:
        """A constant made here; kept, so that its id stays its own."""
        self.kept.append(array)
        return array

    def transposed(self, weight: Array) -> Array:
        """See `Call.transposed`."""
        if id(weight) not in self.turned:
            self.kept.append(weight)
            turned = self.keep(np.ascontiguousarray(weight.T))
            self.turned[id(weight)] = turned
            self.hints[id(turned)] = self.hints.get(id(weight), "")
        return self.turned[id(weight)]

    # -- names ---------------------------------------------------------------------------------------------------------

    def ref(self, value: Any, hint: str) -> str:
        return self.constant(value, hint) if isinstance(value, np.ndarray) else str(value)

    def constant(self, array: Array, hint: str) -> str:
        """Name of a constant, entering it into the graph at its first use. Raises CaptureError for NaN and +infinity."""
        name = self.names.get(id(array))
        if name is None:
            hint = self.hints.get(id(array)) or hint
            if array.dtype.kind == "f" and not np.all((array == array) & (array < np.inf)):
                raise CaptureError(
                    f"{self.model.path}: the constant '{hint:.80}' holds NaN or +infinity, which is not stored: use a large "
                    "finite number"
                )
            self.kept.append(array)
            name = self.names[id(array)] = self.fresh(clean(hint))
            self.graph.constants[name] = array
        return name

    def fresh(self, hint: str) -> str:
        return self.graph.fresh_name(hint)


_TAKE_SIZES = frozenset({"Reshape", "Expand", "Slice", "ConstantOfShape", "Shape", "Size", "Tile", "Resize", "Range"})


def clean(name: str, identifier: bool = False) -> str:
    """An ONNX name as a name of the graph: letters, digits, "_" and ".", beginning with a letter. identifier: without "."."""
    text = re.sub(r"[^0-9A-Za-z_]+" if identifier else r"[^0-9A-Za-z_.]+", "_", name).strip("_.")[:120] or "value"
    text = text if text[0].isalpha() else f"v{text}"
    return f"{text}_" if identifier and keyword.iskeyword(text) else text


def _of_batch(value: Any) -> bool:
    """Whether attributes mention the batch size."""
    if isinstance(value, dict):
        return "batch" in value or any(_of_batch(v) for v in value.values())
    return isinstance(value, list) and (value[:1] == ["N"] or any(_of_batch(v) for v in value))


def infer_type(node: Node, graph: Graph) -> TensorType:
    """The type that a node of a float graph gives. Raises ValueError and its like where operands do not fit."""
    if node.op in OPERATORS:
        shape = infer_shape(node, graph)
        assert shape is not None
        return TensorType(shape, value_dtype(graph, node.inputs[0]) if node.op in MOVEMENT else "float32")
    if node.op not in ALLOWED:
        raise ValueError(f"{node.op} is not in bitdial's list of float operators")
    return TensorType(_aten_shape(node, graph), aten_dtype(node, graph))


_BATCHES = (2, 6)  # a size that grows threefold with the batch is a multiple of it


def _aten_shape(node: Node, graph: Graph) -> Shape:
    """The shape that a torch operator gives, from two runs without data at different batch sizes."""
    found = [tuple(evaluate_node(node, _empty(node, graph, batch), batch).shape) for batch in _BATCHES]
    shape: list[Dim] = []
    small, large = _BATCHES
    if len(found[0]) != len(found[1]):
        raise ValueError("the number of its axes depends on the batch size")
    for a, b in zip(*found, strict=True):
        if a == b:
            shape.append(int(a))
        elif a * large == b * small and a % small == 0:
            shape.append(BatchDim(a // small))
        else:
            raise ValueError("a size of its result is no multiple of the batch size")
    return tuple(shape)


def _empty(node: Node, graph: Graph, batch: int) -> list[torch.Tensor]:
    tensors = []
    for value in node.operands():
        array = graph.constants.get(value)
        shape = list(array.shape) if array is not None else type_shape(graph.types[value], batch)
        tensors.append(torch.empty(shape, dtype=getattr(torch, value_dtype(graph, value)), device="meta"))
    return tensors
