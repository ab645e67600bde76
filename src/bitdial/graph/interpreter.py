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
from bitdial.graph.aten import ALLOWED
from bitdial.graph.inputs import check_inputs
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType, Values
from bitdial.graph.running import Schedule

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

def run_graph(
    graph: Graph,
    inputs: Sequence[Tensor],
    *,
    observe: Callable[[str, Tensor], None] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    enter: Callable[[str, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Evaluate `graph` in float and return its outputs.

    inputs: one tensor per graph input, batch first. observe: called with (value name, tensor) for inputs and every node.
    constants: the graph's constants as tensors, if the caller keeps them (`constant_tensors`). enter: gives what a conv or linear
    layer (its name) multiplies in the place of its input.
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
        operands = [values[v] for v in node.operands()]
        if enter is not None and node.weight is not None:
            operands[0] = enter(node.name, operands[0])
        return evaluate_node(node, operands, batch)

    Schedule(graph.nodes, {*graph.constants, *graph.outputs}).run(values, evaluate, observe)
    return [values[v] for v in graph.outputs]


def constant_tensors(graph: Values, device: torch.device | str = "cpu") -> dict[str, Tensor]:
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
    if node.op in _MOVEMENT:
        return _MOVEMENT[node.op](operands[0], node.attrs, batch)
    meaning = MEANING.get(node.op, _aten if node.op.startswith("aten.") else None)
    if meaning is None:
        raise GraphError(f"node '{node.name}': operator '{node.op}' has no float meaning")
    result = meaning(node, operands, batch)
    return result + node.attrs["raised"] if "raised" in node.attrs else result


def _layer(node: Node, operands: Sequence[Tensor], batch: int) -> Tensor:
    a, (x, weight, *extra) = node.attrs, operands
    bias = extra.pop(0) if node.bias is not None else None
    if a.get("precision") == "bfloat16":
        stored = weight.dtype == torch.uint16
        weight = weight.view(torch.bfloat16).float() if stored else weight.bfloat16().float()
        x = x.bfloat16().float()
    if node.op == "conv":
        y = CONV[weight.dim() - 2](x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    else:
        y = F.linear(x, weight, bias)
    return apply_activation(y if node.residual is None else y + extra.pop(0), a.get("activation"))


def _matmul(node: Node, x: Sequence[Tensor], batch: int) -> Tensor:
    y = torch.matmul(x[0], x[1].transpose(-1, -2) if node.attrs.get("transpose_b") else x[1])
    scale = node.attrs.get("scale", 1.0)
    return apply_activation(y * scale if scale != 1.0 else y, node.attrs.get("activation"))


def _batch_norm(node: Node, x: Sequence[Tensor], batch: int) -> Tensor:
    gamma, beta, mean, var = x[1:5]
    return F.batch_norm(x[0], mean, var, gamma, beta, training=False, eps=node.attrs["eps"])


def _layer_norm(node: Node, x: Sequence[Tensor], batch: int) -> Tensor:
    affine = (x[1] if len(x) > 1 else None, x[2] if len(x) > 2 else None)
    return F.layer_norm(x[0], node.attrs["normalized_shape"], *affine, eps=node.attrs["eps"])


def _max_pool(node: Node, x: Sequence[Tensor], batch: int) -> Tensor:
    a = node.attrs
    return MAX_POOL[len(a["kernel"])](x[0], a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])


def _avg_pool(node: Node, x: Sequence[Tensor], batch: int) -> Tensor:
    a = node.attrs
    return F.avg_pool2d(x[0], a["kernel"], a["stride"], a["padding"], a["ceil_mode"], a["count_include_pad"])


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


# Every operator but those that move values (`_MOVEMENT`), which act alike on any dtype, and the borders of quantized programs.
MEANING: dict[str, Callable[[Node, Sequence[Tensor], int], Tensor]] = {
    "conv": _layer,
    "linear": _layer,
    "matmul": _matmul,
    "add": lambda n, x, batch: apply_activation(x[0] + x[1], n.attrs.get("activation")),
    "mul": lambda n, x, batch: x[0] * x[1],
    "concat": lambda n, x, batch: apply_activation(torch.cat(list(x), dim=n.attrs["axis"]), n.attrs.get("activation")),
    "relu": lambda n, x, batch: F.relu(x[0]),
    "relu6": lambda n, x, batch: F.relu6(x[0]),
    "clamp": lambda n, x, batch: torch.clamp(x[0], n.attrs["lo"], n.attrs["hi"]),
    "sigmoid": lambda n, x, batch: torch.sigmoid(x[0]),
    "hardsigmoid": lambda n, x, batch: F.hardsigmoid(x[0]),
    "hardswish": lambda n, x, batch: F.hardswish(x[0]),
    "silu": lambda n, x, batch: F.silu(x[0]),
    "gelu": lambda n, x, batch: F.gelu(x[0], approximate=n.attrs.get("approximate", "none")),
    "tanh": lambda n, x, batch: torch.tanh(x[0]),
    "leaky_relu": lambda n, x, batch: F.leaky_relu(x[0], n.attrs["slope"]),
    "elu": lambda n, x, batch: F.elu(x[0], n.attrs.get("alpha", 1.0)),
    "softplus": lambda n, x, batch: F.softplus(x[0]),
    "mish": lambda n, x, batch: F.mish(x[0]),
    "mean": lambda n, x, batch: x[0].mean(dim=n.attrs["axes"], keepdim=n.attrs["keepdim"]),
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": lambda n, x, batch: torch.softmax(x[0], dim=n.attrs["axis"]),
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
