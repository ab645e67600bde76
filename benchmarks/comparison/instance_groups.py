"""Activations quantized in groups of channels that are formed anew for every sample, in the manner of IGQ-ViT.

Source: Moon, Kim, Cheon, Ham, "Instance-Aware Group Quantization for Vision Transformers" (CVPR 2024): every layer has a few
quantizers (lower and upper ends of a range); a channel of a sample takes the one whose ends are nearest to its own smallest and
largest value; on calibration data, choosing quantizers and moving their ends to the channels that chose them alternate.

No engine here forms groups at run time, so this method is SIMULATED: its narrow numbers are read back onto the 8-bit grid of the
tensor (off by half an 8-bit step at most) and multiplied as 8-bit integers by its narrow weights, exactly; but no program says
which numbers are left.

Assumed, or changed: the same number of groups in all layers (the paper divides a budget of operations over layers); the ends of a
layer's quantizers are scaled by one factor, of least squared error, as the ranges of `uniform` are (means of ends would clip the
inputs of attention's projections too early); samples of an ordinary batch only; the rows of softmax are not grouped, since
products of activations stay at 8 bits on this ground; weights are rounded as GPTQ does (`uniform` with rounding="compensated"),
for the inputs of the 8-bit model; means are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.bias_table import correct_bias
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.engines.reference.walk import TorchWalk
from bitdial.pipeline.quantizing import bias_samples
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program
from comparison.ground import Ground
from comparison.uniform import uniform_program

GROUPS = 8
ROUNDS = 20  # of choosing and moving
POINTS = 20_000  # channels of samples that quantizers are fitted to
FACTORS = (0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)  # of a layer's ends: tried on TRIED samples
TRIED = 16

Ends = npt.NDArray[np.float32]  # [groups, 2]: lower and upper end of each quantizer, in 8-bit steps


def channel_ends(x: Tensor, axis: int) -> Tensor:
    """[N, C, 2]: smallest and largest value, or 0, of every channel in every sample; samples along axis 0."""
    rows = x.movedim(axis, 1).flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return torch.stack([rows.amin(dim=2).clamp_max(0.0), rows.amax(dim=2).clamp_min(0.0)], dim=2)


def nearest(ends: Tensor, quantizers: Tensor) -> Tensor:
    """int64, shape of `ends` without its last axis: the quantizer whose ends are nearest."""
    distance = (ends.unsqueeze(-2) - quantizers).square().sum(dim=-1)
    return distance.argmin(dim=-1)


def fit_quantizers(ends: Tensor, groups: int = GROUPS) -> Ends:
    """Ends of quantizers for channels with these ends [points, 2], by alternation, begun at quantiles of the ranges."""
    ends = ends.float()
    order = torch.argsort(ends[:, 1] - ends[:, 0], stable=True)
    start = (torch.arange(groups) * 2 + 1) * len(ends) // (2 * groups)
    quantizers = ends[order[start]].clone()
    for _ in range(ROUNDS):
        chosen = nearest(ends, quantizers)
        counts = torch.bincount(chosen, minlength=groups).float()
        sums = torch.zeros_like(quantizers).index_add_(0, chosen, ends)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1.0)[:, None], quantizers)
        if torch.equal(moved, quantizers):
            break
        quantizers = moved
    result: Ends = quantizers.numpy()
    return result


def grouped(x: Tensor, axis: int, quantizers: Tensor, bits: int, lo: int, hi: int) -> Tensor:
    """8-bit integers x (as floats) with every channel of every sample read back from its quantizer of 2^bits levels.

    Zero is a level of each. lo, hi: of the 8-bit encoding.
    """
    chosen = quantizers[nearest(channel_ends(x, axis), quantizers)]  # [N, C, 2]
    shape = [1] * x.dim()
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    levels = (1 << bits) - 1
    below, above = (e.reshape(shape) for e in chosen.unbind(dim=2))
    step = ((above - below) / levels).clamp_min(1.0)  # values are integers: nothing is finer
    first = torch.round(below / step)
    return torch.round(torch.round(x / step).clamp_(first, first + levels).mul_(step)).clamp_(lo, hi)


class _Grouped(Executor):
    """An executor whose low layers take grouped inputs. quantizers: per layer; bits: their width."""

    def __init__(self, program: Program, quantizers: Mapping[str, Ends], bits: int) -> None:
        super().__init__(program)
        self.quantizers = {n: torch.from_numpy(q) for n, q in quantizers.items()}
        self.bits = bits

    def extracted(self, step: Contract, x: Tensor, setting: Setting, batch: int) -> Tensor:
        if setting.inverse is None:
            return x
        q = self.program.qparams[step.inputs[0]]
        return grouped(x.float(), step.axis % x.dim(), self.quantizers[step.name], self.bits, q.qmin, q.qmax).to(x.dtype)


class _FastGrouped(_Grouped, FastExecutor):
    """The same with fast products."""


class GroupedEngine(ReferenceEngine):
    """Runs a program with one ratio in which low layers have narrow weights; their inputs are grouped per sample."""

    def __init__(self, program: Program, quantizers: Mapping[str, Ends], bits: int) -> None:
        super().__init__(program, check_finite=False)
        self.executor = _Grouped(program, quantizers, bits)


class _Readers:
    """The inputs of some layers in the 8-bit model."""

    def __init__(self, ground: Ground, layers: Sequence[str]) -> None:
        self.ground, self.executor = ground, FastExecutor(ground.eight)
        self.readers: dict[str, list[tuple[str, int]]] = {}
        for name in layers:
            step = self.executor.instructions[name]
            assert isinstance(step, Contract)
            axis = step.axis % len(ground.eight.types[step.inputs[0]].shape)
            self.readers.setdefault(step.inputs[0], []).append((name, axis))

    def show(self, told: Callable[[str, int, Tensor], None], samples: int | None = None) -> None:
        """Tell the name of each layer, the axis of its channels and its input, for every batch."""
        settings = self.executor.settings(0)

        def observe(value: str, x: Tensor) -> None:
            for name, axis in self.readers.get(value, []):
                told(name, axis, x.float())

        with torch.no_grad():
            for batch in self.ground.prepared.batches(self.ground.config.batch_size, samples):
                self.executor.run(batch, settings, observe=observe)


def calibrated_quantizers(ground: Ground, layers: Sequence[str]) -> dict[str, Ends]:
    """Quantizers of every layer, from its inputs in the 8-bit model."""
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    _Readers(ground, layers).show(lambda name, axis, x: parts[name].append(channel_ends(x, axis).flatten(0, 1)))
    result = {}
    for i, name in enumerate(layers):
        ends = torch.cat(parts[name])
        draw = torch.Generator().manual_seed(ground.config.seed + i)
        result[name] = fit_quantizers(ends[torch.randperm(len(ends), generator=draw)[:POINTS]])
    return result


def scaled(ground: Ground, quantizers: Mapping[str, Ends], bits: int) -> dict[str, Ends]:
    """The quantizers of each layer, their ends times the factor that loses least at a width."""
    lost = {name: np.zeros(len(FACTORS)) for name in quantizers}

    def add(name: str, axis: int, x: Tensor) -> None:
        q = ground.eight.qparams[ground.eight.instruction(name).inputs[0]]
        for i, factor in enumerate(FACTORS):
            ends = torch.from_numpy(quantizers[name]) * factor
            lost[name][i] += float((grouped(x, axis, ends, bits, q.qmin, q.qmax) - x).square().sum(dtype=torch.float64))

    _Readers(ground, list(quantizers)).show(add, TRIED)
    return {name: own * np.float32(FACTORS[int(np.argmin(lost[name]))]) for name, own in quantizers.items()}


def grouped_program(ground: Ground, quantizers: Mapping[str, Ends], bits: int) -> tuple[Program, GroupedEngine]:
    """(the program with narrow weights and restored means, what runs it with grouped inputs)."""
    prepared, config = ground.prepared, ground.config
    quantizers = scaled(ground, quantizers, bits)
    program = uniform_program(prepared, config, ground.full_masks(), bits, "compensated", correct=False, tables=False)
    batches = prepared.batches(config.batch_size, bias_samples(prepared, program))
    means = prepared.output_means if config.bias_correction else {}
    with torch.no_grad():
        walk = TorchWalk(program, _FastGrouped(program, quantizers, bits))
        correct_bias(program, batches, means, [0], lambda share: ground.progress("bias", share), walk=walk)
    return program, GroupedEngine(program, quantizers, bits)
