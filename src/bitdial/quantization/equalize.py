"""Channel equalization: move differences of range between channels from activations into weights, before quantization.

Where a layer's output passes only positively homogeneous operators on its way to conv or linear layers, dividing channel
c of the producer by t[c] and multiplying the consumers' weight columns by t[c] leaves the float network unchanged.
Sources: cross-layer equalization (Nagel et al. 2019), SmoothQuant (Xiao et al. 2023; its exponent alpha is `strength`
here). A producer's own 8-bit weights do not change at all: the scale per output channel takes the factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.graph.ir import Graph, Node
from bitdial.graph.passes.edit import fresh_constant
from bitdial.quantization.calibration import TensorStatistics

_KEEPS_CHANNEL_AXIS_1 = frozenset({"relu", "max_pool", "avg_pool"})
LARGEST_FACTOR = 32.0  # channels that hardly ever fire would otherwise blow up their weight columns


@dataclass
class Site:
    """A producer and the conv/linear nodes that read its output through homogeneous operators."""

    producer: Node
    value: str  # where the producer's channels can be observed as the input of the first consumer
    consumers: list[Node]


def find_sites(graph: Graph) -> list[Site]:
    """Every place of the fused graph where equalization is exact in real arithmetic."""
    readers = graph.consumers()
    sites = []
    for node in graph.nodes:
        if node.op in ("conv", "linear"):
            activation = node.attrs.get("activation")
            homogeneous = activation is None or activation["kind"] == "relu"
            fits = homogeneous and node.residual is None
        else:
            fits = node.op == "layer_norm" and len(node.inputs) == 3
        if not fits or node.name in graph.outputs:
            continue
        consumers = _follow(graph, readers, node.name, axis_first=node.op == "conv")
        if consumers:
            sites.append(Site(node, consumers[0].inputs[0], consumers))
    return sites


def _follow(graph: Graph, readers: Mapping[str, list[Node]], value: str, axis_first: bool) -> list[Node]:
    """Conv/linear nodes at the end of every path from a value; [] if some path meets anything else."""
    found: list[Node] = []
    for reader in readers[value]:
        ends = linear_ends(graph, readers, reader, value, axis_first)
        if not ends:
            return []
        found += ends
    return found


def linear_ends(
    graph: Graph, readers: Mapping[str, list[Node]], reader: Node, value: str, axis_first: bool = False
) -> list[Node]:
    """Linear (`axis_first`: conv) nodes that a reader of a value leads to; [] if some path from it meets anything else."""
    if reader.inputs[:1] != [value] or value == reader.residual:
        return []
    if reader.op == ("conv" if axis_first else "linear"):
        return [reader] if int(reader.attrs.get("groups", 1)) == 1 else []
    if not _keeps(graph, reader, axis_first) or reader.name in graph.outputs:
        return []
    return _follow(graph, readers, reader.name, axis_first)


def _keeps(graph: Graph, node: Node, axis_first: bool) -> bool:
    """The operator acts on every channel alike and leaves the channel axis in its place."""
    if axis_first:
        if node.op == "pad":
            return bool(node.attrs["pads"][1] == [0, 0] and node.attrs.get("value", 0.0) == 0.0)
        return node.op in _KEEPS_CHANNEL_AXIS_1
    before, after = graph.types[node.inputs[0]].shape, graph.types[node.name].shape
    last = len(before) - 1
    if node.op == "relu":
        return True
    if node.op == "reshape":
        return before[-1] == after[-1]
    if node.op == "permute":
        return bool(node.attrs["axes"][-1] == last)
    if node.op == "roll":
        return last not in node.attrs["axes"]
    if node.op in ("slice", "select"):
        return bool(node.attrs["axis"] != last)
    return False


def factors(
    activation_max: npt.NDArray[np.float64], weight_max: npt.NDArray[np.float64], strength: float
) -> npt.NDArray[np.float64]:
    """float64 [C]: t = activation_max^strength / weight_max^(1 - strength), scaled to median 1 and clipped."""
    alive = (activation_max > 0.0) & (weight_max > 0.0)
    if not alive.any():
        return np.ones_like(activation_max)
    a, w = np.where(alive, activation_max, 1.0), np.where(alive, weight_max, 1.0)
    t = a**strength / w ** (1.0 - strength)
    t /= np.median(t[alive])
    return np.where(alive, np.clip(t, 1.0 / LARGEST_FACTOR, LARGEST_FACTOR), 1.0)


def equalize(graph: Graph, statistics: Mapping[str, TensorStatistics], strength: float) -> tuple[Graph, int]:
    """Equalize every site. Returns a new graph and the number of sites; the statistics must be taken again after it.

    strength: 1 makes all activation channels of a tensor alike, 0 all weight columns.
    """
    graph = graph.copy()
    sites = find_sites(graph)
    for site in sites:
        largest = statistics[site.value].channel_max if site.value in statistics else None
        if largest is None:
            continue
        columns = np.zeros_like(largest)
        for consumer in site.consumers:
            assert consumer.weight is not None
            weight = np.abs(graph.constants[consumer.weight])
            columns = np.maximum(columns, weight.max(axis=(0, *range(2, weight.ndim))).astype(np.float64))
        t = factors(largest, columns, strength)
        _divide_outputs(graph, site.producer, t)
        for consumer in site.consumers:
            assert consumer.weight is not None
            weight = graph.constants[consumer.weight]
            scaled = weight * t.reshape(1, -1, *[1] * (weight.ndim - 2))
            consumer.weight = fresh_constant(graph, consumer.weight, scaled.astype(np.float32))
    used = {v for n in graph.nodes for v in n.operands()} | set(graph.outputs)
    graph.constants = {k: v for k, v in graph.constants.items() if k in used}
    return graph, len(sites)


def _divide_outputs(graph: Graph, node: Node, t: npt.NDArray[np.float64]) -> None:
    if node.op == "layer_norm":
        for position in (1, 2):
            name = node.inputs[position]
            node.inputs[position] = fresh_constant(graph, name, (graph.constants[name] / t).astype(np.float32))
        return
    assert node.weight is not None
    weight = graph.constants[node.weight]
    divided = weight / t.reshape(-1, *[1] * (weight.ndim - 1))
    node.weight = fresh_constant(graph, node.weight, divided.astype(np.float32))
    if node.bias is not None:
        node.bias = fresh_constant(graph, node.bias, (graph.constants[node.bias] / t).astype(np.float32))
