"""Converters of layers: convolutions, matrix products, normalizations, pools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bitdial.graph.ir import Array
from bitdial.graph.onnx.call import Call
from bitdial.graph.operators import OPERATORS
from bitdial.graph.shapes import broadcast

Pads = list[list[int]]  # [before, after] per spatial axis


def conv(c: Call) -> Any:
    x, w, b = c.input(0), c.input(1), c.input(2)
    _check_float(c, x, w, b)
    rank = c.rank(w) - 2
    if not 1 <= rank <= 3 or c.rank(x) != rank + 2:
        raise c.refuse(f"a convolution over {rank} dimensions of a value with {c.rank(x)} axes")
    kernel = [c.size(d) for d in c.shape(w)[2:]]
    if list(c.attribute("kernel_shape", kernel)) != kernel:
        raise c.refuse("its kernel_shape differs from its weight")
    stride, dilation = _per_axis(c, "strides", rank), _per_axis(c, "dilations", rank)
    groups = int(c.attribute("group", 1))
    if groups < 1:
        raise c.refuse(f"it has {groups} groups")
    pads = _pads(c, c.sizes(x)[1:], kernel, stride, dilation)
    padding = [min(pair) for pair in pads]
    x = c.pad(x, [[0, 0], [0, 0], *([p[0] - q, p[1] - q] for p, q in zip(pads, padding, strict=True))])
    if isinstance(w, np.ndarray) and (b is None or isinstance(b, np.ndarray)):
        attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return c.emit("conv", [x], attrs, weight=w, bias=b)
    return c.aten("convolution.default", x, w, b, stride, padding, dilation, False, [0] * rank, groups)


def conv_transpose(c: Call) -> Any:
    x, w, b = c.input(0), c.input(1), c.input(2)
    _check_float(c, x, w, b)
    rank = c.rank(w) - 2
    if not 1 <= rank <= 3:
        raise c.refuse(f"a transposed convolution over {rank} dimensions")
    kernel = [c.size(d) for d in c.shape(w)[2:]]
    stride, dilation = _per_axis(c, "strides", rank), _per_axis(c, "dilations", rank)
    extra = [int(v) for v in c.attribute("output_padding", [0] * rank)]
    groups = int(c.attribute("group", 1))
    spatial = c.sizes(x)[1:]
    full = [(d - 1) * s + q * (k - 1) + 1 for d, s, q, k in zip(spatial, stride, dilation, kernel, strict=True)]
    target = c.attribute("output_shape")
    auto = c.attribute("auto_pad", "NOTSET")
    if target is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        target = [d * s for d, s in zip(spatial, stride, strict=True)]
    if target is not None:
        total = [f + e - int(t) for f, e, t in zip(full, extra, target, strict=True)]
        small = [t // 2 for t in total]
        pads = [[t - s, s] if auto == "SAME_LOWER" else [s, t - s] for s, t in zip(small, total, strict=True)]
    else:
        pads = _explicit(c, rank) if auto == "NOTSET" else [[0, 0]] * rank
    # uneven padding of a transposed convolution cuts its result: pad less, and cut the rest away
    if any(n < 0 for pair in pads for n in pair):
        raise c.refuse("its padding is negative")
    padding = [min(pair) for pair in pads]
    op = {1: "conv_transpose1d.default", 2: "conv_transpose2d.input", 3: "conv_transpose3d.input"}[rank]
    whole = [e for e, pair in zip(extra, pads, strict=True) if e and pair[0] != pair[1]]
    if whole:
        raise c.refuse("it has output_padding and uneven padding")
    y = c.aten(op, x, w, b, stride, padding, extra, groups, dilation)
    for i, (before, after) in enumerate(pads):
        cut = [before - padding[i], after - padding[i]]
        y = c.slice(y, i + 2, cut[0], c.size(c.shape(y)[i + 2]) - cut[1])
    return y


def gemm(c: Call) -> Any:
    a, b, bias = c.input(0), c.input(1), c.input(2)
    alpha, beta = float(c.attribute("alpha", 1.0)), float(c.attribute("beta", 1.0))
    turn_a, turn_b = bool(c.attribute("transA", 0)), bool(c.attribute("transB", 0))
    _check_float(c, a, b, bias)
    if c.rank(a) != 2 or c.rank(b) != 2:
        raise c.refuse("its operands are no matrices")
    if turn_a:
        a = c.permute(a, [1, 0])
    if isinstance(b, np.ndarray) and not isinstance(a, np.ndarray):
        w = b if turn_b else c.transposed(b)
        w = w if alpha == 1.0 else (w * np.float32(alpha)).astype(np.float32)
        if isinstance(bias, np.ndarray) and bias.size in (1, w.shape[0]) and bias.shape[-1:] in ((), (1,), (w.shape[0],)):
            row = np.broadcast_to(bias.reshape(-1), (w.shape[0],))
            own = row if beta == 1.0 else row * np.float32(beta)
            own = bias if bias.shape == own.shape and beta == 1.0 else np.ascontiguousarray(own, np.float32)
            return c.emit("linear", [a], weight=w, bias=own)
        y = c.emit("linear", [a], weight=w)
    else:
        y = c.emit("matmul", [a, b], {"transpose_b": turn_b})
        y = y if alpha == 1.0 else c.emit("mul", [y, np.array(alpha, np.float32)])
    if bias is None or beta == 0.0:
        return y
    bias = bias if beta == 1.0 else c.emit("mul", [bias, np.array(beta, np.float32)])
    return c.emit("add", [y, bias])


def matmul(c: Call) -> Any:
    a, b = c.inputs
    if c.dtype(a) != c.dtype(b):
        raise c.refuse(f"it multiplies {c.dtype(a)} and {c.dtype(b)}")
    if not c.float32(a, b):
        return c.aten("matmul.default", a, b)
    weight = isinstance(b, np.ndarray) and not isinstance(a, np.ndarray) and 2 <= b.ndim <= c.rank(a)
    if weight and b.size == b.shape[-1] * b.shape[-2]:
        b = b if b.ndim == 2 else c.importer.keep(b.reshape(b.shape[-2:]))
        return c.emit("linear", [a], weight=c.transposed(b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) or c.rank(a) < 2 or c.rank(b) < 2:
        return c.aten("matmul.default", a, b)
    return c.emit("matmul", [a, b], {"transpose_b": False})


def einsum(c: Call) -> Any:
    return c.aten("einsum.default", str(c.attribute("equation", "")).replace(" ", ""), list(c.inputs))


def batch_norm(c: Call) -> Any:
    if c.attribute("training_mode", 0) and isinstance(c.inputs[0], np.ndarray):
        return [_standardized(c)]
    if c.attribute("training_mode", 0):
        raise c.refuse("it is in training mode: export the model in evaluation mode")
    parameters = [c.constant(i) for i in range(1, 5)]
    _check_float(c, *c.inputs)
    return c.emit("batch_norm", [c.inputs[0], *parameters], {"eps": float(c.attribute("epsilon", 1e-5))})


def _standardized(c: Call) -> Any:
    """A norm in training mode of a constant, by its own statistics: how weights are standardized."""
    x, scale, shift = (torch.from_numpy(np.array(c.constant(i))) for i in range(3))
    y = F.batch_norm(x, None, None, scale, shift, training=True, eps=float(c.attribute("epsilon", 1e-5)))
    return c.importer.keep(y.numpy())


def layer_norm(c: Call) -> Any:
    x, parameters = c.input(0), [c.input(1), c.input(2)]
    _check_float(c, x, *parameters)
    axis = c.axis(int(c.attribute("axis", -1)), x)
    shape = [c.size(d) for d in c.shape(x)[axis:]]
    own = [
        np.ascontiguousarray(np.broadcast_to(p, shape)) if isinstance(p, np.ndarray) and p.shape != tuple(shape) else p
        for p in parameters
        if p is not None
    ]
    return c.emit("layer_norm", [x, *own], {"normalized_shape": shape, "eps": float(c.attribute("epsilon", 1e-5))})


def instance_norm(c: Call) -> Any:
    x, w, b = c.inputs
    return c.aten("instance_norm.default", x, w, b, None, None, True, 0.0, float(c.attribute("epsilon", 1e-5)), False)


def group_norm(c: Call) -> Any:
    x, w, b = c.inputs
    if c.shape(w) != (c.shape(x)[1],):
        raise c.refuse("its scale is per group (opset 18); from opset 21 it is per channel")
    return c.aten("group_norm.default", x, int(c.attribute("num_groups", 1)), w, b, float(c.attribute("epsilon", 1e-5)), False)


def softmax(c: Call) -> Any:
    x = c.inputs[0]
    axis = c.axis(int(c.attribute("axis", 1 if c.opset < 13 else -1)), x)
    shape, flat = c.shape(x), c.opset < 13 and axis != c.rank(x) - 1
    if flat:  # older files: over all axes from this one on
        x = c.reshape(x, (*shape[:axis], int(np.prod([c.size(d) for d in shape[axis:]]))))
    axis = c.own_axis(axis, x)
    if c.op == "LogSoftmax" or not c.float32(x):
        y = c.aten("log_softmax.int" if c.op == "LogSoftmax" else "softmax.int", x, axis)
    else:
        y = c.emit("softmax", [x], {"axis": axis})
    return c.reshape(y, shape) if flat else y


# ---- pools


def max_pool(c: Call) -> Any:
    x = c.inputs[0]
    rank, kernel, stride, dilation, pads, ceil_mode = _window(c)
    padding = [min(pair) for pair in pads]
    even = all(a == b and 2 * a <= k for (a, b), k in zip(pads, kernel, strict=True))
    if even:
        attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
        return [c.emit("max_pool", [x], attrs)]
    if ceil_mode:
        raise c.refuse("it has ceil_mode and uneven padding")
    producer = next((n for n in reversed(c.importer.graph.nodes) if n.name == x), None)
    pairs: Pads = [[0, 0], [0, 0], *pads]
    if producer is not None and producer.op in OPERATORS and OPERATORS[producer.op].non_negative == "always":
        x = c.pad(x, pairs)  # nothing is below zero there
        attrs = {"kernel": kernel, "stride": stride, "padding": [0] * rank, "dilation": dilation, "ceil_mode": False}
        return [c.emit("max_pool", [x], attrs)]
    x = c.aten("constant_pad_nd.default", x, [n for pair in reversed(pads) for n in pair], float("-inf"))
    return [c.aten(f"max_pool{rank}d.default", x, kernel, stride, [0] * rank, dilation, False)]


def avg_pool(c: Call) -> Any:
    x = c.inputs[0]
    rank, kernel, stride, dilation, pads, ceil_mode = _window(c)
    include = bool(c.attribute("count_include_pad", 0))
    if dilation != [1] * rank:
        raise c.refuse("it has dilations")
    if all(a == b and 2 * a <= k for (a, b), k in zip(pads, kernel, strict=True)):
        return _average(c, x, kernel, stride, [a for a, _ in pads], ceil_mode, include)
    if ceil_mode:
        raise c.refuse("it has ceil_mode and uneven padding")
    spatial = c.sizes(x)[1:]
    y = _average(c, c.pad(x, [[0, 0], [0, 0], *pads]), kernel, stride, [0] * rank, False, True)
    if include:
        return y
    inside = F.pad(torch.ones(1, 1, *spatial), [n for pair in reversed(pads) for n in pair])
    pool: Callable[..., torch.Tensor] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    share = pool(inside, kernel, stride).numpy()  # of every window that lies on the input
    return c.emit("mul", [y, (1.0 / np.maximum(share, np.float32(1e-12))).astype(np.float32)])


def _average(
    c: Call, x: Any, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, include: bool
) -> Any:
    if len(kernel) == 2 and c.float32(x):
        attrs = {
            "kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode, "count_include_pad": include,
        }  # fmt: skip
        return c.emit("avg_pool", [x], attrs)
    return c.aten(f"avg_pool{len(kernel)}d.default", x, kernel, stride, padding, ceil_mode, include)


def global_pool(c: Call) -> Any:
    x = c.inputs[0]
    axes = list(range(2, c.rank(x)))
    if c.op == "GlobalMaxPool":
        return c.aten("amax.default", x, axes, True)
    return c.emit("mean", [x], {"axes": axes, "keepdim": True})


# ---- windows


def _window(c: Call) -> tuple[int, list[int], list[int], list[int], Pads, bool]:
    """(rank, kernel, stride, dilation, pads, ceil_mode) of a pool."""
    x = c.inputs[0]
    kernel = [int(k) for k in c.attribute("kernel_shape", [])]
    rank = len(kernel)
    if not 1 <= rank <= 3 or c.rank(x) != rank + 2 or min(kernel) < 1:
        raise c.refuse(f"a window {kernel} over a value with {c.rank(x)} axes")
    stride, dilation = _per_axis(c, "strides", rank), _per_axis(c, "dilations", rank)
    return rank, kernel, stride, dilation, _pads(c, c.sizes(x)[1:], kernel, stride, dilation), bool(c.attribute("ceil_mode", 0))


def _per_axis(c: Call, name: str, rank: int) -> list[int]:
    values = [int(v) for v in c.attribute(name, [1] * rank)]
    if len(values) != rank or min(values) < 1:
        raise c.refuse(f"its {name} are {values!s:.80} over {rank} dimensions")
    return values


def _explicit(c: Call, rank: int) -> Pads:
    flat = [int(v) for v in c.attribute("pads", [0] * 2 * rank)]
    if len(flat) != 2 * rank or min(flat) < 0:
        raise c.refuse(f"its pads are {flat!s:.80} over {rank} dimensions")
    return [[flat[i], flat[rank + i]] for i in range(rank)]


def _pads(c: Call, spatial: list[int], kernel: list[int], stride: list[int], dilation: list[int]) -> Pads:
    rank, auto = len(kernel), c.attribute("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for d, k, s, q in zip(spatial, kernel, stride, dilation, strict=True):
            total = max((-(-d // s) - 1) * s + q * (k - 1) + 1 - d, 0)
            less = total // 2
            pads.append([less, total - less] if auto == "SAME_UPPER" else [total - less, less])
        return pads
    if auto == "VALID":
        return [[0, 0]] * rank
    if auto != "NOTSET":
        raise c.refuse(f"its auto_pad is '{auto!s:.40}'")
    return _explicit(c, rank)


def _check_float(c: Call, *values: Any) -> None:
    for value in values:
        if value is not None and c.dtype(value) != "float32":
            raise c.refuse(f"it computes in {c.dtype(value)}: export the model in float32")


def prelu(c: Call) -> Any:
    x, slope = c.inputs
    if isinstance(slope, np.ndarray) and slope.size == 1:
        return c.emit("leaky_relu", [x], {"slope": float(slope.reshape(()))})
    if isinstance(slope, np.ndarray) and c.rank(x) >= 2 and _per_channel(slope, c.rank(x), c.shape(x)[1]):
        return c.aten("prelu.default", x, np.ascontiguousarray(slope.reshape(-1)))
    broadcast(c.shape(x), c.shape(slope))
    low = c.aten("clamp.default", x, None, 0.0)
    return c.emit("add", [c.emit("relu", [x]), c.emit("mul", [low, slope])])


def _per_channel(slope: Array, rank: int, channels: Any) -> bool:
    """Whether a slope that broadcasts to a value lies along its axis 1."""
    full = (1,) * (rank - slope.ndim) + slope.shape
    return slope.size == channels == full[1] and len(full) == rank


CONVERTERS: dict[str, Callable[[Call], Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "MaxPool": max_pool,
    "AveragePool": avg_pool,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "PRelu": prelu,
}
