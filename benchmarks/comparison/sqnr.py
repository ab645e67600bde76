"""Phase 1 of practical mixed-precision post-training quantization: every layer's effect on the network's output.

Source: Pandey, Nagel, van Baalen, Huang, Patel, Blankevoort, "A Practical Mixed Precision Algorithm for Post-Training
Quantization" (2023). A layer's sensitivity is the signal-to-quantization-noise ratio of the network's output with that layer
alone at the lower width, on unlabelled calibration data; phase 2 (`budget.lower_in_order`) lowers layers from the highest ratio
down until the budget is met.

Assumed, or changed: the other layers are at 8 bits instead of float, since that is the network the plan starts from, and the
noise is the distance to the float network's outputs; signal and noise are summed over all samples before the ratio is taken
(the public text leaves open whether logarithms or energies are averaged); a layer's weights and its input count as one
group of quantizers, and they change width together; with two widths there is one ratio per layer and no Pareto search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.executor import Executor
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph
from bitdial.quantization.program import Program

Outputs = npt.NDArray[np.float64]


def decibels(exact: npt.ArrayLike, approximate: npt.ArrayLike) -> float:
    """10 log10(sum x^2 / sum (x - y)^2); infinite where nothing differs."""
    x = np.asarray(exact, np.float64)
    noise = float(np.square(x - np.asarray(approximate, np.float64)).sum())
    signal = float(np.square(x).sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def float_outputs(graph: Graph, batches: Sequence[Sequence[Tensor]]) -> Outputs:
    """float64, batch first: all outputs of the float network, flattened per sample."""
    constants = constant_tensors(graph)
    with torch.no_grad():
        return _gather(run_graph(graph, batch, constants=constants) for batch in batches)


def program_outputs(program: Program, batches: Sequence[Sequence[Tensor]], index: int = 0) -> Outputs:
    """The same of a program at a ratio index, from the integer-exact engine."""
    executor = Executor(program)
    settings = executor.settings(index)
    with torch.no_grad():
        return _gather(executor.run(batch, settings) for batch in batches)


def _gather(results: object) -> Outputs:
    rows = [np.concatenate([o.double().flatten(1).numpy() for o in outputs], axis=1) for outputs in results]  # type: ignore
    return np.concatenate(rows)


def layer_sqnr(
    graph: Graph,
    layers: Sequence[str],
    lowered: Callable[[str], Program],
    batches: Sequence[Sequence[Tensor]],
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Signal-to-quantization-noise ratio in dB of the network's outputs with each layer alone at the lower width.

    lowered: layer -> program with that layer low (at its first ratio), all others at 8 bits. batches: calibration data.
    """
    reference = float_outputs(graph, batches)
    result = {}
    for i, name in enumerate(layers):
        result[name] = decibels(reference, program_outputs(lowered(name), batches))
        if progress is not None:
            progress((i + 1) / len(layers))
    return result
