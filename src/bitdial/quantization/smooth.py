"""SmoothQuant's migration of quantization difficulty from activations to weights (Xiao et al. 2023, section 4).

A LayerNorm's output y is read by linear layers. With a factor s_j per channel, y_j / s_j times s_j W_j is what y_j W_j was:
the division goes into the LayerNorm's weight and bias, the product into the columns of EVERY linear layer that reads it, and
the float network stays as it is. Where something else reads the LayerNorm too (in a post-norm encoder the residual sum does),
the linear layers get one of their own: normalizing twice costs next to nothing beside the products. s_j = max|y_j|^alpha /
max|W_j|^(1 - alpha), the maximum over all those readers: alpha 0 makes the weight columns alike, 1 the activation channels.

On small pre-norm networks it brings less than where it comes from (docs/language-model.md); on MiniLM, whose LayerNorms have
outliers, it takes 100 % at 4 bits from 83.9 to 87.3 (300 pairs, float 93.4). A network with one 4-bit scale per tensor loses
its small channels; bitdial sorts channels by range into groups, and every group has its own shift, for activations and for
weights. Left to smoothing are: the 8-bit scale of the tensor, from which shifts take bits that must be there first (a
channel of a sixteenth of the tensor's range has four of them); ranges that differ inside a group (shifts are powers of two,
and a channel shares its group with neighbours in the order); and tensors whose channels the layout may not sort. It cannot
help against values that are large in single tokens, nor behind GELU or attention: folding needs a LayerNorm, or a path
without nonlinearity. The value projection of attention (whose channels reach the output projection untouched) is left out:
SmoothQuant leaves it out too.
`quantization.equalize` is the wider tool (every positively homogeneous path, convolutions too, factors clipped).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError
from bitdial.graph.ir import Graph, Node
from bitdial.graph.passes.edit import drop_unused, fresh_constant
from bitdial.quantization.calibration import TensorStatistics
from bitdial.quantization.equalize import find_sites, linear_ends

Factors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Migration:
    """What was done at one LayerNorm. factors: float64 [C], by which its outputs were divided."""

    layer_norm: str
    readers: tuple[str, ...]
    factors: Factors


def migration_factors(activation_max: Factors, weight_max: Factors, alpha: float) -> Factors:
    """float64 [C]: s_j, divided by their geometric mean; 1 for channels whose activations or weights are all zero.

    The common factor is free (the tensor's scale takes it), and without it the LayerNorm keeps its magnitude. alpha: 0..1.
    Raises ConfigError for another one.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"the smoothing strength is {alpha}; it must lie in 0..1")
    alive = (activation_max > 0.0) & (weight_max > 0.0)
    logarithm = np.zeros(len(activation_max))
    logarithm[alive] = alpha * np.log(activation_max[alive]) - (1.0 - alpha) * np.log(weight_max[alive])
    if alive.any():
        logarithm[alive] -= logarithm[alive].mean()
    return np.exp(logarithm)


def smooth(
    graph: Graph, statistics: Mapping[str, TensorStatistics], alpha: float
) -> tuple[Graph, tuple[Migration, ...]]:
    """Migrate behind every LayerNorm that only linear layers read. Returns a new graph and what was done.

    statistics: of the values that linear layers read, with maxima per channel; they must be taken again for the new graph.
    Operators that treat all channels alike (reshape, select, slice of tokens, ReLU) may lie in between. Where anything else
    reads a LayerNorm (a residual sum, a graph output), linear layers read a copy. One whose readers were not calibrated (they
    stay in float) is left alone. Raises ConfigError for alpha outside 0..1.
    """
    new = graph.copy()
    copies = _separate(new, statistics)
    given = {node.name: list(node.inputs) for node in new.nodes if node.op == "layer_norm"}
    for node in new.nodes:
        if node.op == "layer_norm":
            _complete(new, node)
    done: list[Migration] = []
    for site in find_sites(new):
        if site.producer.op != "layer_norm":
            continue
        read = [copies.get(r.inputs[0], r.inputs[0]) for r in site.consumers]
        seen = [statistics[value].channel_max for value in read if value in statistics]
        activation = [m for m in seen if m is not None]
        if not activation:
            continue
        columns = [np.abs(new.constants[_weight(r)]).max(axis=0).astype(np.float64) for r in site.consumers]
        s = migration_factors(np.max(activation, axis=0), np.max(columns, axis=0), alpha)
        given.pop(site.producer.name)
        _divide(new, site.producer, s)
        for reader in site.consumers:
            weight = _weight(reader)
            reader.weight = fresh_constant(new, weight, (new.constants[weight] * s).astype(np.float32))
        done.append(Migration(site.producer.name, tuple(r.name for r in site.consumers), s))
    for node in new.nodes:
        if node.name in given:
            node.inputs = given[node.name]
    drop_unused(new)
    return new, tuple(done)


def _separate(graph: Graph, statistics: Mapping[str, TensorStatistics]) -> dict[str, str]:
    """Copy every LayerNorm that linear layers and others read; the former then read the copy. Returns copy -> original."""
    readers, copies = graph.consumers(), {}
    for node in [n for n in graph.nodes if n.op == "layer_norm"]:
        own, others = [], node.name in graph.outputs
        for reader in readers[node.name]:
            alone = replace(reader, residual=None)  # a linear layer may add what it reads
            ends = linear_ends(graph, readers, alone, node.name)
            if any(end.inputs[0] in statistics for end in ends):
                own.append(reader)
            others |= not ends or reader.residual == node.name
        if not own or not others:
            continue
        copy = replace(node, name=graph.fresh_name(f"{node.name}_smoothed"), inputs=list(node.inputs))
        graph.nodes.insert(graph.nodes.index(node) + 1, copy)
        graph.types[copy.name] = graph.types[node.name]
        copies[copy.name] = node.name
        for reader in own:
            reader.inputs[0] = copy.name
    return copies


def _weight(node: Node) -> str:
    assert node.weight is not None
    return node.weight


def _complete(graph: Graph, node: Node) -> None:
    """Give a LayerNorm the weight 1 and the bias 0 that it lacks."""
    shape = tuple(node.attrs["normalized_shape"])
    for position, value in ((1, 1.0), (2, 0.0)):
        if len(node.inputs) == position:
            node.inputs.append(fresh_constant(graph, f"{node.name}_affine", np.full(shape, value, np.float32)))


def _divide(graph: Graph, node: Node, s: Factors) -> None:
    for position in (1, 2):
        name = node.inputs[position]
        node.inputs[position] = fresh_constant(graph, name, (graph.constants[name] / s).astype(np.float32))
