"""Bands: a program cut down to a range of ratios, whose always-low groups need no 8-bit weights any more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.packing import extract_weights, read_back
from bitdial.errors import ConfigError
from bitdial.quantization.answers import KEY, kept_answers
from bitdial.quantization.program import Program, QuantizedLayer

_TOLERANCE = 1e-9  # ratios typed on a command line against those of the program


def restrict_to_band(program: Program, band: tuple[float, float]) -> Program:
    """The program with only the ratios within band[0]..band[1] (inclusive); arrays are shared where they do not change.

    In groups low at all of these, every weight becomes the 8-bit value that its low value reads back as, which lowers
    to the same low value: at the ratios that remain, all accumulators are what they were. `ratios[0]` may be above 0.
    provenance["band"] becomes [low, high]. Raises ConfigError if the band is no range within 0..1 or contains no ratio.
    """
    low, high = float(band[0]), float(band[1])
    if not (0.0 <= low <= high <= 1.0):
        raise ConfigError(f"band {low}..{high} is no range within 0..1; give two ratios, the lower one first")
    keep = [i for i, r in enumerate(program.ratios) if low - _TOLERANCE <= r <= high + _TOLERANCE]
    if not keep:
        have = ", ".join(f"{r:g}" for r in program.ratios)
        raise ConfigError(f"band {low:g}..{high:g} contains none of the model's ratios ({have}); choose a wider band")
    kept = [program.ratios[i] for i in keep]
    answers = kept_answers(program)
    of_band = {} if answers is None else {KEY: answers.restricted(kept).as_json()}
    layers = {name: _restrict_layer(layer, keep) for name, layer in program.layers.items()}
    return replace(
        program.with_layers(layers),
        ratios=kept,
        provenance={**program.provenance, **of_band, "band": [low, high]},
        curve=[row for row in program.curve if _in_band(row.get("ratio"), kept)],
    )


def is_banded(program: Program) -> bool:
    """Whether the program went through `restrict_to_band`, now or before it was saved."""
    return "band" in program.provenance


def always_low(layer: QuantizedLayer) -> npt.NDArray[np.bool_]:
    """bool [n_groups]: groups low at every ratio of the program."""
    return np.asarray(layer.low.all(axis=0))


def weight_mask(layer_low: npt.NDArray[np.bool_], bounds: npt.NDArray[np.int32], shape: tuple[int, ...],
                conv_groups: int) -> npt.NDArray[np.bool_]:  # fmt: skip
    """bool [*shape]: weights that belong to the groups of `layer_low` (bool [n_groups])."""
    per_channel = np.repeat(layer_low, np.diff(bounds)).reshape(conv_groups, shape[1])
    rows = np.repeat(per_channel, shape[0] // conv_groups, axis=0)
    return np.broadcast_to(rows.reshape(*shape[:2], *(1,) * (len(shape) - 2)), shape)


def weight_shifts(shift: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int32], shape: tuple[int, ...],
                  conv_groups: int) -> npt.NDArray[np.uint8]:  # fmt: skip
    """uint8 [*shape]: the shift of each weight, from weight_shift [O, n_local]."""
    n_local = shift.shape[1]
    outputs = shape[0] // conv_groups
    local = np.repeat(np.arange(len(bounds) - 1) % n_local, np.diff(bounds)).reshape(conv_groups, shape[1])
    rows = np.take_along_axis(shift, np.repeat(local, outputs, axis=0), axis=1)
    return np.broadcast_to(rows.reshape(*shape[:2], *(1,) * (len(shape) - 2)), shape)


def _restrict_layer(layer: QuantizedLayer, keep: list[int]) -> QuantizedLayer:
    layer = replace(layer, low=layer.low[keep], bias=layer.bias[keep])
    if layer.weight is None or not always_low(layer).any():
        return layer
    shape = layer.weight.shape
    mask = weight_mask(always_low(layer), layer.group_bounds, shape, layer.conv_groups)
    shift = weight_shifts(layer.weight_shift, layer.group_bounds, shape, layer.conv_groups)[mask]
    weight = layer.weight.copy()
    weight[mask] = read_back(extract_weights(weight[mask], shift, layer.wmax), shift)
    return replace(layer, weight=weight)


def _in_band(ratio: Any, kept: list[float]) -> bool:
    """Rows of the curve that name no ratio (baselines) stay."""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
        return True
    return any(math.isclose(ratio, r, abs_tol=_TOLERANCE) for r in kept)
