"""The bias table: restores the mean of every layer's outputs at every ratio (design notes, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import product
from bitdial.engines.reference.walk import Batches, TorchWalk, Walk
from bitdial.graph.running import Schedule
from bitdial.quantization.byte_products import sample_sum
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import INT32_LIMIT, bound_accumulators


class LayerFit(Protocol):
    """Solves weights of layers while the bias table walks through the network (`plane_fit.PlaneFit`)."""

    def wanted(self, index: int, layer: QuantizedLayer) -> Callable[[Tensor, int], Tensor] | None:
        """What gives the rows that `solve` wants, of a layer's input in a batch (its number); None where it has nothing to do."""

    def solve(self, index: int, layer: QuantizedLayer, x: Tensor) -> None:
        """Change the layer's weights. x: rows of its inputs, of all batches."""


def correct_bias(
    program: Program,
    batches: Batches,
    float_means: Mapping[str, npt.NDArray[np.float64]],
    ratio_indices: Sequence[int] | None = None,
    progress: Callable[[float], None] | None = None,
    outputs: Callable[[int, list[Tensor]], None] | None = None,
    fit: LayerFit | None = None,
    walk: Walk | None = None,
) -> None:
    """Fill `layer.bias[r]` of every conv and linear layer, layer by layer in order, so that its mean output over the
    batches equals the float model's mean: each layer sees inputs that are corrected already.

    float_means: [O] per layer, from `float_output_means` on the same batches; layers without keep their bias. outputs: told each
    ratio index with the first output of every batch at that ratio, as the corrected program gives it. progress: told the share
    done, before every layer. fit: solves low weights on the way, before a layer's means are restored. walk: what runs the
    program, in torch by default. Writes into the program.
    """
    walk = walk or TorchWalk(program)
    indices = range(len(program.ratios)) if ratio_indices is None else ratio_indices
    for done, index in enumerate(indices):
        for number, step in enumerate(walk.layers(index, batches)):
            if progress is not None:
                progress((done + number / len(program.layers)) / len(indices))
            _correct_layer(walk, step, batches, float_means.get(step.name), index, fit)
        if outputs is not None:
            outputs(index, walk.outputs())


def _correct_layer(
    walk: Walk,
    step: Contract,
    batches: Batches,
    wanted: npt.NDArray[np.float64] | None,
    index: int,
    fit: LayerFit | None,
) -> None:
    """Solve the layer's new low groups and restore its means, in the program and in the walk."""
    layer, executor, q = step.layer, walk.executor, walk.program.qparams[step.inputs[0]]
    sampled = None if fit is None else fit.wanted(index, layer)
    if sampled is None and wanted is None:
        return
    setting = executor.settings(index, [step.name])[step.name]
    rows, total, count = [], torch.zeros(1, dtype=torch.float64), 0
    for number, (stored, batch) in enumerate(zip(walk.stored(step), batches, strict=True)):
        x = executor.extracted(step, stored, setting, len(batch[0]))
        if sampled is not None:
            rows.append(sampled(x, number))
        if wanted is not None:
            flat = x if step.window is not None else x.reshape(-1, x.shape[-1])
            total, count = total + sample_sum(flat), count + len(flat)
    if fit is not None and rows:
        fit.solve(index, layer, torch.cat(rows))
        bound_accumulators(layer, q)
        setting = executor.renew(step.name).setting(torch.from_numpy(layer.low[index]), setting.bias)
    if wanted is not None:  # the mean of a layer's outputs is its output for the mean of its inputs
        mean = product(total[None] / count, setting.weight.double(), step.window)[0]
        mean = mean.flatten(1).mean(dim=1) if step.window is not None else mean
        unit = layer.weight_scale.astype(np.float64) * q.scale
        room = INT32_LIMIT - layer.accumulator_bound
        layer.bias[index] = np.clip(np.rint(wanted / unit - mean.numpy()), -room, room).astype(np.int32)
    walk.renew(step)


def live_bytes_per_sample(program: Program) -> int:
    """Peak of bytes alive at once per sample while running layer by layer (a bound on calibration memory)."""
    def size(name: str) -> int:
        return (1 if name in program.qparams else 4) * program.types[name].elements

    alive = {v: size(v) for v in program.inputs}
    peak = 0
    for step in Schedule(program.instructions, {*program.constants, *program.outputs}).walk(alive):
        alive[step.name] = size(step.name)
        peak = max(peak, sum(alive.values()))
    return peak
