"""Uniform quantization of whole layers at a low width, as an ordinary program.

A layer at b bits has what the field calls uniform quantization: weights with one scale per output channel, activations with
one scale per tensor, both with ranges chosen for b bits (least squared error), symmetric. The 8-bit tensor it reads is
re-encoded by a `table` operator to 0 .. 2^b - 1 (signed: -(2^(b-1) - 1) .. 2^(b-1) - 1) in a scale of its own, so that residual
adds and readers that stay at 8 bits lose nothing; in a chain of operators a real int4 kernel would write those values at
once, rounded once instead of twice. The low integers are the layer's 8-bit integers (all shifts 0), so low and "8-bit" products
are the same numbers and every engine runs them.

A layer may run low in part (`budget.low_masks`): its tensors then keep 8 bits in the low ranges (step / 16 for 4 bits), and
the low groups take the top bits.

Weights are rounded to the nearest value, or (`rounding="compensated"`) one after another, the error of each spread over the
others by the covariance of the inputs, as in GPTQ (Frantar et al. 2022): no layer-wise method here asks for it, but an
opponent should not lose for want of a tool that bitdial has. Means are restored by the same bias correction as bitdial's.

Methods that find integers of their own give them (`LowWeights`); one whose activations are not those of a table leaves the
8-bit tensor as it is (`tables=False`).

With `weights="top"` the low weights are the top bits of the 8-bit ones (8-bit range, every width from one set of weights), for
methods that switch at run time; activations still have a range of their own per width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.patches import PatchSampler
from bitdial.errors import ConfigError
from bitdial.graph.ir import Graph, TensorType
from bitdial.layout import group_bounds
from bitdial.pipeline import Prepared, restore_means
from bitdial.quantization.build import build_program
from bitdial.quantization.calibration import BINS, TensorStatistics
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.instructions import Instruction, Lookup
from bitdial.quantization.program import Program, QParams, QuantizedLayer
from bitdial.quantization.weights import bound_accumulators, multipliers, quantize_bias
from comparison.budget import HIGH_BITS, Masks

Rounding = Literal["nearest", "compensated"]
Weights = Literal["own", "top"]
RANGE_CANDIDATES = np.linspace(0.2, 1.0, 81)  # of the largest magnitude of activations, which have long tails
WEIGHT_CANDIDATES = np.linspace(0.3, 1.0, 36)  # of the largest weight of an output channel
DAMPING = 0.01  # of the mean variance, added to the covariance: samples are few
SAMPLES = 4096  # rows of each layer's input behind the covariance

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowWeights:
    """A layer's low weights as a method found them. integers: int64, shape of the weight. scale: float64 [O]."""

    integers: npt.NDArray[np.int64]
    scale: npt.NDArray[np.float64]


def least_squares_top(statistics: TensorStatistics, levels: int) -> float:
    """Range of least squared error of a tensor with `levels` positive steps, from its histogram of magnitudes.

    Every bin is rounded as its centre is, so zeros cost nothing. Returns the magnitude of the largest level.
    """
    if statistics.largest == 0.0:
        return 0.0
    centres = (np.arange(BINS) + 0.5) * (statistics.limit / BINS)
    tops = statistics.largest * RANGE_CANDIDATES
    steps = tops[:, None] / levels
    error = np.clip(np.rint(centres / steps), 0, levels) * steps - centres
    return float(tops[int(np.argmin((error**2) @ statistics.histogram))])


def least_squares_weight_scale(weight: Floats, limit: int) -> npt.NDArray[np.float64]:
    """float64 [O]: scale of least squared error of every output channel's weights with integers -limit .. limit."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(axis=1)
    best = np.full(len(rows), np.inf)
    scale: npt.NDArray[np.float64] = np.maximum(largest / limit, 2.0**-40)
    for share in WEIGHT_CANDIDATES[::-1]:
        step = np.maximum(largest * share / limit, 2.0**-40)[:, None]
        error = np.square(np.clip(np.rint(rows / step), -limit, limit) * step - rows).sum(axis=1)
        better = error < best
        best[better], scale[better] = error[better], step[better, 0]
    return scale


def compensated_rounding(
    weight: Floats, scale: npt.NDArray[np.float64], limit: int, inputs: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """int64 [O, K]: weights rounded one after another, each error spread over those still open (GPTQ).

    weight: [O, K]. inputs: samples [n, K] of what meets the weights, centred where means are restored.
    """
    covariance = inputs.T @ inputs / len(inputs)
    covariance += np.eye(len(covariance)) * (DAMPING * float(np.trace(covariance)) / len(covariance) + 1e-12)
    order = np.argsort(-np.diag(covariance), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(covariance[np.ix_(order, order)])).T  # upper
    target = weight[:, order].astype(np.float64)
    result = np.empty(weight.shape, np.int64)
    for j in range(target.shape[1]):
        q = np.clip(np.rint(target[:, j] / scale), -limit, limit)
        error = (target[:, j] - q * scale) / factor[j, j]
        target[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :][None]
        result[:, order[j]] = q.astype(np.int64)
    return result


def uniform_program(
    prepared: Prepared,
    config: QuantizeConfig,
    masks: Masks,
    bits: int | Mapping[str, int] = 4,
    rounding: Rounding = "nearest",
    *,
    weights: Weights = "own",
    correct: bool = True,
    given: Mapping[str, LowWeights] | None = None,
    tables: bool = True,
) -> Program:
    """A program with one ratio: layers (or, in part, groups) of `masks` at `bits`, the rest at 8, biases corrected.

    masks: bool [n_groups] per low-eligible layer; layers that are absent stay at 8 bits. bits: 2 to 7, for all or per layer.
    weights: integers with ranges of their own, or the top bits of the 8-bit ones. correct=False leaves the float graph's
    biases as they are (for weights that were trained at this width). given: weights of layers that are low as a whole, instead of
    rounded ones. tables=False: low layers read 8-bit values, only their weights are narrow. The ratio is the share of eligible
    multiply-accumulates that run low. Raises ConfigError.
    """
    start = config.updated(ratios=(0.0,), extraction="static", low_bits=4, low_bits_weights=None)
    program = build_program(prepared.graph, prepared.statistics, start, group_bounds)
    low = {name: mask for name, mask in masks.items() if mask.any()}
    for name in low:
        layer = program.layers.get(name)
        if layer is None or not layer.eligible:
            raise ConfigError(f"layer '{name}' may not run low: {layer.reason if layer else 'there is none of that name'}")
    samples = input_samples(prepared, start, list(low)) if rounding == "compensated" else {}
    readers: dict[tuple[str, int, bool], str] = {}
    for name, mask in low.items():
        width = bits if isinstance(bits, int) else bits[name]
        if not 2 <= width < HIGH_BITS:
            raise ConfigError(f"layer '{name}' at {width} bits: choose 2 to 7")
        whole = bool(mask.all())
        if given is not None and not whole:
            raise ConfigError(f"layer '{name}' is low in part: weights are given for whole layers")
        if tables:
            source = prepared.graph.node(name).inputs[0]
            step = program.instruction(name)
            top = least_squares_top(
                prepared.statistics[source], low_limit(width, program.qparams[step.inputs[0]].signed)
            )
            key = (step.inputs[0], width, whole)
            if key not in readers:
                readers[key] = _re_encode(program, step, top, width, whole)
            place = program.instructions.index(step)
            program.instructions[place] = dataclasses.replace(step, inputs=(readers[key],))
        own = None if given is None else given[name]
        _lower_layer(program, prepared.graph, name, mask, width, samples.get(name), weights, own, tables)
    if correct:
        restore_means(prepared, program, config, [0])
    program.ratios = [program.eligible_share(0)]
    return program


def input_samples(prepared: Prepared, config: QuantizeConfig, layers: list[str]) -> dict[str, npt.NDArray[np.float64]]:
    """float64 [n, C, taps] per layer: rows of what its weights meet in the 8-bit model, in units of that model."""
    program = build_program(prepared.graph, prepared.statistics, config, group_bounds)
    restore_means(prepared, program, config, [0])
    batches = prepared.batches(config.batch_size)
    executor = Executor(program)
    sampler = PatchSampler(executor, layers, len(batches), SAMPLES, config.seed)
    settings = executor.settings(0)
    for batch in batches:
        executor.run(batch, settings, observe=sampler)
    rows = {name: patches.astype(np.float64) for name, patches in sampler.patches().items()}
    return {n: r - r.mean(axis=0) if config.bias_correction else r for n, r in rows.items()}


def _re_encode(program: Program, reader: Instruction, top: float, bits: int, whole: bool) -> str:
    """Insert the table that gives a layer's input in its low range, before the reader. Returns the new value's name."""
    source = reader.inputs[0]
    encoding = program.qparams[source]
    limit = low_limit(bits, encoding.signed)
    finer = 1 if whole else 1 << (HIGH_BITS - bits)
    reach = limit if whole else encoding.qmax
    scale = float(np.float32(max(top, 2.0**-30) / limit / finer))
    name = f"{source}_u{bits}" + ("" if whole else "_part")
    low = -reach if encoding.signed else 0
    q = (np.arange(-128, 128) if encoding.signed else np.arange(256)).astype(np.float32)
    # In float32, as the twin of training computes it: ratios of scales are often simple, so that ties are common.
    real = np.clip(q * np.float32(encoding.scale), np.float32(low * scale), np.float32(reach * scale))
    entries = np.clip(np.rint(real / np.float32(scale)), low, reach)
    table = entries.astype(np.int8 if encoding.signed else np.uint8)
    limits = {"lo": low * scale, "hi": reach * scale}
    lookup = Lookup(name, (source,), reader.source, low, reach, table, 128 if encoding.signed else 0, "clamp", limits)
    program.instructions.insert(program.instructions.index(reader), lookup)
    program.types[name] = TensorType(program.types[source].shape, "int8" if encoding.signed else "uint8")
    program.qparams[name] = QParams(scale, encoding.signed)
    return name


def _lower_layer(
    program: Program,
    graph: Graph,
    name: str,
    mask: npt.NDArray[np.bool_],
    bits: int,
    samples: npt.NDArray[np.float64] | None,
    weights: Weights,
    given: LowWeights | None,
    narrow: bool,
) -> None:
    layer = program.layers[name]
    source = graph.node(name)
    assert source.weight is not None
    weight = np.asarray(graph.constants[source.weight], np.float32)
    activation = program.qparams[program.instruction(name).inputs[0]]
    layer.wmax, layer.amax = low_limit(bits, True), low_limit(bits, activation.signed) if narrow else activation.qmax
    shift = HIGH_BITS - bits  # of the top bits of 8
    if weights == "own":
        scale = least_squares_weight_scale(weight, layer.wmax) if given is None else given.scale
        integers = _round(weight, scale, layer, samples) if given is None else given.integers
        if mask.all():
            shift = 0
        else:
            scale = scale / (1 << shift)
            fine = np.clip(np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), -127, 127)
            integers = np.where(_per_weight(layer, mask, weight.ndim), integers << shift, fine.astype(np.int64))
        layer.weight, layer.weight_scale = integers.astype(np.int8), scale.astype(np.float32)
    layer.multiplier = multipliers(layer.weight_scale, activation.scale, program.qparams.get(name))
    layer.weight_shift = np.full_like(layer.weight_shift, shift)
    layer.activation_shift = np.full_like(layer.activation_shift, 0 if mask.all() else HIGH_BITS - bits)
    layer.low = mask[None].copy()
    layer.bias = np.zeros((1, len(weight)), np.int32)
    if source.bias is not None:
        layer.bias[0] = quantize_bias(graph.constants[source.bias], layer.weight_scale, activation.scale)
    bound_accumulators(layer, program.qparams[program.instruction(layer.name).inputs[0]])


def _round(
    weight: Floats, scale: npt.NDArray[np.float64], layer: QuantizedLayer, samples: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.int64]:
    """int64, shape of the weight: low integers."""
    limit = layer.wmax
    nearest = np.clip(np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), -limit, limit).astype(np.int64)
    if samples is None:
        return nearest
    result = nearest.copy()
    rows, per_group = len(weight) // layer.conv_groups, weight.shape[1]
    for g in range(layer.conv_groups):
        own = slice(g * rows, (g + 1) * rows)
        x = samples[:, g * per_group : (g + 1) * per_group].reshape(len(samples), -1)
        flat = weight[own].reshape(rows, -1)
        found = compensated_rounding(flat, scale[own], limit, x)
        errors = [np.square(x @ (q * scale[own, None] - flat).T).sum(axis=0) for q in (found, nearest[own].reshape(rows, -1))]
        found[errors[0] >= errors[1]] = nearest[own].reshape(rows, -1)[errors[0] >= errors[1]]
        result[own] = found.reshape(result[own].shape)
    return result


def _per_weight(layer: QuantizedLayer, mask: npt.NDArray[np.bool_], ndim: int) -> npt.NDArray[np.bool_]:
    """bool [O, I, 1, ..]: which weights belong to low groups."""
    assert layer.weight is not None
    channels = mask[layer.channel_groups()].reshape(layer.conv_groups, 1, -1)
    outputs = len(layer.weight)
    spread = np.broadcast_to(channels, (layer.conv_groups, outputs // layer.conv_groups, channels.shape[2]))
    return spread.reshape(outputs, -1, *[1] * (ndim - 2))
