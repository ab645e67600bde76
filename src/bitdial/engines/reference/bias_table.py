"""The bias table: restores the mean of every layer's outputs at every ratio (design notes, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import product, sample_sum
from bitdial.engines.reference.eight_bit_values import EightBitValues
from bitdial.engines.reference.executor import Setting
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.graph.running import Schedule
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
    batches: Sequence[Sequence[Tensor]],
    float_means: Mapping[str, npt.NDArray[np.float64]],
    ratio_indices: Sequence[int] | None = None,
    progress: Callable[[float], None] | None = None,
    outputs: Callable[[int, list[Tensor]], None] | None = None,
    fit: LayerFit | None = None,
    executor: FastExecutor | None = None,
) -> None:
    """Fill `layer.bias[r]` of every conv and linear layer, layer by layer in order, so that its mean output over the
    batches equals the float model's mean: each layer sees inputs that are corrected already.

    float_means: [O] per layer, from `float_output_means` on the same batches; layers without keep their bias. outputs: told each
    ratio index with the first output of every batch at that ratio, as the corrected program gives it. progress: told the share
    done, after every instruction. fit: solves low weights on the way, before a layer's means are restored. executor: runs the
    program, if layers take their inputs in another way than the program says. Writes into the program.
    """
    executor = executor or FastExecutor(program)
    indices = range(len(program.ratios)) if ratio_indices is None else ratio_indices
    for done, index in enumerate(indices):
        report = None if progress is None else partial(_report, progress, done, len(indices))
        found = _correct_one(executor, program, batches, float_means, index, report, fit)
        if outputs is not None:
            outputs(index, found)


def _report(progress: Callable[[float], None], done: int, of: int, share: float) -> None:
    progress((done + share) / of)


def _correct_one(
    executor: FastExecutor,
    program: Program,
    batches: Sequence[Sequence[Tensor]],
    float_means: Mapping[str, npt.NDArray[np.float64]],
    index: int,
    progress: Callable[[float], None] | None,
    fit: LayerFit | None,
) -> list[Tensor]:
    """The first output of every batch. progress: told the share of the instructions that are done."""
    settings: dict[str, Setting] = executor.settings(index)
    values = [EightBitValues(program, dict(zip(program.inputs, batch, strict=True))) for batch in batches]
    sizes = [batch[0].shape[0] for batch in batches]
    walks = [executor.schedule.walk(own) for own in values]
    for number, steps in enumerate(zip(*walks, strict=True)):
        step = steps[0]
        if progress is not None:
            progress(number / len(executor.schedule.steps))
        inputs = None
        if isinstance(step, Contract):
            inputs = _correct_layer(executor, step, values, sizes, float_means.get(step.name), index, settings, fit)
        for i, (own, n) in enumerate(zip(values, sizes, strict=True)):
            if inputs is not None:
                assert isinstance(step, Contract)
                own[step.name] = executor.outputs(step, inputs[i], own, settings[step.name], n)
                inputs[i] = torch.empty(0)  # its memory is no longer needed
            else:
                own[step.name] = executor.step(step, own, settings, n)
    first = program.outputs[0]
    return [own[first] if first in own else executor.constants[first] for own in values]


def _correct_layer(
    executor: FastExecutor,
    step: Contract,
    values: Sequence[EightBitValues],
    sizes: Sequence[int],
    wanted: npt.NDArray[np.float64] | None,
    index: int,
    settings: dict[str, Setting],
    fit: LayerFit | None,
) -> list[Tensor] | None:
    """Solve the layer's new low groups, restore its means, in the program and in its setting. Returns the layer's inputs of every
    batch as it multiplies them, in bytes; None where there was nothing to do."""
    layer, source = step.layer, step.inputs[0]
    unit = layer.weight_scale.astype(np.float64) * executor.program.qparams[source].scale

    sampled = None if fit is None else fit.wanted(index, layer)
    if sampled is None and wanted is None:
        return None
    inputs = []
    rows, total, count = [], torch.zeros(1, dtype=torch.float64), 0
    for number, (own, n) in enumerate(zip(values, sizes, strict=True)):
        x = executor.extracted(step, own.stored(source, executor.constants), settings[step.name], n)
        if sampled is not None:
            rows.append(sampled(x, number))
        flat = x if step.window is not None else x.reshape(-1, x.shape[-1])
        total, count = total + sample_sum(flat), count + len(flat)
        inputs.append(x)
    if fit is not None and rows:
        fit.solve(index, layer, torch.cat(rows))
        bound_accumulators(layer, executor.program.qparams[source])
        settings[step.name] = executor.renew(step.name).setting(
            torch.from_numpy(layer.low[index]), settings[step.name].bias
        )
    if wanted is None:
        return inputs
    setting = settings[step.name]  # the mean of a layer's outputs is its output for the mean of its inputs
    mean = product(total[None] / count, setting.weight.double(), step.window)[0]
    mean = mean.flatten(1).mean(dim=1) if step.window is not None else mean
    bias = np.rint(wanted / unit - mean.numpy())
    room = INT32_LIMIT - layer.accumulator_bound
    layer.bias[index] = np.clip(bias, -room, room).astype(np.int32)
    setting.bias = torch.from_numpy(layer.bias[index].astype(np.float64))
    executor.layers[step.name]._finish(setting)
    return inputs


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
