"""The network as a small, typed graph. NumPy only: deployment reads it without torch.

A graph is a list of nodes in topological order. Every node has exactly one output value and lends it its name, so that
"value" and "node name" are one namespace together with graph inputs and constants. Multi-output operators of the source
network (split, chunk, unbind) are written as one `slice` or `select` per output at capture.

Shapes: a dimension is an int, or `BatchDim(k)` for "k times the batch size" (k > 1 appears where windows are folded into
the batch, as in Swin). Nothing else is dynamic.

Operators (listed in `graph/operators.py`; x is the first input; attributes in brackets; as in torch, float, evaluation mode):

  conv        weight [O, I/groups, *k], optional bias, optional residual  {stride, padding, dilation, groups: int lists/int}
              one to three spatial dimensions, zero padding, padding is one number per spatial dimension
  linear      weight [O, I], optional bias, optional residual; contracts the last axis
  matmul      two inputs, batched over leading axes as in torch.matmul  {transpose_b: bool}; contracts a's last axis with
              b's second last (or last, if transpose_b)
  batch_norm  inputs x, gamma, beta, mean, var {eps}; channel axis 1; removed by folding where a conv or linear precedes
  add, mul    two inputs, broadcasting (one may be a constant); `residual` is not used here
  concat      any number of inputs {axis}
  relu relu6 clamp{lo,hi} sigmoid hardsigmoid hardswish silu gelu{approximate} tanh leaky_relu{slope} elu{alpha} softplus mish
  max_pool    {kernel, stride, padding, dilation, ceil_mode}
  avg_pool    {kernel, stride, padding, ceil_mode, count_include_pad}
  mean        {axes, keepdim}   (also adaptive average pooling to one cell)
  reshape     {shape}  entries int or ["N", k]
  permute     {axes}
  expand      {shape}
  slice       {axis, start, stop, step}   stop exclusive, all non-negative
  select      {axis, index}
  pad         {pads: [[before, after] per axis], value}
  roll        {shifts, axes}
  gather      {axis, indices}   fixed reorder of one axis (inserted by the layout pass; counted in reports)
              (max_pool, reshape .. pad, roll and gather take any dtype and keep it; all other operators up to here and
              softmax are float32 throughout, or 8-bit in a quantized program: `bitdial.graph.dtypes`)
  layer_norm  inputs x, [weight], [bias]  {normalized_shape, eps}
  softmax     {axis}
  aten.*      a torch operator by overload name, from the fixed list in `graph/aten.py`; {args, kwargs}: a JSON
              template in which {"value": i} stands for inputs[i]; always runs in float

`conv`, `linear`, `matmul`, `add` and `concat` may carry a fused activation: attrs["activation"] =
{"kind": "relu"} or {"kind": "clamp", "lo": .., "hi": ..}; absent means none. `conv` and `linear` compute
activation(op(x) + residual).

Unary functions with a known `depth` (`graph.operators`) may carry attrs["raised"], a number added to their result.

`conv` and `linear` may carry attrs["precision"], which keeps them in float whatever else is quantized:
  "float32"   as without it
  "bfloat16"  x and the weight are bfloat16 operands: x is rounded to it (8 significand bits, round half to even), the weight
              constant is stored as its bit patterns, uint16 (the upper half of a float32; neither NaN nor infinity). Products
              are exact in float32, the sum is taken in float32 in any order, bias, residual and activation are float32, and
              so is the result, which is not rounded to bfloat16
`bitdial.graph.bfloat16` converts. No other constant is uint16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, order=True)
class BatchDim:
    """The dimension `factor` * batch size."""

    factor: int = 1

    def __str__(self) -> str:
        return "N" if self.factor == 1 else f"{self.factor}N"


Dim = int | BatchDim
Shape = tuple[Dim, ...]
VALUE_DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype (one of VALUE_DTYPES; 8-bit encoded values of a quantized program are "uint8" and "int8") of a value."""

    shape: Shape
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(d) for d in self.shape)}]"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> int:
        """How many elements one sample has."""
        return math.prod(d.factor if isinstance(d, BatchDim) else d for d in self.shape)


STEP_ELEMENTS = 1 << 24  # 64 MiB of float32; a layer holds several values of this size at once


class Values(Protocol):
    """What a graph and a quantized program have in common: values, as documented at `Graph`."""

    inputs: list[str]
    outputs: list[str]
    constants: dict[str, Array]
    types: dict[str, TensorType]


@dataclass
class Node:
    """One operation. `name` is also the name of its only output value."""

    name: str
    op: str
    inputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None
    bias: str | None = None
    residual: str | None = None
    source: str = ""  # module path in the captured network, e.g. "layer1.0.conv1"

    def operands(self) -> list[str]:
        """All values the node reads: inputs, weight, bias, residual (those that exist), in that order."""
        extra = (self.weight, self.bias, self.residual)
        return [*self.inputs, *(v for v in extra if v is not None)]

    def data_operands(self) -> list[str]:
        """Inputs and residual, without the weight and bias of conv/linear."""
        return [*self.inputs, *([self.residual] if self.residual is not None else [])]

    def replace_operand(self, old: str, new: str) -> None:
        """Read `new` wherever the node read `old`."""
        self.inputs = [new if v == old else v for v in self.inputs]
        for role in ("weight", "bias", "residual"):
            if getattr(self, role) == old:
                setattr(self, role, new)


@dataclass
class Graph:
    """Nodes in topological order, constants, and the type of every value.

    structure: how the outputs nest and what they are called (`bitdial.graph.structure`); None: one value, or a tuple.
    """

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Array]
    types: dict[str, TensorType]
    structure: Any = None

    def node(self, name: str) -> Node:
        """The node that produces `name`. Raises KeyError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def producers(self) -> dict[str, Node]:
        """Value name to the node that produces it (graph inputs and constants are absent)."""
        return {node.name: node for node in self.nodes}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name to the nodes that read it, in order; every value of the graph has an entry."""
        result: dict[str, list[Node]] = {v: [] for v in (*self.inputs, *self.constants)}
        for node in self.nodes:
            result.setdefault(node.name, [])
            for operand in dict.fromkeys(node.operands()):
                result[operand].append(node)
        return result

    def is_constant(self, value: str) -> bool:
        return value in self.constants

    def fresh_name(self, hint: str) -> str:
        """`hint`, or the next name after it that no value has."""
        name, k = hint, 1
        while name in self.constants or name in self.types:
            name, k = f"{hint}_{k}", k + 1
        return name

    def copy(self) -> Graph:
        """A copy that shares only the constant arrays (treat those as immutable: replace, never write into them)."""
        nodes = [
            Node(n.name, n.op, list(n.inputs), _copy_json(n.attrs), n.weight, n.bias, n.residual, n.source)
            for n in self.nodes
        ]
        types = dict(self.types)
        return Graph(list(self.inputs), list(self.outputs), nodes, dict(self.constants), types, self.structure)

    def __str__(self) -> str:
        from bitdial.graph.text import format_graph

        return format_graph(self)


def samples_per_step(types: Mapping[str, TensorType], most: int) -> int:
    """At most `most` samples, and so few that the largest of their values has at most STEP_ELEMENTS elements; at least 1."""
    largest = max((t.elements for t in types.values()), default=1)
    return max(1, min(most, STEP_ELEMENTS // max(1, largest)))


def _copy_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy_json(v) for v in value]
    return value
