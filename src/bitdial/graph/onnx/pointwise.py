"""Converters of operators that work value by value, and of reductions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bitdial.graph.ir import Array
from bitdial.graph.onnx.call import Call
from bitdial.graph.operators import OPERATORS

_LARGEST = float(np.finfo(np.float32).max)
_NAMED = {o.onnx: o.name for o in OPERATORS.values() if o.onnx}  # the same function, without attributes
_ATEN = {
    name: f"{name.lower()}.default"
    for name in "Abs Neg Exp Log Sqrt Reciprocal Erf Floor Ceil Round Sign Sin Cos Tan Asin Acos Atan Sinh Cosh".split()
} | {"Not": "logical_not.default", "IsNaN": "isnan.default"}
_COMPARISONS = {
    "Equal": "eq.Tensor", "Less": "lt.Tensor", "LessOrEqual": "le.Tensor", "Greater": "gt.Tensor",
    "GreaterOrEqual": "ge.Tensor", "And": "logical_and.default", "Or": "logical_or.default", "Xor": "logical_xor.default",
}  # fmt: skip


def named(c: Call) -> Any:
    if not c.float32(c.inputs[0]):
        return c.aten(f"{_NAMED[c.op]}.default", c.inputs[0])
    return c.emit(_NAMED[c.op], [c.inputs[0]])


def elementary(c: Call) -> Any:
    x = c.inputs[0]
    if c.op == "Neg" and c.float32(x):
        return c.emit("mul", [x, np.array(-1.0, np.float32)])
    return c.aten(_ATEN[c.op], x)


def comparison(c: Call) -> Any:
    return c.aten(_COMPARISONS[c.op], *c.inputs)


def clip(c: Call) -> Any:
    x = c.inputs[0]
    bounds = [c.input(1), c.input(2)]
    if any(b is not None and not isinstance(b, np.ndarray) for b in bounds):
        return c.aten("clamp.Tensor", x, *bounds)
    lo, hi = c.number(1, -_LARGEST), c.number(2, _LARGEST)
    lo, hi = c.attribute("min", lo), c.attribute("max", hi)
    low = None if lo <= -_LARGEST else lo
    high = None if hi >= _LARGEST else hi
    if low is None and high is None:
        return x
    if not c.float32(x):
        integer = c.dtype(x).startswith(("int", "uint"))
        return c.aten("clamp.default", x, *(None if v is None else int(v) if integer else float(v) for v in (low, high)))
    if low == 0.0 and high is None:
        return c.emit("relu", [x])
    if low is None or high is None:
        return c.aten("clamp.default", x, *(None if v is None else float(v) for v in (low, high)))
    if (low, high) == (0.0, 6.0):
        return c.emit("relu6", [x])
    return c.emit("clamp", [x], {"lo": float(low), "hi": float(high)})


def leaky_relu(c: Call) -> Any:
    return c.emit("leaky_relu", [c.inputs[0]], {"slope": float(c.attribute("alpha", 0.01))})


def elu(c: Call) -> Any:
    return c.emit("elu", [c.inputs[0]], {"alpha": float(c.attribute("alpha", 1.0))})


def gelu(c: Call) -> Any:
    return c.emit("gelu", [c.inputs[0]], {"approximate": str(c.attribute("approximate", "none"))})


def swish(c: Call) -> Any:
    alpha = float(c.attribute("alpha", 1.0))
    x = c.inputs[0]
    if alpha == 1.0:
        return c.emit("silu", [x])
    gate = c.emit("sigmoid", [c.emit("mul", [x, np.array(alpha, np.float32)])])
    return c.emit("mul", [x, gate])


def hard_sigmoid(c: Call) -> Any:
    x = c.inputs[0]
    alpha, beta = float(c.attribute("alpha", 0.2)), float(c.attribute("beta", 0.5))
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return c.emit("hardsigmoid", [x])
    x = c.emit("add", [c.emit("mul", [x, np.array(alpha, np.float32)]), np.array(beta, np.float32)])
    return c.emit("clamp", [x], {"lo": 0.0, "hi": 1.0})


def selu(c: Call) -> Any:
    alpha, gamma = float(c.attribute("alpha", 1.67326319217681884765625)), float(c.attribute("gamma", 1.05070102214813232421875))
    if abs(alpha - 1.6732632) > 1e-6 or abs(gamma - 1.050701) > 1e-6:
        return c.emit("mul", [c.emit("elu", [c.inputs[0]], {"alpha": alpha}), np.array(gamma, np.float32)])
    return c.aten("selu.default", c.inputs[0])


def celu(c: Call) -> Any:
    return c.aten("celu.default", c.inputs[0], float(c.attribute("alpha", 1.0)))


def softsign(c: Call) -> Any:
    x = c.inputs[0]
    return c.aten("div.Tensor", x, c.emit("add", [c.aten("abs.default", x), np.array(1.0, np.float32)]))


def cast(c: Call) -> Any:
    x = c.inputs[0]
    target = _dtype(c, int(c.attribute("to", 1)))
    if c.dtype(x) == target:
        return x
    if isinstance(x, np.ndarray):
        return c.importer.keep(x.astype(target))
    return c.aten("_to_copy.default", x, dtype={"dtype": target})


def _dtype(c: Call, element: int) -> str:
    names = {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 11: "float64"}
    if element not in names:
        raise c.refuse(f"element type {element} is none that bitdial computes in; export the model in float32")
    return names[element]


# ---- of several operands


def add(c: Call) -> Any:
    return _chain(c, lambda a, b: c.emit("add", [a, b]) if c.float32(a, b) else c.aten("add.Tensor", a, b))


def multiply(c: Call) -> Any:
    return _chain(c, lambda a, b: c.emit("mul", [a, b]) if c.float32(a, b) else c.aten("mul.Tensor", a, b))


def extreme(c: Call) -> Any:
    op = "maximum.default" if c.op == "Max" else "minimum.default"
    if c.op == "Max" and len(c.inputs) == 2 and c.float32(*c.inputs):
        for x, zero in (c.inputs, c.inputs[::-1]):
            if isinstance(zero, np.ndarray) and zero.size == 1 and not zero.any() and zero.ndim <= c.rank(x):
                return c.emit("relu", [x])
    return _chain(c, lambda a, b: c.aten(op, a, b))


def _chain(c: Call, function: Callable[[Any, Any], Any]) -> Any:
    result, *rest = c.inputs
    for value in rest:
        result = function(result, value)
    return result


def subtract(c: Call) -> Any:
    a, b = c.inputs
    if c.float32(a, b) and isinstance(b, np.ndarray) and not isinstance(a, np.ndarray):
        return c.emit("add", [a, -b])  # exact
    return c.aten("sub.Tensor", a, b)


def divide(c: Call) -> Any:
    a, b = c.inputs
    if c.float32(a, b) and isinstance(b, np.ndarray) and not isinstance(a, np.ndarray) and _invertible(b):
        return c.emit("mul", [a, (1.0 / b.astype(np.float64)).astype(np.float32)])  # within a unit in the last place
    if c.dtype(a).startswith(("int", "uint")):
        return c.aten("div.Tensor_mode", a, b, rounding_mode="trunc")
    return c.aten("div.Tensor", a, b)


def _invertible(b: Array) -> bool:
    size = np.abs(b)
    return bool(np.all((size > 1e-30) & (size < 1e30)))


def power(c: Call) -> Any:
    a, b = c.inputs
    if isinstance(b, np.ndarray) and b.size == 1 and b.ndim <= c.rank(a) and c.float32(a):
        exponent = float(b.reshape(()))
        if exponent == 0.5:
            return c.aten("sqrt.default", a)
        return a if exponent == 1.0 else c.aten("pow.Tensor_Scalar", a, exponent)
    return c.aten("pow.Tensor_Tensor", a, b)


def modulo(c: Call) -> Any:
    return c.aten("fmod.Tensor" if c.attribute("fmod", 0) else "remainder.Tensor", *c.inputs)


def where(c: Call) -> Any:
    return c.aten("where.self", *c.inputs)


# ---- reductions


def _reduced(c: Call) -> tuple[list[int], bool] | None:
    """(axes, keepdim); None where nothing is to be done."""
    x, axes = c.inputs[0], c.axes()
    if not axes:
        if c.attribute("noop_with_empty_axes", 0):
            return None
        axes = list(range(c.rank(x)))
    return sorted({c.own_axis(a, x) for a in axes}), bool(c.attribute("keepdims", 1))


def mean(c: Call) -> Any:
    x, how = c.inputs[0], _reduced(c)
    if how is None:
        return x
    if not c.float32(x):
        return c.aten("mean.dim", x, *how)
    return c.emit("mean", [x], {"axes": how[0], "keepdim": how[1]})


def reduction(c: Call, op: str, *before: Any) -> Any:
    """before: arguments of the torch operator between the value and the axes."""
    x, how = c.inputs[0], _reduced(c)
    return x if how is None else c.aten(op, x, *before, *how)


def sum_of_squares(c: Call) -> Any:
    x, how = c.inputs[0], _reduced(c)
    square = c.emit("mul", [x, x])
    return square if how is None else c.aten("sum.dim_IntList", square, *how)


def product(c: Call) -> Any:
    x, how = c.inputs[0], _reduced(c)
    for axis in (how[0] if how is not None else [])[::-1]:
        x = c.aten("prod.dim_int", x, axis, how is not None and how[1])
    return x


def arg_extreme(c: Call) -> Any:
    x = c.inputs[0]
    if c.attribute("select_last_index", 0):
        raise c.refuse("it picks the last of equal values")
    axis = c.own_axis(int(c.attribute("axis", 0)), x)
    return c.aten(f"{c.op.lower()}.default", x, axis, bool(c.attribute("keepdims", 1)))


def cumulative_sum(c: Call) -> Any:
    x = c.inputs[0]
    if c.attribute("exclusive", 0) or c.attribute("reverse", 0):
        raise c.refuse("it is exclusive or in reverse")
    return c.aten("cumsum.default", x, c.own_axis(c.ints(1)[0], x))


def top_k(c: Call) -> Any:
    x, (k,) = c.inputs[0], c.ints(1)
    axis = c.own_axis(int(c.attribute("axis", -1)), x)
    if not 0 < k <= c.size(c.shape(x)[axis]):
        raise c.refuse(f"{k} of {c.shape(x)[axis]} values")
    how = (k, axis, bool(c.attribute("largest", 1)), bool(c.attribute("sorted", 1)))
    return [c.aten("topk.default", x, *how, output=0), c.aten("topk.default", x, *how, output=1)]


CONVERTERS: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_NAMED, named),
    **dict.fromkeys(_ATEN, elementary),
    **dict.fromkeys(_COMPARISONS, comparison),
    "Clip": clip,
    "LeakyRelu": leaky_relu,
    "Elu": elu,
    "Gelu": gelu,
    "Swish": swish,
    "HardSigmoid": hard_sigmoid,
    "Selu": selu,
    "Celu": celu,
    "Softsign": softsign,
    "Cast": cast,
    "Add": add,
    "Sum": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Pow": power,
    "Mod": modulo,
    "Min": extreme,
    "Max": extreme,
    "Where": where,
    "ReduceMean": mean,
    "ReduceSum": partial(reduction, op="sum.dim_IntList"),
    "ReduceMax": partial(reduction, op="amax.default"),
    "ReduceMin": partial(reduction, op="amin.default"),
    "ReduceLogSumExp": partial(reduction, op="logsumexp.default"),
    "ReduceL2": lambda c: reduction(c, "linalg_vector_norm.default", 2.0),
    "ReduceL1": lambda c: reduction(c, "linalg_vector_norm.default", 1.0),
    "ReduceSumSquare": sum_of_squares,
    "ReduceProd": product,
    "ArgMax": arg_extreme,
    "ArgMin": arg_extreme,
    "CumSum": cumulative_sum,
    "TopK": top_k,
}
