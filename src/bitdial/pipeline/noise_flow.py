"""Which values of a network are compared between the two runs of a layer-wise plan, and how noise flows between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitdial.engines.reference.layer_metrics import Noise
from bitdial.graph.ir import Graph, Node
from bitdial.graph.operators import MOVEMENT
from bitdial.selection.layerwise.propagation import Energy, Flow, output_gains

PASS_ON = MOVEMENT | {"quantize", "dequantize"}
JOINS = ("add", "concat")


def samples_of(graph: Graph, layers: Sequence[str]) -> dict[str, int]:
    """Values to compare, with the axis of their channels: inputs and outputs of the layers, whatever several values are computed
    from or to, and the network's outputs. graph: fused, in float."""
    axes: dict[str, int] = {}
    for name in layers:
        node = graph.node(name)
        axis = 1 if node.op == "conv" else -1
        axes.setdefault(node.inputs[0], axis)
        axes.setdefault(name, axis)
    joined = set(graph.outputs)
    for node in graph.nodes:
        operands = activations(graph, node)
        if len(operands) > 1:
            joined |= {node.name, *operands}
    for value in (n.name for n in graph.nodes if n.name in joined):
        rank = len(graph.types[value].shape)
        if rank > 1:
            axes.setdefault(value, 1 if rank == 4 else -1)
    return axes


def activations(graph: Graph, node: Node) -> list[str]:
    """Operands of a node that are computed, each once."""
    return list(dict.fromkeys(v for v in node.operands() if not graph.is_constant(v)))


def energy(noise: Noise, numbers: int) -> Energy:
    """Per sample. numbers: of the value, per sample."""
    return Energy(noise.signal / noise.count * numbers, noise.noise / noise.count * numbers)


def noise_flows(
    graph: Graph, measured: Collection[str], passing: Mapping[str, float], carried: Mapping[str, float]
) -> list[Flow]:
    """How every measured value of a quantized graph comes from other measured ones, in topological order.

    Between two of them may lie values that were not measured: moves pass on the share of numbers they keep, other operations
    are taken as one with the next measured value. passing: of layers with a fused activation. carried: noise energy that a
    layer makes of that of its input, where known.
    """
    flows: list[Flow] = []
    reach: dict[str, dict[str, float]] = {v: {v: 1.0} if v in measured else {} for v in graph.inputs}
    for node in graph.nodes:
        residual = dict(reach.get(node.residual, {})) if node.residual is not None else {}
        sources: dict[str, float] = {}
        for operand in activations(graph, node):
            if operand == node.residual and operand not in node.inputs[:1]:
                continue
            for value, share in reach.get(operand, {}).items():
                sources[value] = sources.get(value, 0.0) + share
        if node.name in measured:
            own = passing.get(node.name, 1.0)
            flows.append(Flow(node.name, sources, residual, node.op in JOINS, own, carried.get(node.name)))
            reach[node.name] = {node.name: 1.0}
            continue
        if node.op in PASS_ON and node.op != "expand":
            before, after = (graph.types[v].elements for v in (node.inputs[0], node.name))
            kept = min(1.0, after / before)
            sources = {value: share * kept for value, share in sources.items()}
        for value, share in residual.items():
            sources[value] = sources.get(value, 0.0) + share
        reach[node.name] = sources
    return flows


def passing_share(samples: Sequence[npt.NDArray[np.float32]]) -> float:
    """Share of the values that a clipping activation let through: those that are neither the smallest nor the largest."""
    values = np.concatenate([s.reshape(-1) for s in samples])
    inside = (values > values.min()) & (values < values.max())
    return float(inside.mean())


def gains_to_output(
    graph: Graph,
    noise: Mapping[str, Noise],
    own: Mapping[str, float],
    passing: Mapping[str, float],
    carried: Mapping[str, float],
) -> dict[str, float]:
    """Measured value -> relative noise at the network's outputs per noise energy (per sample) at the value.

    graph: the quantized one. own: noise energy that a layer adds at its output. carried: mean square of what its weights make of
    the noise of its input, before the activation.
    """
    known = {v: n for v, n in noise.items() if n.count}
    energies = {v: energy(n, graph.types[v].elements) for v, n in known.items()}
    arriving = {n: m * graph.types[n].elements * passing.get(n, 1.0) for n, m in carried.items()}
    flows = noise_flows(graph, set(energies), passing, arriving)
    outputs = [v for v in graph.outputs if v in energies]
    return output_gains(flows, energies, own, outputs)
