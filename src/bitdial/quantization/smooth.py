"""SmoothQuant's migration of quantization difficulty from activations to weights (Xiao et al. 2023, section 4).

A LayerNorm's output y is read by linear layers. With a factor s_j per channel, y_j / s_j times s_j W_j is what y_j W_j was:
the division goes into the LayerNorm's weight and bias, the product into the columns of EVERY linear layer that reads it, and
the float network stays as it is. s_j = max|y_j|^alpha / max|W_j|^(1 - alpha), the maximum over all those readers: alpha 0
makes the weight columns alike, 1 the activation channels.

What it can bring here is less than where it comes from. A network with one 4-bit scale per tensor loses its small channels;
bitdial sorts channels by range into groups, and every group has its own shift, for activations and for weights. Left to
smoothing are: the 8-bit scale of the tensor, from which shifts take bits that must be there first (a channel of a sixteenth of
the tensor's range has four of them); ranges that differ inside a group (shifts are powers of two, and a channel shares
its group with neighbours in the order); and tensors whose channels the layout may not sort. It cannot help against values
that are large in single tokens, nor behind GELU or attention: folding needs a LayerNorm, or a path without nonlinearity. The
value projection of attention (whose channels reach the output projection untouched) is left out: SmoothQuant leaves it out too.
`quantization.equalize` is the wider tool (every positively homogeneous path, convolutions too, factors clipped).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError
from bitdial.graph.ir import Graph, Node
from bitdial.graph.passes.edit import fresh_constant
from bitdial.quantization.calibration import TensorStatistics
from bitdial.quantization.equalize import find_sites

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
    Operators that treat all channels alike (reshape, select, slice of tokens, ReLU) may lie in between. A LayerNorm that
    anything else reads (a residual sum, a graph output) is left alone, as is one whose readers were not calibrated (they
    stay in float). Raises ConfigError for alpha outside 0..1.
    """
    new = graph.copy()
    given = {node.name: list(node.inputs) for node in new.nodes if node.op == "layer_norm"}
    for node in new.nodes:
        if node.op == "layer_norm":
            _complete(new, node)
    done: list[Migration] = []
    for site in find_sites(new):
        if site.producer.op != "layer_norm":
            continue
        seen = [statistics[r.inputs[0]].channel_max for r in site.consumers if r.inputs[0] in statistics]
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
    used = {v for n in new.nodes for v in n.operands()} | set(new.outputs)
    new.constants = {k: v for k, v in new.constants.items() if k in used}
    return new, tuple(done)


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
