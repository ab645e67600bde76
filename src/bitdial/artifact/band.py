"""Bands: a program cut down to a range of ratios, whose always-low groups need no 8-bit weights any more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from bitdial.artifact.packing import read_back
from bitdial.artifact.weights import low_of, settled, weight_mask, weight_shifts
from bitdial.errors import ConfigError
from bitdial.quantization.answers import KEY, kept_answers
from bitdial.quantization.program import Program, QuantizedLayer

_TOLERANCE = 1e-9  # ratios typed on a command line against those of the program


def restrict_to_band(program: Program, band: tuple[float, float]) -> Program:
    """The program with only the ratios within band[0]..band[1] (inclusive); arrays are shared where they do not change.

    In groups low at all of these, every weight becomes the 8-bit value that its low value reads back as, which lowers
    to the same low value: at the ratios that remain, all accumulators are what they were. Low weights of their own stay; those of
    groups that are now never low become what extraction derives. `ratios[0]` may be above 0.
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


def _restrict_layer(layer: QuantizedLayer, keep: list[int]) -> QuantizedLayer:
    layer = replace(layer, low=layer.low[keep], bias=layer.bias[keep])
    if layer.weight is None:
        return layer
    mask = weight_mask(layer, layer.low.all(axis=0))
    if mask.any():
        weight = layer.weight.copy()
        weight[mask] = read_back(low_of(layer, mask), weight_shifts(layer)[mask])
        layer = replace(layer, weight=weight)
    return settled(layer)


def _in_band(ratio: Any, kept: list[float]) -> bool:
    """Rows of the curve that name no ratio (baselines) stay."""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
        return True
    return any(math.isclose(ratio, r, abs_tol=_TOLERANCE) for r in kept)
