"""The operators of the float graph, each said once. No torch.

`OPERATORS` holds what is true of an operator wherever it stands; how to compute it, move its channels or write it down is the
business of passes and engines, which keep dictionaries of their own by operator, with a default by kind. What the
operators mean is said at `bitdial.graph.ir`; `aten.*` nodes, of kind "aten", are listed in `bitdial.graph.aten`.

To add a unary function: a line here, its meaning in `bitdial.graph.interpreter`. Quantization makes a table of it, layout lets
channels pass, capture finds it by its aten names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitdial.graph import shapes
from bitdial.graph.ir import Node

Kind = Literal["contraction", "unary", "elementwise", "movement", "reduction", "normalization", "border", "aten"]


@dataclass(frozen=True)
class Operator:
    """name          as `Node.op`
    kind           contraction: products summed over channels; unary: value by value; elementwise: of several operands;
                   movement: places change, values do not, so that 8-bit values keep their scale; reduction: means; normalization;
                   border: between 8-bit and float, in quantized programs only
    shape          rule of its result's shape
    non_negative   "always"; "inputs": where all inputs are; "no"
    keeps_zero     a zero stays a zero, for unary functions
    depth          how far it reaches below zero, for unary functions of which that is known, rounded up; may carry "raised"
    fuses          may carry a fused activation (attribute "activation")
    rounds         its float result depends on the order of sums or on how a function is approximated
    aten           overloads that are this operator and nothing else, for unary functions
    onnx           the ONNX operator that is the same function, for unary functions without attributes
    """

    name: str
    kind: Kind
    shape: shapes.Rule = shapes.same
    non_negative: Literal["always", "inputs", "no"] = "no"
    keeps_zero: bool = False
    depth: float = 0.0
    fuses: bool = False
    rounds: bool = True
    aten: tuple[str, ...] = ()
    onnx: str = ""


def _unary(name: str, *more: str, sign: Literal["always", "no"] = "no", zero: bool = True, onnx: str = "",
           rounds: bool = True, depth: float = 0.0) -> Operator:  # fmt: skip
    aten = tuple(f"aten.{overload}" for overload in (f"{name}.default", *more))
    return Operator(name, "unary", non_negative=sign, keeps_zero=zero, depth=depth, rounds=rounds, aten=aten, onnx=onnx)


def _move(name: str, shape: shapes.Rule) -> Operator:
    return Operator(name, "movement", shape, "inputs", rounds=False)


_TABLE = (
    Operator("conv", "contraction", shapes.conv, fuses=True),
    Operator("linear", "contraction", shapes.linear, fuses=True),
    Operator("matmul", "contraction", shapes.matmul, fuses=True),
    Operator("add", "elementwise", shapes.elementwise, "inputs", fuses=True, rounds=False),
    Operator("mul", "elementwise", shapes.elementwise, "inputs", rounds=False),
    Operator("concat", "elementwise", shapes.concat, "inputs", fuses=True, rounds=False),
    _unary("relu", sign="always", onnx="Relu", rounds=False),
    _unary("relu6", "hardtanh.default", sign="always", rounds=False),
    _unary("clamp", "clamp_min.default", zero=False, rounds=False),  # by its limits: `clamps_to_zero`
    _unary("sigmoid", sign="always", zero=False, onnx="Sigmoid"),
    _unary("hardsigmoid", sign="always", zero=False),
    _unary("hardswish", onnx="HardSwish", depth=0.375),
    _unary("silu", depth=0.2785),
    _unary("gelu", depth=0.1701),  # also as approximated by tanh
    _unary("tanh", onnx="Tanh"),
    _unary("leaky_relu"),
    _unary("elu"),
    _unary("softplus", zero=False, onnx="Softplus"),
    _unary("mish", onnx="Mish", depth=0.3089),
    Operator("mean", "reduction", shapes.mean, "inputs"),
    Operator("avg_pool", "reduction", shapes.pool, "inputs"),
    _move("max_pool", shapes.pool),
    _move("reshape", shapes.reshape),
    _move("permute", shapes.permute),
    _move("expand", shapes.expand),
    _move("slice", shapes.slice_),
    _move("select", shapes.select),
    _move("roll", shapes.axes_inside),
    _move("gather", shapes.gather),
    _move("pad", shapes.pad),  # non-negative with a fill that is: see `quantization.domains`
    Operator("batch_norm", "normalization", shapes.batch_norm),
    Operator("layer_norm", "normalization", shapes.layer_norm),
    Operator("softmax", "normalization", shapes.axes_inside, "always"),
    Operator("quantize", "border", rounds=False),
    Operator("dequantize", "border", rounds=False),
    Operator("table", "border", rounds=False),
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _TABLE}


def of_kind(*kinds: Kind) -> frozenset[str]:
    """Names of the operators of these kinds."""
    return frozenset(name for name, operator in OPERATORS.items() if operator.kind in kinds)


CONTRACTIONS = of_kind("contraction")
UNARY = of_kind("unary")
MOVEMENT = of_kind("movement")


def kind_of(op: str) -> Kind:
    """Kind of an operator by its name; "aten" for all that the table does not have."""
    return OPERATORS[op].kind if op in OPERATORS else "aten"


def softmax_axis(node: Node) -> int | None:
    """The axis of a softmax; None where a node is none, or changes the type as well."""
    if node.op == "softmax":
        return int(node.attrs["axis"])
    if node.op == "aten._safe_softmax.default" and not node.attrs.get("kwargs"):
        args = node.attrs["args"]
        if len(args) == 2 and args[0] == {"value": 0} and isinstance(args[1], int):
            return args[1]
    return None
