"""BatchNorm: folded into the conv or linear layer before it, else written as a depthwise 1x1 convolution."""

from __future__ import annotations

import numpy as np

from bitdial.graph.ir import Array, Graph, Node
from bitdial.graph.passes.edit import fresh_constant, rename_value


def _affine(node: Node, graph: Graph) -> tuple[Array, Array]:
    """BatchNorm as y = scale * x + shift, in float64."""
    gamma, beta, mean, var = (graph.constants[v].astype(np.float64) for v in node.inputs[1:5])
    scale = gamma / np.sqrt(var + node.attrs["eps"])
    return scale, beta - mean * scale


def fold_batch_norm(graph: Graph) -> Graph:
    """Fold each BatchNorm whose input is a conv or linear layer read by nothing else. Weights are copied, so shared
    weights of reused modules stay right."""
    graph = graph.copy()
    producers, consumers = graph.producers(), graph.consumers()
    for node in [n for n in graph.nodes if n.op == "batch_norm"]:
        before = producers.get(node.inputs[0])
        if before is None or before.op not in ("conv", "linear") or len(consumers[before.name]) != 1:
            continue
        if before.residual is not None or "activation" in before.attrs or before.name in graph.outputs:
            continue
        if before.op == "linear" and len(graph.types[before.name].shape) != 2:
            continue  # channel axis 1 is not the output axis of the linear layer
        scale, shift = _affine(node, graph)
        assert before.weight is not None
        weight = graph.constants[before.weight].astype(np.float64)
        bias = graph.constants[before.bias].astype(np.float64) if before.bias is not None else 0.0
        folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        before.weight = fresh_constant(graph, before.weight, folded.astype(np.float32))
        before.bias = fresh_constant(graph, f"{before.name}_bias", (bias * scale + shift).astype(np.float32))
        graph.nodes.remove(node)
        rename_value(graph, node.name, before.name)
        producers, consumers = graph.producers(), graph.consumers()
    return graph


def batch_norm_to_conv(graph: Graph) -> Graph:
    """Write every remaining BatchNorm on [N, C, H, W] as a depthwise 1x1 convolution, so that it runs in 8 bits."""
    graph = graph.copy()
    for node in graph.nodes:
        if node.op != "batch_norm" or len(graph.types[node.inputs[0]].shape) != 4:
            continue
        scale, shift = _affine(node, graph)
        node.weight = fresh_constant(graph, f"{node.name}_weight", scale.astype(np.float32).reshape(-1, 1, 1, 1))
        node.bias = fresh_constant(graph, f"{node.name}_bias", shift.astype(np.float32))
        node.op, node.inputs = "conv", node.inputs[:1]
        node.attrs = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": int(scale.shape[0])}
    return graph
