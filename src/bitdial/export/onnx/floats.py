"""Operators that run in float32, as standard ONNX operators; and float32 forms of conv, linear and matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bitdial.errors import ExportError
from bitdial.export.onnx.builder import BFLOAT16, FLOAT
from bitdial.export.onnx.writer import Writer
from bitdial.graph.bfloat16 import from_bits
from bitdial.graph.ir import Node
from bitdial.graph.operators import OPERATORS
from bitdial.quantization.instructions import Window

FIRST_GELU_OPSET = 20


def fused_activation(w: Writer, t: str, activation: dict[str, Any] | None, output: str) -> str:
    """The fused activation of a float32 result."""
    if activation is None:
        return w.b.emit("Identity", [t], output, output=output)
    if activation["kind"] == "relu":
        return w.b.emit("Relu", [t], output, output=output)
    return w.b.clip(t, activation["lo"], activation["hi"], output, output=output)


def _finish(w: Writer, node: Node, op: str, inputs: list[str], **attributes: Any) -> str:
    """The node's main operator, then its residual and activation; the last one bears the node's name."""
    activation = node.attrs.get("activation")
    last = node.residual is None and activation is None
    t = w.b.emit(op, inputs, f"{node.name}/t", output=node.name if last else None, **attributes)
    if node.residual is not None:
        last = activation is None
        t = w.b.emit("Add", [t, w.value(node.residual)], f"{node.name}/t", output=node.name if last else None)
    return t if activation is None else fused_activation(w, t, activation, node.name)


def _operands(w: Writer, node: Node) -> list[str]:
    """Input and weight of a conv or linear; bfloat16 ones as the float32 numbers that they round to."""
    assert node.weight is not None
    x = w.value(node.inputs[0])
    if node.attrs.get("precision") != "bfloat16":
        return [x, w.value(node.weight)]
    narrow = w.b.cast(x, BFLOAT16, f"{node.name}/bf16")
    weight = w.b.constant(from_bits(w.program.constants[node.weight]), f"{node.name}/w")
    return [w.b.cast(narrow, FLOAT, f"{node.name}/x"), weight]


def conv(w: Writer, node: Node) -> str:
    a = node.attrs
    operands = [*_operands(w, node), *([w.value(node.bias)] if node.bias is not None else [])]
    pads = [*a["padding"], *a["padding"]]
    return _finish(
        w, node, "Conv", operands, strides=a["stride"], pads=pads, dilations=a["dilation"], group=a["groups"]
    )


def linear(w: Writer, node: Node) -> str:
    assert node.weight is not None
    if node.attrs.get("precision") == "bfloat16":
        x, straight = _operands(w, node)
        weight = w.b.emit("Transpose", [straight], f"{node.name}/w", perm=[1, 0])
    elif node.weight in w.program.constants:
        x = w.value(node.inputs[0])
        weight = w.b.constant(np.ascontiguousarray(w.program.constants[node.weight].T), f"{node.name}/w")
    else:
        x, weight = w.value(node.inputs[0]), w.b.emit("Transpose", [w.value(node.weight)], f"{node.name}/w", perm=[1, 0])
    if node.bias is None:
        return _finish(w, node, "MatMul", [x, weight])
    product = w.b.emit("MatMul", [x, weight], f"{node.name}/product")
    return _finish(w, node, "Add", [product, w.value(node.bias)])


def matmul(w: Writer, node: Node) -> str:
    a, b = (w.value(v) for v in node.inputs)
    if node.attrs.get("transpose_b"):
        rank = w.rank(node.inputs[1])
        b = w.b.emit("Transpose", [b], f"{node.name}/t", perm=[*range(rank - 2), rank - 1, rank - 2])
    scale = node.attrs.get("scale", 1.0)
    if scale == 1.0:
        return _finish(w, node, "MatMul", [a, b])
    product = w.b.emit("MatMul", [a, b], f"{node.name}/product")
    return _finish(w, node, "Mul", [product, w.b.scalar(scale)])


def unary(w: Writer, op: str, a: dict[str, Any], x: str, output: str) -> str:
    """One of the graph's activation functions."""
    b = w.b
    if OPERATORS[op].onnx:
        return b.emit(OPERATORS[op].onnx, [x], output, output=output)
    if op == "relu6":
        return b.clip(x, 0.0, 6.0, output, output=output)
    if op == "clamp":
        return b.clip(x, a["lo"], a["hi"], output, output=output)
    if op == "hardsigmoid":
        return b.emit("HardSigmoid", [x], output, output=output, alpha=1.0 / 6.0, beta=0.5)
    if op == "leaky_relu":
        return b.emit("LeakyRelu", [x], output, output=output, alpha=float(a["slope"]))
    if op == "elu":
        return b.emit("Elu", [x], output, output=output, alpha=float(a.get("alpha", 1.0)))
    if op == "silu":
        return b.emit("Mul", [x, b.emit("Sigmoid", [x], f"{output}/t")], output, output=output)
    if op != "gelu":
        raise ExportError(f"'{output}': {op} has no ONNX form here; leave it out of the model, or write one in {__name__}")
    approximate = a.get("approximate", "none")
    if b.opset >= FIRST_GELU_OPSET:
        return b.emit("Gelu", [x], output, output=output, approximate=approximate)
    if approximate == "tanh":
        cube = b.emit("Mul", [x, b.emit("Mul", [x, x], f"{output}/t")], f"{output}/t")
        inner = b.emit("Add", [x, b.emit("Mul", [cube, b.scalar(0.044715)], f"{output}/t")], f"{output}/t")
        inner = b.emit("Mul", [inner, b.scalar(math.sqrt(2.0 / math.pi))], f"{output}/t")
        gate = b.emit("Tanh", [inner], f"{output}/t")
    else:
        gate = b.emit("Erf", [b.emit("Mul", [x, b.scalar(math.sqrt(0.5))], f"{output}/t")], f"{output}/t")
    half = b.emit("Mul", [x, b.scalar(0.5)], f"{output}/t")
    return b.emit("Mul", [half, b.emit("Add", [gate, b.scalar(1.0)], f"{output}/t")], output, output=output)


def _unary(w: Writer, node: Node) -> str:
    raised, x = node.attrs.get("raised"), w.value(node.inputs[0])
    if raised is None:
        return unary(w, node.op, node.attrs, x, node.name)
    below = unary(w, node.op, node.attrs, x, f"{node.name}/below")
    return w.b.emit("Add", [below, w.b.scalar(raised)], node.name, output=node.name)


def _binary(w: Writer, node: Node) -> str:
    return _finish(w, node, "Add" if node.op == "add" else "Mul", [w.value(v) for v in node.inputs])


def _concat(w: Writer, node: Node) -> str:
    return _finish(w, node, "Concat", [w.value(v) for v in node.inputs], axis=node.attrs["axis"])


def _batch_norm(w: Writer, node: Node) -> str:
    return _finish(w, node, "BatchNormalization", [w.value(v) for v in node.inputs], epsilon=node.attrs["eps"])


def layer_norm(
    w: Writer, x: str, weight: str | None, bias: str | None, shape: list[int], eps: float, output: str
) -> str:
    """Over the trailing axes of `shape`."""
    scale = w.b.constant(np.ones(shape, np.float32)) if weight is None else weight
    operands = [x, scale, "" if bias is None else bias]
    return w.b.emit("LayerNormalization", operands, output, output=output, axis=-len(shape), epsilon=eps)


def _layer_norm(w: Writer, node: Node) -> str:
    x, *affine = (w.value(v) for v in node.inputs)
    weight, bias = [*affine, None, None][:2]
    return layer_norm(w, x, weight, bias, list(node.attrs["normalized_shape"]), node.attrs["eps"], node.name)


def _softmax(w: Writer, node: Node) -> str:
    return _finish(w, node, "Softmax", [w.value(node.inputs[0])], axis=node.attrs["axis"])


def _mean(w: Writer, node: Node) -> str:
    a = node.attrs
    x = w.value(node.inputs[0])
    return w.b.reduce("ReduceMean", x, a["axes"], a["keepdim"], node.name, output=node.name)


def end_pads(w: Writer, name: str, value: str, a: Window) -> list[int]:
    """Padding after each spatial axis with which a pool that rounds down has the output size of the graph."""
    result = []
    for i, (size, out) in enumerate(zip(w.shape(value)[2:], w.shape(name)[2:], strict=True)):
        assert isinstance(size, int) and isinstance(out, int)
        span = a.dilation[i] * (a.kernel[i] - 1) + 1
        result.append(max(a.padding[i], (out - 1) * a.stride[i] + span - size - a.padding[i]))
    return result


def max_pool(w: Writer, name: str, value: str, a: Window, ceil_mode: bool) -> str:
    """On float32 and 8-bit values; padded cells never win."""
    pads = [*a.padding, *(end_pads(w, name, value, a) if ceil_mode else a.padding)]
    return w.b.emit(
        "MaxPool", [w.value(value)], name, output=name, kernel_shape=a.kernel, strides=a.stride, pads=pads, dilations=a.dilation
    )


def _max_pool(w: Writer, node: Node) -> str:
    return max_pool(w, node.name, node.inputs[0], Window.of(node.attrs), node.attrs["ceil_mode"])


def window_sum(w: Writer, name: str, value: str, a: Window, x: str, pads: list[int]) -> str:
    """Sums over windows of [N, C, H, W]: a depthwise convolution with ones. x: `value` as float32."""
    channels = w.shape(value)[1]
    assert isinstance(channels, int)
    one = w.b.onnx.helper.make_tensor("one", FLOAT, [1], [1.0])
    ones = w.b.emit("ConstantOfShape", [w.b.ints([channels, 1, *a.kernel])], f"{name}/ones", value=one)
    return w.b.emit("Conv", [x, ones], f"{name}/sum", strides=a.stride, pads=pads, group=channels)


def _avg_pool(w: Writer, node: Node) -> str:
    a = node.attrs
    x = w.value(node.inputs[0])
    if not a["ceil_mode"]:
        return w.b.emit(
            "AveragePool", [x], node.name, output=node.name, kernel_shape=a["kernel"], strides=a["stride"],
            pads=[*a["padding"], *a["padding"]], count_include_pad=int(a["count_include_pad"]),
        )  # fmt: skip
    counts = np.ones((), np.float32)  # runtimes differ in what the last windows of ceil_mode divide by: torch's counts
    for i in range(2):
        size, out = w.shape(node.inputs[0])[2 + i], w.shape(node.name)[2 + i]
        assert isinstance(size, int) and isinstance(out, int)
        start = np.arange(out) * a["stride"][i] - a["padding"][i]
        stop = np.minimum(start + a["kernel"][i], size + a["padding"][i])
        inside = (np.minimum(stop, size) - np.maximum(start, 0)).astype(np.float32)
        along = (stop - start).astype(np.float32) if a["count_include_pad"] else inside
        counts = counts * along.reshape([-1, 1] if i == 0 else [1, -1])
    window = Window.of(node.attrs)
    ends = end_pads(w, node.name, node.inputs[0], window)
    total = window_sum(w, node.name, node.inputs[0], window, x, [*window.padding, *ends])
    return w.b.emit("Div", [total, w.b.constant(counts)], node.name, output=node.name)


FLOAT_OPS: dict[str, Callable[[Writer, Node], str]] = {
    "conv": conv, "linear": linear, "matmul": matmul, "add": _binary, "mul": _binary, "concat": _concat,
    "batch_norm": _batch_norm, "layer_norm": _layer_norm, "softmax": _softmax, "mean": _mean, "max_pool": _max_pool,
    "avg_pool": _avg_pool, "silu": _unary, "gelu": _unary, "relu6": _unary, "clamp": _unary, "hardsigmoid": _unary,
    "leaky_relu": _unary, "elu": _unary, **{name: _unary for name, operator in OPERATORS.items() if operator.onnx},
}  # fmt: skip
