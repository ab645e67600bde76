"""What a layer of the twin takes from the program: shifts, masks and bias corrections, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import per_weight

BORDER = 0.45  # of a step: how near to the next low weight one may start


@dataclass
class LowVectors:
    """What extracts one layer at one ratio: vectors over its feature channels and weights.

    inverse, power, lo, hi              [C], broadcastable against the layer's input: see `rounding.extract`
    weight_inverse, weight_power        [O, I, 1..]: 2^-shift and 2^shift; 1 where a weight stays at 8 bits
    weight_limit                        [O, I, 1..]: largest magnitude, `wmax` or 127
    weight_low                          bool [O, I, 1..]: weights that are low
    low                                 bool [n_groups]
    """

    inverse: Tensor
    power: Tensor
    lo: Tensor
    hi: Tensor
    weight_inverse: Tensor
    weight_power: Tensor
    weight_limit: Tensor
    weight_low: Tensor
    low: Tensor


def low_vectors(
    layer: QuantizedLayer, index: int, signed: bool, shape: list[int], device: torch.device, dtype: torch.dtype
) -> LowVectors | None:
    """What extracts a layer at ratio index `index`; None if no group is low. shape: of a vector over channels."""
    assert layer.weight is not None
    low = layer.low[index]
    if not low.any():
        return None
    groups = layer.channel_groups()
    channels = low[groups]
    shift = np.where(channels, layer.activation_shift[groups], 0).astype(np.float32)
    limit = np.where(channels, layer.amax, 127 if signed else 255).astype(np.float32)
    outputs, per_group = layer.weight.shape[:2]
    n_local = layer.weight_shift.shape[1]
    local = np.diff(layer.group_bounds[: n_local + 1])
    own = np.repeat(channels.reshape(layer.conv_groups, 1, per_group), outputs // layer.conv_groups, axis=1)
    mask = own.reshape(outputs, per_group)
    weight_shift = np.where(mask, np.repeat(layer.weight_shift, local, axis=1), 0).astype(np.float32)
    weight_limit = np.where(mask, layer.wmax, 127).astype(np.float32)
    tail = [1] * (layer.weight.ndim - 2)

    def vector(values: np.ndarray, to: list[int], kind: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=kind).reshape(to)

    wide = [outputs, per_group, *tail]
    return LowVectors(
        vector(np.exp2(-shift), shape, dtype),
        vector(np.exp2(shift), shape, dtype),
        vector(-limit if signed else np.zeros_like(limit), shape, dtype),
        vector(limit, shape, dtype),
        vector(np.exp2(-weight_shift), wide, torch.float32),
        vector(np.exp2(weight_shift), wide, torch.float32),
        vector(weight_limit, wide, torch.float32),
        vector(mask, wide, torch.bool),
        torch.from_numpy(low.copy()).to(device),
    )


def bias_corrections(program: Program) -> dict[str, np.ndarray]:
    """float32 [n_ratios, O] per layer, real units: what the bias table adds to the bias of ratio index 0."""
    result = {}
    for name, layer in program.layers.items():
        if layer.weight is None:
            continue
        activation = program.qparams[program.instruction(name).inputs[0]]
        unit = layer.weight_scale.astype(np.float64) * activation.scale
        difference = layer.bias.astype(np.float64) - layer.bias[:1]
        result[name] = (difference * unit).astype(np.float32)
    return result


def latent_low_weights(layer: QuantizedLayer) -> np.ndarray:
    """float32, shape of the layer's weight: its own low weights, each moved towards the 8-bit weight by as much as rounds back to
    it, so that training first changes those for which the choice was close."""
    assert layer.weight is not None and layer.low_weight is not None
    exact = layer.weight / np.exp2(per_weight(layer, layer.weight_shift).astype(np.float32))
    result: np.ndarray = (layer.low_weight + np.clip(exact - layer.low_weight, -BORDER, BORDER)).astype(np.float32)
    return result


def correction_unit(program: Program, name: str) -> np.ndarray:
    """float32 [O], real units: about an 8-bit step of a layer's outputs, by the length of its weights: a correction
    that moves by 1 has moved by little, in any layer."""
    layer = program.layers[name]
    assert layer.weight is not None
    unit = layer.weight_scale.astype(np.float64) * program.qparams[program.instruction(name).inputs[0]].scale
    length = np.sqrt((layer.weight.reshape(len(layer.weight), -1).astype(np.float64) ** 2).sum(axis=1))
    result: np.ndarray = (unit * np.maximum(length, 1.0)).astype(np.float32)
    return result
