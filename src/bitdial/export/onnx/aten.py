"""`aten.*` float operators as ONNX, as far as they map; the others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitdial.export.onnx.builder import data_type
from bitdial.export.onnx.floats import layer_norm, unary
from bitdial.export.onnx.writer import Writer
from bitdial.graph.ir import BatchDim, Node
from bitdial.graph.operators import UNARY

_UNARY = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh",
    "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor", "isinf": "IsInf",
    "isnan": "IsNaN", "log": "Log", "logical_not": "Not", "neg": "Neg", "reciprocal": "Reciprocal", "round": "Round",
    "sgn": "Sign", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
_ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min"}
_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
_REDUCE = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd",
           "logsumexp": "ReduceLogSumExp"}  # fmt: skip


class AtenNode:
    """An `aten.*` node with its arguments by position, values as names."""

    def __init__(self, w: Writer, node: Node) -> None:
        self.w, self.node, self.b = w, node, w.b
        _, self.name, self.overload = node.op.split(".")
        self.args = list(node.attrs["args"])
        self.kwargs = dict(node.attrs["kwargs"])
        self.dtype = w.dtype(node.name)

    def refuse(self, why: str) -> Exception:
        return self.w.unsupported(self.node, why)

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """A plain argument (no value)."""
        value = self.args[position] if position < len(self.args) else self.kwargs.get(keyword, default)
        if isinstance(value, dict):
            if "float" in value:
                return float(value["float"])
            if "dtype" in value:
                return value["dtype"]
            raise self.refuse(f"its argument '{keyword}' is not a constant")
        return value

    def source(self, position: int) -> str | None:
        """Graph value of an argument; None if it is a plain number."""
        value = self.args[position] if position < len(self.args) else None
        if isinstance(value, dict) and "value" in value:
            return self.node.inputs[int(value["value"])]
        return None

    def x(self, position: int = 0, dtype: str | None = None) -> str:
        """ONNX value of an argument, numbers as constants of `dtype`, values cast to it where they differ."""
        source = self.source(position)
        if source is None:
            number = self.argument(position, f"argument {position}")
            if not isinstance(number, (bool, int, float)):
                raise self.refuse(f"its argument {position} is no tensor and no number")
            return self.b.constant(np.array(number, dtype or "float32"))
        value = self.w.value(source)
        if dtype is not None and self.w.dtype(source) != dtype:
            value = self.b.cast(value, data_type(dtype), f"{self.node.name}/cast")
        return value

    def emit(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """The last operator: its output bears the node's name."""
        return self.b.emit(op, inputs, self.node.name, output=self.node.name, **attributes)

    def inner(self, op: str, inputs: list[str], **attributes: Any) -> str:
        return self.b.emit(op, inputs, f"{self.node.name}/t", **attributes)

    def rank(self, position: int = 0) -> int:
        source = self.source(position)
        return 0 if source is None else self.w.rank(source)

    def axes(self, position: int, keyword: str = "dim") -> list[int]:
        """Non-negative axes; all of them where none are given."""
        given = self.argument(position, keyword)
        every = list(range(self.rank()))
        if given is None or given == []:
            return every
        return [every[i] for i in (given if isinstance(given, list) else [given])]


def write_aten(w: Writer, node: Node) -> str:
    """One `aten.*` node. Raises ExportError naming the operator and its module path."""
    a = AtenNode(w, node)
    if node.attrs.get("output") is not None:
        raise a.refuse("it has several outputs")
    if a.name in _UNARY and a.overload == "default":
        return a.emit(_UNARY[a.name], [a.x()])
    if a.name in UNARY - {"clamp", "leaky_relu"} and len(a.args) == 1 and not a.kwargs:
        return unary(w, a.name, {}, a.x(), node.name)
    if a.name in _ARITHMETIC or a.name in ("rsub", "remainder"):
        return _arithmetic(a)
    if a.name in _COMPARE or a.name == "ne":
        return _compare(a)
    if a.name in _LOGICAL:
        return a.emit(_LOGICAL[a.name], [a.x(0, "bool"), a.x(1, "bool")])
    if a.name in _REDUCE:
        return _reduce(a)
    if a.name not in _OTHERS:
        raise a.refuse("it has no ONNX form in bitdial; keep it out of the model, or run the model with bitdial")
    return _OTHERS[a.name](a)


def _arithmetic(a: AtenNode) -> str:
    if a.overload == "Tensor_mode" and a.argument(2, "rounding_mode") is not None:
        raise a.refuse("its rounding mode")
    left, right = a.x(0, a.dtype), a.x(1, a.dtype)
    if a.name == "remainder":
        if a.dtype == "float32":  # the sign of the divisor: x - floor(x / y) * y
            quotient = a.inner("Floor", [a.inner("Div", [left, right])])
            return a.emit("Sub", [left, a.inner("Mul", [quotient, right])])
        return a.emit("Mod", [left, right])
    if a.name == "rsub":
        left, right = right, left
    alpha = a.argument(2, "alpha", 1) if a.name in ("add", "sub", "rsub") else 1
    if alpha != 1:
        factor = a.b.constant(np.array(alpha, a.dtype))
        right = a.inner("Mul", [right, factor])
    return a.emit("Sub" if a.name == "rsub" else _ARITHMETIC[a.name], [left, right])


def _compare(a: AtenNode) -> str:
    sources = [s for s in (a.source(0), a.source(1)) if s is not None]
    dtypes = {a.w.dtype(s) for s in sources}
    numbers = [v for v in a.args[:2] if not isinstance(v, dict)]
    common = dtypes.pop() if len(dtypes) == 1 and not any(isinstance(v, float) for v in numbers) else "float32"
    operands = [a.x(0, common), a.x(1, common)]
    if a.name == "ne":
        return a.emit("Not", [a.inner("Equal", operands)])
    return a.emit(_COMPARE[a.name], operands)


def _reduce(a: AtenNode) -> str:
    keep = bool(a.argument(2, "keepdim", False))
    return a.b.reduce(_REDUCE[a.name], a.x(0, a.dtype), a.axes(1), keep, a.node.name, output=a.node.name)


def _norm(a: AtenNode) -> str:
    order = a.argument(1, "ord", 2)
    if order not in (1, 2):
        raise a.refuse(f"its order {order}")
    op = "ReduceL1" if order == 1 else "ReduceL2"
    keep = bool(a.argument(3, "keepdim", False))
    return a.b.reduce(op, a.x(), a.axes(2), keep, a.node.name, output=a.node.name)


def _clamp(a: AtenNode) -> str:
    if any(isinstance(v, dict) and "value" in v for v in a.args[1:]):
        raise a.refuse("its limits are no constants")
    lo = a.argument(1, "min") if a.name != "clamp_max" else None
    hi = a.argument(2, "max") if a.name == "clamp" else a.argument(1, "max") if a.name == "clamp_max" else None
    if a.dtype != "float32":
        raise a.refuse(f"it works on {a.dtype}")
    return a.b.clip(a.x(0, a.dtype), lo, hi, a.node.name, output=a.node.name)


def _cast(a: AtenNode) -> str:
    return a.emit("Cast", [a.x()], to=data_type(a.dtype))


def _bitwise_not(a: AtenNode) -> str:
    return a.emit("Not" if a.dtype == "bool" else "BitwiseNot", [a.x()])


def _rsqrt(a: AtenNode) -> str:
    return a.emit("Reciprocal", [a.inner("Sqrt", [a.x()])])


def _square(a: AtenNode) -> str:
    return a.emit("Mul", [a.x(), a.x()])


def _log1p(a: AtenNode) -> str:
    return a.emit("Log", [a.inner("Add", [a.x(), a.b.scalar(1.0)])])


def _gelu(a: AtenNode) -> str:
    approximate = a.argument(1, "approximate", "none")
    return unary(a.w, "gelu", {"approximate": approximate}, a.x(), a.node.name)


def _softmax(a: AtenNode) -> str:
    return a.emit("LogSoftmax" if "log" in a.name else "Softmax", [a.x(0, a.dtype)], axis=a.axes(1)[0])


def _safe_softmax(a: AtenNode) -> str:
    """Rows that are -inf throughout, where softmax gives NaN, become 0."""
    x, axis = a.x(), a.axes(1)[0]
    largest = a.b.reduce("ReduceMax", x, [axis], True, f"{a.node.name}/largest")
    empty = a.inner("Equal", [largest, a.b.scalar(-np.inf)])
    return a.emit("Where", [empty, a.b.scalar(0.0), a.inner("Softmax", [x], axis=axis)])


def _where(a: AtenNode) -> str:
    return a.emit("Where", [a.x(0, "bool"), a.x(1, a.dtype), a.x(2, a.dtype)])


def _masked_fill(a: AtenNode) -> str:
    return a.emit("Where", [a.x(1, "bool"), a.x(2, a.dtype), a.x(0, a.dtype)])


def _matmul(a: AtenNode) -> str:
    return a.emit("MatMul", [a.x(0), a.x(1)])


def _einsum(a: AtenNode) -> str:
    operands = [a.w.value(a.node.inputs[int(v["value"])]) for v in a.args[1]]
    return a.emit("Einsum", operands, equation=a.args[0].replace(" ", ""))


def _cumsum(a: AtenNode) -> str:
    return a.emit("CumSum", [a.x(0, a.dtype), a.b.constant(np.array(a.axes(1)[0], np.int64))])


def _arg(a: AtenNode) -> str:
    if a.argument(1, "dim") is None:
        raise a.refuse("it has no axis")
    op = "ArgMax" if a.name == "argmax" else "ArgMin"
    return a.emit(op, [a.x()], axis=a.axes(1)[0], keepdims=int(bool(a.argument(2, "keepdim", False))))


def _group_norm(a: AtenNode) -> str:
    """InstanceNormalization over [N, groups, everything else], then scale and shift per channel."""
    source = a.source(0)
    assert source is not None
    groups, eps = int(a.argument(1, "num_groups")), float(a.argument(4, "eps", 1e-5))
    one, zero = a.b.constant(np.ones(groups, np.float32)), a.b.constant(np.zeros(groups, np.float32))
    flat = a.b.reshape(a.x(), [0, groups, -1], f"{a.node.name}/t")
    normal = a.inner("InstanceNormalization", [flat, one, zero], epsilon=eps)
    shape = a.w.shape_tensor(a.w.shape(source), infer=True)
    affine = [(op, a.source(i)) for op, i in (("Mul", 2), ("Add", 3)) if a.source(i) is not None]
    if not affine:
        return a.emit("Reshape", [normal, shape])
    t = a.inner("Reshape", [normal, shape])
    for op, vector in affine:
        assert vector is not None
        wide = a.b.reshape(a.w.value(vector), [-1, *[1] * (a.rank() - 2)], f"{a.node.name}/t")
        t = a.emit(op, [t, wide]) if vector == affine[-1][1] else a.inner(op, [t, wide])
    return t


def _layer_norm(a: AtenNode) -> str:
    weight, bias = (None if (s := a.source(i)) is None else a.w.value(s) for i in (2, 3))
    shape = [int(d) for d in a.argument(1, "normalized_shape")]
    return layer_norm(a.w, a.x(), weight, bias, shape, float(a.argument(4, "eps", 1e-5)), a.node.name)


def _resize(a: AtenNode) -> str:
    """Nearest and bilinear, where the size is an exact multiple or no scale was given."""
    source = a.source(0)
    assert source is not None
    before, after = a.w.shape(source)[2:], a.w.shape(a.node.name)[2:]
    linear = "linear" in a.name
    corners = bool(a.argument(2, "align_corners", False)) if linear else False
    scales = a.argument(3 if linear else 2, "scale_factors")
    exact = all(isinstance(b, int) and isinstance(c, int) for b, c in zip(before, after, strict=True))
    for old, new, scale in zip(before, after, scales or [], strict=False):
        exact = exact and isinstance(old, int) and old * float(scale) == new
    if not exact or a.overload != "vec":
        raise a.refuse("its scale is no ratio of whole sizes")
    where = "align_corners" if corners else "half_pixel" if linear else "asymmetric"
    axes = list(range(2, 2 + len(after)))
    sizes = a.b.ints([int(d) for d in after if not isinstance(d, BatchDim)])
    return a.emit(
        "Resize", [a.x(), "", "", sizes], axes=axes, mode="linear" if linear else "nearest",
        coordinate_transformation_mode=where, nearest_mode="floor",
    )  # fmt: skip


def _pixel_shuffle(a: AtenNode) -> str:
    return a.emit("DepthToSpace", [a.x()], blocksize=int(a.argument(1, "upscale_factor")), mode="CRD")


def _repeat_interleave(a: AtenNode) -> str:
    source, axis = a.source(0), a.argument(2, "dim")
    assert source is not None
    size = None if axis is None else a.w.shape(source)[axis]
    if not isinstance(size, int):
        raise a.refuse("it repeats along the batch")
    index = np.repeat(np.arange(size), int(a.argument(1, "repeats")))
    return a.b.gather(a.x(), index, axis % a.rank(), a.node.name, output=a.node.name)


def _flip(a: AtenNode) -> str:
    source, t = a.source(0), a.x()
    assert source is not None
    axes = a.axes(1, "dims")
    for i, axis in enumerate(axes):
        size = a.w.shape(source)[axis]
        if not isinstance(size, int):
            raise a.refuse("it turns the batch around")
        last = a.node.name if i == len(axes) - 1 else None
        t = a.b.gather(t, np.arange(size)[::-1], axis, f"{a.node.name}/t", output=last)
    return t


def _embedding(a: AtenNode) -> str:
    return a.emit("Gather", [a.x(0), a.x(1)], axis=0)


def _index_select(a: AtenNode) -> str:
    return a.emit("Gather", [a.x(0), a.x(2)], axis=int(a.argument(1, "dim")))


def _reshape(a: AtenNode) -> str:
    shape = a.w.shape_tensor(a.w.shape(a.node.name), infer=True)
    return a.emit("Reshape", [a.x(), shape])


def _expand(a: AtenNode) -> str:
    return a.emit("Expand", [a.x(), a.w.shape_tensor(a.w.shape(a.node.name), infer=False)])


def _identity(a: AtenNode) -> str:
    return a.emit("Identity", [a.x()])


_OTHERS: dict[str, Callable[[AtenNode], str]] = {
    "linalg_vector_norm": _norm, "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "to": _cast,
    "_to_copy": _cast, "bitwise_not": _bitwise_not, "rsqrt": _rsqrt, "square": _square, "log1p": _log1p, "gelu": _gelu,
    "softmax": _softmax, "_softmax": _softmax, "log_softmax": _softmax, "_log_softmax": _softmax,
    "_safe_softmax": _safe_softmax, "where": _where,
    "masked_fill": _masked_fill, "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "einsum": _einsum, "cumsum": _cumsum,
    "argmax": _arg, "argmin": _arg, "group_norm": _group_norm, "layer_norm": _layer_norm, "upsample_nearest2d": _resize,
    "upsample_bilinear2d": _resize, "pixel_shuffle": _pixel_shuffle, "repeat_interleave": _repeat_interleave,
    "flip": _flip, "embedding": _embedding, "index_select": _index_select, "view": _reshape, "reshape": _reshape,
    "_unsafe_view": _reshape, "flatten": _reshape, "squeeze": _reshape, "unsqueeze": _reshape, "expand": _expand,
    "clone": _identity,
}  # fmt: skip
