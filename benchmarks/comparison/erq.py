"""Error reduction in the manner of ERQ: weights regressed on quantized inputs, then rounded half by half.

Source: Zhong, Hu, Huang, Zhang, Ji, "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers" (ICML 2024).
The part on activation quantization error (Aqer): weights are moved by ridge regression so that the layer gives for quantized
inputs what it gave for exact ones. The part on weight quantization error (Wqer): half of the weights that are still open are
rounded, first to the nearest value and then with single roundings turned the other way while the layer's expected error falls;
a ridge regression on the open half makes up for what is left; and so on until none is open.

Assumed, or changed: layers are solved in turn on the network as quantized so far, towards the outputs of the float network (as
bitdial's own low plane is solved, so that the comparison is not one of this); the strength of the first regression is chosen on
held-out rows and not tuned per network; the roundings that are turned are the best ones by the error itself and not by its
gradient; halves go by falling variance of their inputs; steps of weights are those of least squared error before the regression;
ranges of activations are those of `uniform` (no reparameterized LayerNorm, no logarithmic softmax); means are restored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.engines.reference.bias_table import correct_bias
from bitdial.engines.reference.plane_fit import ROWS, TARGET_BYTES, SampledRows
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Node
from bitdial.pipeline.quantizing import bias_samples
from bitdial.quantization.low_plane import layer_outputs, ridge
from bitdial.quantization.program import Program, QuantizedLayer
from comparison.ground import Ground
from comparison.uniform import uniform_program

DAMPING = 0.01  # of the mean variance, in the regressions on the open half
TURNS = 100  # roundings turned per output channel and half, at most
SMALLEST = 8  # weights that are rounded at once in the end

Matrix = npt.NDArray[np.float64]


def turned_rounding(target: Matrix, covariance: Matrix, limit: int) -> npt.NDArray[np.int64]:
    """int64 [O, m] of magnitude at most `limit`: target rounded, then the rounding that lowers its row's error most turned to the
    other side, again and again while there is one. The error of a row is e C e with e = rounded - target, C = covariance [m, m].
    """
    rounded = np.clip(np.rint(target), -limit, limit)
    error = rounded - target
    step = np.where(error > 0.0, -1.0, 1.0)
    slope = error @ covariance
    rows, own = np.arange(len(target)), np.diag(covariance)
    for _ in range(TURNS):
        change = 2.0 * step * slope + own
        change[np.abs(rounded + step) > limit] = np.inf
        best = np.argmin(change, axis=1)
        good = change[rows, best] < -1e-9 * own.mean()
        if not good.any():
            break
        r, j = rows[good], best[good]
        rounded[r, j] += step[r, j]
        slope[r] += step[r, j][:, None] * covariance[j]
        step[r, j] *= -1.0
    return rounded.astype(np.int64)


def halved_rounding(target: Matrix, covariance: Matrix, limit: int) -> npt.NDArray[np.int64]:
    """int64 [O, m]: half of the open columns rounded (`turned_rounding`), the others moved to make up for it, until all are done.

    target: [O, m] weights in steps. covariance: [m, m] of the inputs.
    """
    order = np.argsort(-np.diag(covariance), kind="stable")
    covariance = covariance[np.ix_(order, order)]
    rest, columns = target[:, order].copy(), len(order)
    result = np.empty(target.shape, np.int64)
    start = 0
    while start < columns:
        stop = min(columns, start + max(SMALLEST, (columns - start + 1) // 2))
        own, later = slice(start, stop), slice(stop, columns)
        rounded = turned_rounding(rest[:, own], covariance[own, own], limit)
        result[:, order[own]] = rounded
        if stop < columns:
            open_part = covariance[later, later].copy()
            open_part[np.diag_indices_from(open_part)] += DAMPING * float(np.trace(open_part)) / len(open_part) + 1e-9
            lost = (rounded - rest[:, own]) @ covariance[own, later]
            rest[:, later] -= np.linalg.solve(open_part, lost.T).T
        start = stop
    return result


class ErrorReduction:
    """What `correct_bias` calls for every low layer on its way: solves it for its inputs as they then are.

    program: uniform at a low width, one ratio. targets: bfloat16 [rows, O] per layer, real units: of the float network, no bias.
    """

    def __init__(self, ground: Ground, program: Program, batches: list[list[Tensor]]) -> None:
        self.program, self.centred = program, ground.config.bias_correction
        graph = ground.prepared.graph
        names = [n for n, layer in program.layers.items() if layer.n_groups and layer.low.any()]
        self.weights: dict[str, Tensor] = {}
        nodes: dict[str, Node] = {n: graph.node(n) for n in names}
        for name, node in nodes.items():
            assert node.weight is not None
            self.weights[name] = torch.from_numpy(graph.constants[node.weight]).flatten(1).float()
        count = min(ROWS, TARGET_BYTES // (2 * max(1, sum(len(w) for w in self.weights.values()))))
        per_batch = max(1, -(-count // len(batches)))
        seed = ground.config.seed
        self.rows = {n: SampledRows(nodes[n], program.layers[n], per_batch, seed + i) for i, n in enumerate(names)}
        self.targets = self._float_outputs(ground, nodes, batches)

    def _float_outputs(self, ground: Ground, nodes: Mapping[str, Node], batches: list[list[Tensor]]) -> dict[str, Tensor]:
        readers: dict[str, list[str]] = {}
        for name, node in nodes.items():
            readers.setdefault(node.inputs[0], []).append(name)
        parts: dict[str, list[Tensor]] = {name: [] for name in nodes}
        constants = constant_tensors(ground.prepared.graph)
        for number, batch in enumerate(batches):

            def observe(value: str, x: Tensor, number: int = number) -> None:
                for name in readers.get(value, []):
                    rows = self.rows[name](x, number)
                    parts[name].append(layer_outputs(self.program.layers[name], self.weights[name], rows).bfloat16())

            run_graph(ground.prepared.graph, [channels_last(x) for x in batch], constants=constants, observe=observe)
        return {name: torch.cat(own) for name, own in parts.items()}

    def wanted(self, index: int, layer: QuantizedLayer) -> SampledRows | None:
        return self.rows.get(layer.name)

    def solve(self, index: int, layer: QuantizedLayer, x: Tensor) -> None:
        """x: float32 [n, C * taps], rows of the layer's low inputs, as integers."""
        assert layer.weight is not None
        x = x.float()
        unit = torch.from_numpy(layer.weight_scale.astype(np.float64))
        step = self.program.qparams[self.program.instruction(layer.name).inputs[0]].scale
        exact = self.weights[layer.name].double() / unit[:, None]
        wanted = self.targets[layer.name].float() / (unit.float() * step) - layer_outputs(layer, exact.float(), x)
        if self.centred:
            x, wanted = x - x.mean(dim=0), wanted - wanted.mean(dim=0)
        rows = len(exact) // layer.conv_groups
        found = np.empty(exact.shape, np.int64)
        for g in range(layer.conv_groups):
            own, columns = slice(g * rows, (g + 1) * rows), slice(g * exact.shape[1], (g + 1) * exact.shape[1])
            change, covariance = ridge(x[:, columns], wanted[:, own], unit[own])
            found[own] = halved_rounding((exact[own] + change).numpy(), covariance.numpy(), layer.wmax)
        layer.weight = found.reshape(layer.weight.shape).astype(np.int8)


def reduced_program(ground: Ground, bits: int) -> Program:
    """Every eligible layer at a width of 2 to 7 bits, solved in turn."""
    prepared, config = ground.prepared, ground.config
    program = uniform_program(prepared, config, ground.full_masks(), bits, correct=False)
    batches = prepared.batches(config.batch_size, bias_samples(prepared, program))
    _ = ground.eight  # has left the float network's means
    means = prepared.output_means if config.bias_correction else {}
    with torch.no_grad():
        fit = ErrorReduction(ground, program, batches)
        correct_bias(program, batches, means, [0], lambda share: ground.progress("solve", share), fit=fit)
    return program
