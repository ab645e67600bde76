"""Float evaluation of a graph with torch: the meaning of every operator of `bitdial.graph.ir`.

Used to calibrate, to check passes against each other, and by the reference engine for what stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.errors import GraphError
from bitdial.graph.float_ops import ALLOWED
from bitdial.graph.inputs import check_inputs
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.graph.running import Schedule

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

_UNARY: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "relu": lambda x, a: F.relu(x),
    "relu6": lambda x, a: F.relu6(x),
    "clamp": lambda x, a: torch.clamp(x, a["lo"], a["hi"]),
    "sigmoid": lambda x, a: torch.sigmoid(x),
    "hardsigmoid": lambda x, a: F.hardsigmoid(x),
    "hardswish": lambda x, a: F.hardswish(x),
    "silu": lambda x, a: F.silu(x),
    "gelu": lambda x, a: F.gelu(x, approximate=a.get("approximate", "none")),
    "tanh": lambda x, a: torch.tanh(x),
    "leaky_relu": lambda x, a: F.leaky_relu(x, a["slope"]),
    "elu": lambda x, a: F.elu(x, a.get("alpha", 1.0)),
    "softplus": lambda x, a: F.softplus(x),
    "mish": lambda x, a: F.mish(x),
}


def run_graph(
    graph: Graph,
    inputs: Sequence[Tensor],
    *,
    observe: Callable[[str, Tensor], None] | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Evaluate `graph` in float and return its outputs.

    inputs: one tensor per graph input, batch first. observe: called with (value name, tensor) for inputs and every node.
    constants: the graph's constants as tensors, if the caller keeps them (`constant_tensors`).
    Raises InputError for a wrong shape.
    """
    device = inputs[0].device if inputs else torch.device("cpu")
    batch = check_inputs(graph, inputs)
    values: dict[str, Tensor] = dict(constants if constants is not None else constant_tensors(graph, device))
    for name, tensor in zip(graph.inputs, inputs, strict=True):
        values[name] = tensor
        if observe is not None:
            observe(name, tensor)

    def evaluate(node: Node, values: dict[str, Tensor]) -> Tensor:
        return evaluate_node(node, [values[v] for v in node.operands()], batch)

    Schedule(graph.nodes, {*graph.constants, *graph.outputs}).run(values, evaluate, observe)
    return [values[v] for v in graph.outputs]


def constant_tensors(graph: Graph, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The graph's constants as tensors on a device."""
    return {name: torch.tensor(np.asarray(array, order="C"), device=device) for name, array in graph.constants.items()}


def resolve_shape(shape: Sequence[Any], batch: int) -> list[int]:
    """Reshape/expand attribute -> concrete sizes; ["N", k] stands for k * batch."""
    return [d if isinstance(d, int) else batch * int(d[1]) for d in shape]


def type_shape(tensor_type: TensorType, batch: int) -> list[int]:
    return [d.factor * batch if isinstance(d, BatchDim) else d for d in tensor_type.shape]


def apply_activation(x: Tensor, activation: dict[str, Any] | None) -> Tensor:
    """The fused activation of conv, linear, matmul, add and concat."""
    if activation is None:
        return x
    if activation["kind"] == "relu":
        return F.relu(x)
    return torch.clamp(x, activation["lo"], activation["hi"])


def evaluate_node(node: Node, operands: Sequence[Tensor], batch: int) -> Tensor:
    """One node in float. operands: values of `node.operands()` in that order."""
    op, a = node.op, node.attrs
    n = len(node.inputs)
    x = operands[0] if operands else torch.empty(0)
    extra = list(operands[n:])
    if op in ("conv", "linear"):
        weight = extra.pop(0)
        bias = extra.pop(0) if node.bias is not None else None
        if a.get("precision") == "bfloat16":
            stored = weight.dtype == torch.uint16
            weight = weight.view(torch.bfloat16).float() if stored else weight.bfloat16().float()
            x = x.bfloat16().float()
        if op == "conv":
            y = CONV[weight.dim() - 2](x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
        else:
            y = F.linear(x, weight, bias)
        if node.residual is not None:
            y = y + extra.pop(0)
        return apply_activation(y, a.get("activation"))
    if op == "matmul":
        b = operands[1].transpose(-1, -2) if a.get("transpose_b") else operands[1]
        y = torch.matmul(x, b)
        scale = a.get("scale", 1.0)
        return apply_activation(y * scale if scale != 1.0 else y, a.get("activation"))
    if op in _UNARY:
        return _UNARY[op](x, a)
    if op == "add":
        return apply_activation(x + operands[1], a.get("activation"))
    if op == "mul":
        return x * operands[1]
    if op == "concat":
        return apply_activation(torch.cat(list(operands), dim=a["axis"]), a.get("activation"))
    if op == "batch_norm":
        gamma, beta, mean, var = operands[1:5]
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=a["eps"])
    if op == "layer_norm":
        affine = (operands[1] if n > 1 else None, operands[2] if n > 2 else None)
        return F.layer_norm(x, a["normalized_shape"], *affine, eps=a["eps"])
    if op == "softmax":
        return torch.softmax(x, dim=a["axis"])
    if op == "max_pool":
        return MAX_POOL[len(a["kernel"])](x, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    if op == "avg_pool":
        return F.avg_pool2d(x, a["kernel"], a["stride"], a["padding"], a["ceil_mode"], a["count_include_pad"])
    if op == "mean":
        return x.mean(dim=a["axes"], keepdim=a["keepdim"])
    if op in _MOVEMENT:
        return _MOVEMENT[op](x, a, batch)
    if op.startswith("aten."):
        return _aten(node, operands, batch)
    raise GraphError(f"node '{node.name}': operator '{op}' has no float meaning")


def _pad(x: Tensor, a: dict[str, Any], batch: int) -> Tensor:
    flat = [p for before_after in reversed(a["pads"]) for p in before_after]
    return F.pad(x, flat, value=a.get("value", 0.0))


def _slice(x: Tensor, a: dict[str, Any], batch: int) -> Tensor:
    index = [slice(None)] * x.dim()
    index[a["axis"]] = slice(a["start"], a["stop"], a["step"])
    return x[tuple(index)]


_MOVEMENT: dict[str, Callable[[Tensor, dict[str, Any], int], Tensor]] = {
    "reshape": lambda x, a, n: x.reshape(resolve_shape(a["shape"], n)),
    "permute": lambda x, a, n: x.permute(a["axes"]),
    "expand": lambda x, a, n: x.expand(resolve_shape(a["shape"], n)),
    "slice": _slice,
    "select": lambda x, a, n: x.select(a["axis"], a["index"]),
    "pad": _pad,
    "roll": lambda x, a, n: torch.roll(x, a["shifts"], a["axes"]),
    "gather": lambda x, a, n: x.index_select(a["axis"], torch.tensor(a["indices"], device=x.device)),
}


def move(node: Node, x: Tensor, batch: int) -> Tensor:
    """A movement operator (not pooling) on any dtype."""
    return _MOVEMENT[node.op](x, node.attrs, batch)


def _aten(node: Node, operands: Sequence[Tensor], batch: int) -> Tensor:
    if node.op not in ALLOWED:
        raise GraphError(f"node '{node.name}': '{node.op}' is not in the list of float operators")
    _, name, overload = node.op.split(".")
    function = getattr(getattr(torch.ops.aten, name), overload)
    args = [_template(v, operands, batch) for v in node.attrs["args"]]
    kwargs = {k: _template(v, operands, batch) for k, v in node.attrs["kwargs"].items()}
    result = function(*args, **kwargs)
    index = node.attrs.get("output")
    if index is not None:
        result = result[index]
    if not isinstance(result, Tensor):
        raise GraphError(f"node '{node.name}': '{node.op}' did not return a tensor")
    return result


def _template(value: Any, operands: Sequence[Tensor], batch: int) -> Any:
    if isinstance(value, list):
        return [_template(v, operands, batch) for v in value]
    if isinstance(value, dict):
        if "value" in value:
            return operands[value["value"]]
        if "batch" in value:
            return batch * int(value["batch"])
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "float" in value:
            return float(value["float"])
    return value
