"""Functions and normalizations that ONNX writes in parts: SiLU, GELU, hard swish and their like, LayerNorm."""

from __future__ import annotations

import math

from bitdial.graph.ir import BatchDim, Node
from bitdial.graph.onnx.matching import Matcher, Rewrite
from bitdial.graph.passes.edit import fresh_constant


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


# ---- functions of one value


def _product(m: Matcher, node: Node) -> bool:
    """x * f(x), in all orders and with the numbers wherever they stand."""
    for factors, number in ((list(node.inputs), 1.0), m.factors(node.name)):
        if len(factors) == 1 and _hard_sigmoid(m, node, factors[0], number):
            return True
        for x, gate in (factors, factors[::-1]) if len(factors) == 2 else ():
            if m.graph.types.get(x) != m.graph.types[node.name]:
                continue
            for match in (_silu, _hardswish, _gelu, _mish):
                found = match(m, x, gate, number)
                if found is not None:
                    tanh = m.of(_one_more(m, gate), "tanh") is not None
                    attrs: dict[str, object] = {"approximate": "tanh" if tanh else "none"} if found == "gelu" else {}
                    return m.become(node, found, [x], attrs)
    return False


def _one_more(m: Matcher, gate: str) -> str:
    """y of y + 1, else ""."""
    found = m.with_scalar(gate, "add")
    return found[0] if found is not None and found[1] == 1.0 else ""


def _silu(m: Matcher, x: str, gate: str, number: float) -> str | None:
    node = m.of(gate, "sigmoid")
    return "silu" if number == 1.0 and node is not None and node.inputs == [x] else None


def _three_more(m: Matcher, value: str) -> str:
    """x of clamp(x + 3, 0, 6), else ""."""
    node = m.of(value, "relu6", "clamp")
    if node is None or (node.op == "clamp" and (node.attrs["lo"], node.attrs["hi"]) != (0.0, 6.0)):
        return ""
    inner = m.with_scalar(node.inputs[0], "add")
    return inner[0] if inner is not None and inner[1] == 3.0 else ""


def _hardswish(m: Matcher, x: str, gate: str, number: float) -> str | None:
    node = m.of(gate, "hardsigmoid")
    if number == 1.0 and node is not None and node.inputs == [x]:
        return "hardswish"
    return "hardswish" if _close(number, 1 / 6) and _three_more(m, gate) == x else None


def _hard_sigmoid(m: Matcher, node: Node, gate: str, number: float) -> bool:
    x = _three_more(m, gate)
    return bool(x) and _close(number, 1 / 6) and m.become(node, "hardsigmoid", [x], {})


def _gelu(m: Matcher, x: str, gate: str, number: float) -> str | None:
    if not _close(number, 0.5):
        return None
    node = m.of(_one_more(m, gate), "aten.erf.default", "tanh")
    if node is None:
        return None
    inside = m.with_scalar(node.inputs[0], "mul")
    if inside is None:
        return None
    if node.op == "aten.erf.default":
        return "gelu" if inside[0] == x and _close(inside[1], math.sqrt(0.5)) else None
    if not _close(inside[1], math.sqrt(2 / math.pi)):
        return None
    add = m.of(inside[0], "add")  # x + 0.044715 x^3
    if add is None:
        return None
    for first, second in (add.inputs, add.inputs[::-1]):
        factors, share = m.factors(second)
        cubed = m.of(factors[0], "aten.pow.Tensor_Scalar") if len(factors) == 1 else None
        is_cube = factors == [x] * 3 or (cubed is not None and cubed.inputs == [x] and cubed.attrs["args"][1] == 3.0)
        if first == x and is_cube and _close(share, 0.044715):
            return "gelu"
    return None


def _mish(m: Matcher, x: str, gate: str, number: float) -> str | None:
    node = m.of(gate, "tanh")
    inner = m.of(node.inputs[0], "softplus") if node is not None else None
    return "mish" if number == 1.0 and inner is not None and inner.inputs == [x] else None


def _bounds(m: Matcher, node: Node) -> tuple[str, float, float] | None:
    """(x, lo, hi) of a bound from one side or both."""
    if node.op == "relu":
        return node.inputs[0], 0.0, math.inf
    if node.op == "aten.clamp.default":
        x, lo, hi = node.attrs["args"]
        numbers = x == {"value": 0} and all(v is None or isinstance(v, float) for v in (lo, hi))
        return (node.inputs[0], -math.inf if lo is None else lo, math.inf if hi is None else hi) if numbers else None
    found = m.with_scalar(node.name, node.op)
    if found is None:
        return None
    return (found[0], found[1], math.inf) if node.op == "aten.maximum.default" else (found[0], -math.inf, found[1])


_BOUNDS = ("relu", "aten.clamp.default", "aten.maximum.default", "aten.minimum.default")


def _clamp(m: Matcher, node: Node) -> bool:
    """A bound from below and one from above."""
    outer = _bounds(m, node)
    before = m.of(outer[0], *_BOUNDS) if outer is not None else None
    inner = _bounds(m, before) if before is not None and m.readers[before.name] == 1 else None
    if outer is None or inner is None or m.graph.types[node.name] != m.graph.types.get(inner[0]):
        return False
    lo, hi = (min(max(bound, outer[1]), outer[2]) for bound in inner[1:])
    if not math.isfinite(lo) or not math.isfinite(hi):
        return False
    six = (lo, hi) == (0.0, 6.0)
    return m.become(node, "relu6" if six else "clamp", [inner[0]], {} if six else {"lo": lo, "hi": hi})


# ---- layer norm


def _deviation(m: Matcher, value: str) -> tuple[str, list[int]] | None:
    """(x, axes) of x - mean(x)."""
    node = m.of(value, "aten.sub.Tensor")
    if node is None or len(node.inputs) != 2 or node.attrs["args"] != [{"value": 0}, {"value": 1}] or node.attrs["kwargs"]:
        return None
    average = m.of(node.inputs[1], "mean")
    if average is None or average.inputs != [node.inputs[0]] or not average.attrs["keepdim"]:
        return None
    return node.inputs[0], list(average.attrs["axes"])


def _layer_norm(m: Matcher, node: Node) -> bool:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) over the last axes."""
    if len(node.inputs) != 2 or node.attrs["args"] != [{"value": 0}, {"value": 1}] or node.attrs["kwargs"]:
        return False
    top, root = _deviation(m, node.inputs[0]), m.of(node.inputs[1], "aten.sqrt.default")
    shifted = m.with_scalar(root.inputs[0], "add") if root is not None else None
    variance = m.of(shifted[0], "mean") if shifted is not None else None
    if top is None or shifted is None or variance is None or not variance.attrs["keepdim"]:
        return False
    square = m.producers.get(variance.inputs[0])
    if square is None or not (
        (square.op == "aten.pow.Tensor_Scalar" and square.attrs["args"][1] == 2.0)
        or (square.op == "mul" and square.inputs[0] == square.inputs[1])
    ):
        return False
    x, axes = top
    shape = m.graph.types[x].shape
    last = list(range(len(shape) - len(axes), len(shape)))
    if _deviation(m, square.inputs[0]) != top or sorted(axes) != last or list(variance.attrs["axes"]) != axes:
        return False
    sizes = [d for d in shape[len(shape) - len(axes) :] if not isinstance(d, BatchDim)]
    return m.become(node, "layer_norm", [x], {"normalized_shape": sizes, "eps": shifted[1]})


def _norm_parameter(m: Matcher, node: Node) -> bool:
    """A factor behind a plain layer norm is its weight, what is added then its bias."""
    for value, other in (node.inputs, node.inputs[::-1]):
        norm = m.of(value, "layer_norm")
        array = m.graph.constants.get(other)
        if norm is None or array is None or m.readers[value] != 1 or len(norm.inputs) != (1 if node.op == "mul" else 2):
            continue
        shape = tuple(norm.attrs["normalized_shape"])
        if array.shape[-len(shape) :] != shape or array.size != math.prod(shape):
            continue
        parameter = other if array.shape == shape else fresh_constant(m.graph, other, array.reshape(shape))
        return m.become(node, "layer_norm", [*norm.inputs, parameter], norm.attrs)
    return False


# ---- group norm


def _group_norm(m: Matcher, node: Node) -> bool:
    """A plain instance norm of [N, groups, all else], back in the shape from before."""
    norm = m.of(node.inputs[0], "aten.instance_norm.default")
    before = m.of(norm.inputs[0], "reshape") if norm is not None else None
    if norm is None or before is None or m.graph.types[node.name] != m.graph.types.get(before.inputs[0]):
        return False
    shape, folded = m.graph.types[node.name].shape, m.graph.types[before.name].shape
    scale, shift = (m.graph.constants.get(v) for v in (norm.inputs + ["", ""])[1:3])
    plain = scale is not None and shift is not None and bool((scale == 1.0).all()) and bool((shift == 0.0).all())
    if not plain or len(folded) != 3 or folded[0] != shape[0] or len(shape) < 2:
        return False
    channels, groups = shape[1], folded[1]
    if isinstance(channels, BatchDim) or isinstance(groups, BatchDim) or channels % groups:
        return False
    args = [{"value": 0}, groups, None, None, norm.attrs["args"][7], False]
    return m.become(node, "aten.group_norm.default", list(before.inputs), {"args": args, "kwargs": {}})


def _group_norm_parameter(m: Matcher, node: Node) -> bool:
    """A factor per channel behind a plain group norm is its weight, what is added then its bias."""
    place = 2 if node.op == "mul" else 3
    for value, other in (node.inputs, node.inputs[::-1]):
        norm, array = m.of(value, "aten.group_norm.default"), m.graph.constants.get(other)
        if norm is None or array is None or m.readers[value] != 1 or len(norm.inputs) != place - 1:
            continue
        shape = m.graph.types[value].shape
        full = (1,) * (len(shape) - array.ndim) + array.shape
        if len(full) != len(shape) or array.size != shape[1] or full[1] != shape[1]:
            continue
        parameter = fresh_constant(m.graph, other, array.reshape(-1))
        args = list(norm.attrs["args"])
        args[place] = {"value": place - 1}
        return m.become(node, norm.op, [*norm.inputs, parameter], {"args": args, "kwargs": {}})
    return False


REWRITES: tuple[tuple[str, Rewrite], ...] = (
    *((op, _clamp) for op in _BOUNDS),
    ("mul", _product),
    ("aten.div.Tensor", _layer_norm),
    ("mul", _norm_parameter),
    ("add", _norm_parameter),
    ("reshape", _group_norm),
    ("mul", _group_norm_parameter),
    ("add", _group_norm_parameter),
)
