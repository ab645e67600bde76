"""The bias table: restores the mean of every layer's outputs at every ratio (design notes, section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channel_sums
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.graph.ir import BatchDim
from bitdial.graph.running import Schedule
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program
from bitdial.quantization.weights import INT32_LIMIT


def correct_bias(
    program: Program,
    batches: Sequence[Sequence[Tensor]],
    float_means: Mapping[str, npt.NDArray[np.float64]],
    ratio_indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
    outputs: Callable[[int, list[Tensor]], None] | None = None,
) -> None:
    """Fill `layer.bias[r]` of every conv and linear layer, layer by layer in order, so that its mean output over the
    batches equals the float model's mean: each layer sees inputs that are corrected already.

    float_means: [O] per layer, from `float_output_means` on the same batches. outputs: told each ratio index with the first
    output of every batch at that ratio, as the corrected program gives it. progress: told the share done, after every
    instruction. Writes into the program.
    """
    executor = Executor(program, device)
    indices = range(len(program.ratios)) if ratio_indices is None else ratio_indices
    for done, index in enumerate(indices):
        report = None if progress is None else partial(_report, progress, done, len(indices))
        found = _correct_one(executor, program, batches, float_means, index, report)
        if outputs is not None:
            outputs(index, found)


def _report(progress: Callable[[float], None], done: int, of: int, share: float) -> None:
    progress((done + share) / of)


def _correct_one(
    executor: Executor,
    program: Program,
    batches: Sequence[Sequence[Tensor]],
    float_means: Mapping[str, npt.NDArray[np.float64]],
    index: int,
    progress: Callable[[float], None] | None,
) -> list[Tensor]:
    """The first output of every batch. progress: told the share of the instructions that are done."""
    graph = program.graph
    settings: dict[str, Setting] = executor.settings(index)
    values = [dict(zip(graph.inputs, batch, strict=True)) for batch in batches]
    sizes = [batch[0].shape[0] for batch in batches]
    walks = [executor.schedule.walk(own) for own in values]
    for number, steps in enumerate(zip(*walks, strict=True)):
        step = steps[0]
        if progress is not None:
            progress(number / len(executor.schedule.steps))
        if not isinstance(step, Contract) or step.name not in float_means:
            for own, n in zip(values, sizes, strict=True):
                own[step.name] = executor.step(step, own, settings, n)
            continue
        layer, setting = step.layer, settings[step.name]
        parts = [executor.accumulators(step, own, setting, n) for own, n in zip(values, sizes, strict=True)]
        sums, counts = zip(*(channel_sums(part, step.axis) for part in parts), strict=True)
        mean = torch.stack(sums).sum(dim=0).cpu().numpy() / sum(counts)
        activation = program.qparams[step.inputs[0]]
        unit = layer.weight_scale.astype(np.float64) * activation.scale
        bias = np.rint(float_means[step.name] / unit - mean)
        room = INT32_LIMIT - layer.accumulator_bound
        layer.bias[index] = np.clip(bias, -room, room).astype(np.int32)
        setting.bias = torch.from_numpy(layer.bias[index].astype(np.float64)).to(executor.device)
        executor.layers[step.name]._finish(setting)
        for own, part in zip(values, parts, strict=True):
            own[step.name] = executor.epilogue(step, part, own, setting)
    first = graph.outputs[0]
    return [own[first] if first in own else executor.constants[first] for own in values]


def live_bytes_per_sample(program: Program) -> int:
    """Peak of float32 bytes alive at once per sample while running layer by layer (a bound on calibration memory)."""
    def size(name: str) -> int:
        shape = program.graph.types[name].shape
        return 4 * math.prod(d.factor if isinstance(d, BatchDim) else d for d in shape)

    graph = program.graph
    alive = {v: size(v) for v in graph.inputs}
    peak = 0
    for node in Schedule(graph.nodes, {*graph.constants, *graph.outputs}).walk(alive):
        alive[node.name] = size(node.name)
        peak = max(peak, sum(alive.values()) + size(node.name))  # accumulators beside the result
    return peak
